"""A disaster, rehearsed: what would be there if the primary site were gone now, and how soon would it answer?

Nothing of production is touched. What has really arrived at the secondary becomes a scratch copy in a temporary
folder: of a follower, whatever feeds it, a copy of its files; of a database, a store made from its rows. The scratch
copy is promoted in isolation (it listens nowhere and reaches nobody), read, written to, and compared with the source
at the position that it had.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvrep
from kvrep.errors import ConfigurationMismatch, LineageMismatch, LogTrimmed, PeerUnavailable, ReadError
from kvrep.model.change import DELETE, PUT, Change
from kvrep.model.position import ZERO, EpochTable, Position
from kvrep.model.record import is_system
from kvrep.model.token import WHOLE, Token
from kvrep.runtime.cloning import clone
from kvrep.sinks.addresses import sink_at
from kvrep.sinks.interface import Sink
from kvrep.sinks.upstream import MESSAGE_BYTES_MAX, Remote, Selected
from kvrep.storage.digest import DIGEST_MODULUS, Hasher
from kvrep.store import Store
from kvrep.transport.network import GrpcTransport
from kvrep.transport.security import Security

if TYPE_CHECKING:
    from kvrep.transport.interface import Connection

__all__ = ["Check", "DrillReport", "drill"]

CALL_S = 10.0
PROBE = b"kvrep-drill"
LOAD_ROWS = 2000
CHANGES_S = 120.0
"""How long the source may take to show what has changed since."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. What could not be looked at has failed."""

    name: str
    ok: bool
    detail: str


@dataclass(slots=True, kw_only=True)
class DrillReport:
    """What a drill found; ``ok`` when every check passed."""

    source: str
    secondary: str
    lineage: str = ""
    source_position: Position = ZERO
    """What was committed at the source when the disaster was called."""
    position: Position = ZERO
    """What had arrived at the secondary by then."""
    copied: Position = ZERO
    """What the scratch copy holds: ``position``, or a little more that arrived while it was made."""
    missing_records: int = 0
    newest_missing_s: float = 0.0
    """The commit time of the newest change that would be lost; 0: none."""
    rpo_s: float | None = None
    """How far back the secondary was: the age of the oldest change that would be lost; 0: none; ``None``: the source
    cannot tell what is missing."""
    copy_s: float = 0.0
    """Time to make the scratch copy of a follower: part of the drill, not of a disaster."""
    rto_s: float = 0.0
    """From the decision to the first answered read and write."""
    keys: int = 0
    sampled: int = 0
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    def add(self, name: str, ok: bool, detail: str) -> None:
        self.checks.append(Check(name, ok, detail))

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            **asdict(self), "ok": self.ok, "position": str(self.position),
            "source_position": str(self.source_position), "copied": str(self.copied),
        }  # fmt: skip


def drill(
    source: str,
    secondary: str,
    *,
    sample: int = 1000,
    rpo_max_s: float | None = None,
    rto_max_s: float | None = None,
    timeout_s: float = 300.0,
    folder: str | None = None,
    seed: int = 1,
    tls: Any = None,
    token: str | None = None,
) -> DrillReport:
    """Rehearse the loss of the node at ``source`` with what ``secondary`` holds.

    ``secondary`` is the address of a follower, or a database that an agent fills (see
    :mod:`kvrep.sinks.addresses`). Raises what connecting raises; what the drill finds is in the report.
    """
    upstream = Remote(source, tls=tls, token=token)
    report = DrillReport(source=source, secondary=secondary)
    try:
        with tempfile.TemporaryDirectory(prefix="kvrep-drill-", dir=folder) as scratch:
            _rehearse(report, upstream, Path(scratch), sample, timeout_s, seed, {"tls": tls, "token": token})
    finally:
        upstream.close()
    if rpo_max_s is not None:
        measured = "not known" if report.rpo_s is None else f"{report.rpo_s:.3f} s"
        kept = report.rpo_s is not None and report.rpo_s <= rpo_max_s
        report.add("RPO", kept, f"{measured}, at most {rpo_max_s:g} s wanted")
    if rto_max_s is not None:
        report.add("RTO", report.rto_s <= rto_max_s, f"{report.rto_s:.3f} s, at most {rto_max_s:g} s wanted")
    return report


def _rehearse(
    report: DrillReport, upstream: Remote, scratch: Path, sample: int, timeout_s: float, seed: int,
    security: dict[str, Any],
) -> None:  # fmt: skip
    called_s = time.time()
    status = upstream.call("status", {"timeout_s": 10.0})["status"]
    report.lineage = status["lineage"]
    report.source_position = Position.parse(status["position"])
    host, _, port = report.secondary.rpartition(":")
    if host and "/" not in report.secondary and port.isdecimal():
        bring_up = _from_follower(report, scratch, timeout_s, security)
    else:
        bring_up = _from_database(report, scratch, security)
    with bring_up as store:
        _check(report, upstream, store, sample, seed, called_s)


# -- the scratch copy ----------------------------------------------------------------------------------


@contextmanager
def _from_follower(
    report: DrillReport, scratch: Path, timeout_s: float, security: dict[str, Any]
) -> Iterator[kvrep.Store]:
    """What the secondary itself holds, whatever feeds it; promoted where nobody can be reached."""
    transport = GrpcTransport(security=Security(**security), message_bytes_max=MESSAGE_BYTES_MAX)
    began = time.monotonic()
    with closing(transport.connect(report.secondary, name="drill")) as far:
        report.position = _arrived(report, far)
        node = clone(scratch / "copy", far, through=report.position.offset, name="drill", timeout_s=timeout_s)
    with Store(node) as copy:
        report.copied = Position(node.engine.tail.epoch, node.engine.tail.offset)
        report.copy_s = time.monotonic() - began
        began = time.monotonic()
        copy.promote(force=True, voters=["drill"], acks=0)
        _answer(report, copy, began)
        yield copy


def _arrived(report: DrillReport, far: Connection) -> Position:
    """The last record at the secondary: a promotion by force keeps all that is there."""
    standing = far.call("standing", {}, CALL_S)
    lineage = bytes(standing["lineage"]).hex()
    if not lineage:
        raise PeerUnavailable(
            f"{report.secondary} holds nothing yet", address=report.secondary,
            hint="'kvrep status' says what it waits for",
        )  # fmt: skip
    if lineage != report.lineage:
        raise LineageMismatch(
            f"{report.secondary} holds another store than {report.source}",
            ours=report.lineage, theirs=lineage, hint="check both addresses",
        )  # fmt: skip
    if standing["primary_epoch"]:
        raise ConfigurationMismatch(
            f"{report.secondary} is the primary", option="to", given=report.secondary,
            hint="give the address of a follower at the far site",
        )  # fmt: skip
    status = far.call("status", {"timeout_s": CALL_S}, CALL_S)["status"]
    report.add("digests on arrival", not status["diverged_at"], _verified(status))
    return Position(*standing["last"])


def _verified(status: dict[str, Any]) -> str:
    """What the secondary found when it compared itself with its primary, at every digest mark."""
    if status["diverged_at"]:
        return f"they differ from the primary's at record {status['diverged_at']}"
    through = status["verified_through"]
    return f"equal to the primary's through record {through}" if through else "no mark was reached; see below"


@contextmanager
def _from_database(report: DrillReport, scratch: Path, security: dict[str, Any]) -> Iterator[kvrep.Store]:
    """A store out of the rows of a database as of one moment."""
    with sink_at(report.secondary, **security) as sink:
        sink.look()
        began = time.monotonic()
        place = sink.hold()
        if place.lineage and place.lineage != report.lineage:
            raise LineageMismatch(
                f"{sink.url} holds another store than {report.source}",
                ours=report.lineage, theirs=place.lineage, hint="check both addresses",
            )  # fmt: skip
        report.secondary, report.position, report.copied = sink.url, place.position, place.position
        letters = sink.dead_letters()
        whole = place.whole and not letters
        report.add("consistent", whole, _consistency(place.whole, len(letters)))
        with kvrep.open(scratch / "copy", name="drill") as copy:
            _load(sink, copy)
            sink.rollback()
            _answer(report, copy, began)
            yield copy


def _consistency(whole: bool, letters: int) -> str:
    if not whole:
        return "a snapshot or a transaction is there in part"
    return f"{letters} changes were put aside" if letters else "whole transactions, no change put aside"


def _load(sink: Sink, copy: kvrep.Store) -> None:
    for name in sink.keyspaces():
        space = copy.keyspace(name)
        batch = space.batch()
        batch.__enter__()
        for number, (key, value) in enumerate(sink.scan(name), 1):
            if not isinstance(key, bytes) or not isinstance(value, bytes):
                raise ConfigurationMismatch(
                    f"the table of keyspace {name} holds columns, which cannot be turned back into values",
                    option="to", given=sink.url, hint="drill with a follower, or an agent without --table",
                )  # fmt: skip
            batch.put(key, value)
            if number % LOAD_ROWS == 0:
                batch.__exit__(None, None, None)
                batch = space.batch()
                batch.__enter__()
        batch.__exit__(None, None, None)


def _answer(report: DrillReport, copy: kvrep.Store, began: float) -> None:
    """The first read and the first write: from here on an application could go on."""
    next(copy.scan(limit=1), None)
    probe = copy.keyspace(PROBE.decode())
    probe.put(PROBE, b"1")
    answered = probe.get(PROBE) == b"1"
    probe.clear()
    report.rto_s = time.monotonic() - began
    report.add("it answers", answered, f"a read and a write after {report.rto_s:.3f} s")


# -- against the source --------------------------------------------------------------------------------


class _Since:
    """What the source committed after the copy's position, through the position of its digests."""

    def __init__(self, hasher: Hasher) -> None:
        self.hasher = hasher
        self.hashes: dict[tuple[str, bytes], int] = {}
        """Of each key that changed: the hash of its pair now; 0 for one that is gone."""

    def add(self, change: Change) -> None:
        pair = [] if change.value is None else [(change.key, change.value)]
        self.hashes[(change.keyspace, change.key)] = self.hasher.sum(pair)

    def __contains__(self, place: tuple[str, bytes]) -> bool:
        return place in self.hashes


def _check(
    report: DrillReport, upstream: Remote, copy: kvrep.Store, sample: int, seed: int, called_s: float
) -> None:
    """Every key that has not changed since, by digests; a sample of them, by their values."""
    try:
        upstream.call("wait", {"position": str(report.copied), "timeout_s": CALL_S})
        _compare(report, upstream, copy, sample, seed, called_s)
    except (ReadError, LogTrimmed) as error:
        report.add("history", False, f"it cannot be compared with {report.source}: {error.message}")


def _compare(
    report: DrillReport, upstream: Remote, copy: kvrep.Store, sample: int, seed: int, called_s: float
) -> None:
    """As :func:`_check`; raises where the source cannot tell what has changed since."""
    hasher = Hasher(bytes.fromhex(report.lineage))
    theirs = upstream.call("digests", {"timeout_s": 60.0})
    since = _missing(report, upstream, hasher, Position.parse(theirs["position"]), called_s)
    chosen, sums = _walked(report, copy, since, sample, random.Random(seed))
    for (name, _), digest in since.hashes.items():
        sums[name] = sums.get(name, 0) + digest
    wanted = {name: _number(digest) for name, digest in theirs["digests"].items()}
    names = sorted(name for name in sums.keys() | wanted.keys() if not is_system(name))
    wrong = [n for n in names if sums.get(n, 0) % DIGEST_MODULUS != wanted.get(n, 0)]
    said = f"all {report.keys} keys, less {len(since.hashes)} that changed since, have the source's digests"
    report.add(
        "digests", not wrong, f"keyspace {', '.join(wrong)} differs from the source" if wrong else said
    )
    _compare_values(report, upstream, copy, chosen)


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "big")


def _missing(
    report: DrillReport, upstream: Remote, hasher: Hasher, through: Position, called_s: float
) -> _Since:
    """Notes what would be lost, on the way through what has changed since."""
    since = _Since(hasher)
    oldest_us = newest_us = 0
    for change in _changes_after(report, upstream, report.position, through):
        if change.kind in (PUT, DELETE):
            since.add(change)
        if change.position <= report.source_position:
            newest_us = max(newest_us, change.time_us)
            oldest_us = min(oldest_us, change.time_us) if oldest_us else change.time_us
    report.missing_records = max(0, report.source_position.offset - report.position.offset)
    report.rpo_s = max(0.0, called_s - oldest_us / 1e6) if oldest_us else 0.0
    report.newest_missing_s = newest_us / 1e6
    return since


def _changes_after(
    report: DrillReport, upstream: Remote, after: Position, through: Position
) -> Iterator[Change]:
    """What the source has committed behind ``after``, through ``through``."""
    token = Token(bytes.fromhex(report.lineage), b"", after, WHOLE, EpochTable(), None, None)
    stream = upstream.changes(str(token), Selected())
    deadline = time.monotonic() + CHANGES_S
    while after < through:
        if time.monotonic() > deadline:
            raise PeerUnavailable(
                f"{report.source} does not show what it has committed: its voters have not confirmed it",
                address=report.source, hint="look at its followers with 'kvrep status'",
            )  # fmt: skip
        for change in stream.poll(0.5):
            if change.position > through:
                return
            yield change
        after = stream.at()


def _walked(
    report: DrillReport, copy: kvrep.Store, since: _Since, sample: int, chance: random.Random
) -> tuple[list[tuple[str, bytes]], dict[str, int]]:
    """One pass over the copy: a sample without bias (algorithm R) and the sums, of keys that have not changed."""
    chosen: list[tuple[str, bytes]] = []
    sums: dict[str, int] = {}
    seen = 0
    for name in copy.keyspaces():
        if name == PROBE.decode():
            continue
        pairs: list[tuple[bytes, bytes]] = []
        for key, value in copy.keyspace(name).scan():
            report.keys += 1
            if (name, key) in since:
                continue
            seen += 1
            pairs.append((key, value))
            if len(pairs) == LOAD_ROWS:
                sums[name] = sums.get(name, 0) + since.hasher.sum(pairs)
                pairs = []
            if len(chosen) < sample:
                chosen.append((name, key))
            elif (at := chance.randrange(seen)) < sample:
                chosen[at] = (name, key)
        sums[name] = sums.get(name, 0) + since.hasher.sum(pairs)
    return chosen, sums


def _compare_values(
    report: DrillReport, upstream: Remote, copy: kvrep.Store, chosen: list[tuple[str, bytes]]
) -> None:
    differing: list[tuple[str, bytes]] = []
    for name, key in chosen:
        request = {"timeout_s": 10.0, "keyspace": name, "key": key, "at_least": None}
        if upstream.call("get", request)["value"] != copy.keyspace(name).get(key):
            differing.append((name, key))
    if differing:  # some may have changed between our look at the changes and the read
        now = Position.parse(upstream.call("status", {"timeout_s": 10.0})["status"]["position"])
        later = {(c.keyspace, c.key) for c in _changes_after(report, upstream, report.position, now)}
        differing = [place for place in differing if place not in later]
    report.sampled = len(chosen)
    if differing:
        shown = ", ".join(f"{name}/{key!r}" for name, key in differing[:3])
        report.add("sample", False, f"{len(differing)} of {len(chosen)} keys differ from the source: {shown}")
    else:
        report.add("sample", True, f"{len(chosen)} keys have the source's values")
