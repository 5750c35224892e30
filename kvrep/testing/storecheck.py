"""Does what one store says of itself hold? Log, LMDB and digests, compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvrep.codecs import BYTES
from kvrep.errors import Error
from kvrep.keyspace import Keyspace
from kvrep.model.codec import decode
from kvrep.model.record import FEEDS_KEYSPACE, Record
from kvrep.store import Store
from kvrep.testing.checkers import Violation

__all__ = ["check_store", "content", "log_records"]

READ_BYTES = 1 << 20
_Report = Callable[[str], None]


def content(store: Store) -> dict[tuple[str, bytes], bytes]:
    """Everything in the store at one position, by (keyspace, key)."""
    found: dict[tuple[str, bytes], bytes] = {}
    with store.snapshot() as view:
        for name in store.keyspaces():
            pairs = view.scan(keyspace=store.keyspace(name))
            found.update({(name, key): value for key, value in pairs})
    return found


def log_records(store: Store, *, through: int | None = None) -> Iterator[Record]:
    """The records still in the log, decoded and checked, oldest first, up to offset ``through``.

    Raises a :class:`kvrep.Error` where one is damaged or does not join the one before.
    """
    log = store._node.engine.committer.log
    last = log.tail.offset if through is None else min(through, log.tail.offset)
    offset = log.first
    running = log.running_at(offset - 1)
    while offset <= last:
        run = log.read(offset, READ_BYTES)
        if run is None:
            return
        records, running = decode(run.data, run.first, running)
        for record in records:
            if record.offset <= last:
                yield record
        offset = run.last + 1


def check_store(store: Store, *, timeout_s: float = 30.0) -> list[Violation]:
    """Flush, then compare: records against their checksums, the log against what reads show, LMDB's content
    against its digests, and the digests against the primary's. Nobody may write meanwhile.
    """
    violations: list[Violation] = []
    feeds = Keyspace(store._node, FEEDS_KEYSPACE, BYTES)

    def broken(message: str) -> None:
        violations.append(Violation("store", f"{store.status().name or store.status().path}: {message}"))

    try:
        store.flush(timeout_s)
        found = content(store) | {(FEEDS_KEYSPACE, key): state for key, state in feeds.items()}
        _check_log(store, found, broken)
        _check_digests(store, found, broken)
    except (Error, OSError, TimeoutError) as error:
        broken(f"the check could not run: {type(error).__name__}: {error}")
    return violations


def _check_log(store: Store, found: dict[tuple[str, bytes], bytes], broken: _Report) -> None:
    """The last word of the log on a key is what reads show; a log from the first record on explains all."""
    engine = store._node.engine
    visible = store.position.offset
    last_words: dict[tuple[str, bytes], bytes | None] = {}
    first = engine.committer.log.first
    offset = first - 1
    for record in log_records(store, through=visible):
        offset = record.offset
        for name, key, value in record.ops():
            last_words[name, key] = value
    if offset < visible and offset < engine.tail.offset:
        broken(f"the log could be read through record {offset} only, of {visible}")
    for (name, key), value in last_words.items():
        if found.get((name, key)) != value:
            broken(f"{name}/{key!r}: the log says {value!r:.80}, reads say {found.get((name, key))!r:.80}")
            return
    if first == 1 and (extra := found.keys() - last_words.keys()):
        broken(f"{len(extra)} keys are not in the log, such as {min(extra)}")


def _check_digests(store: Store, found: dict[tuple[str, bytes], bytes], broken: _Report) -> None:
    """LMDB's content is what its digests and counts say, and what reads show; no digest mark has differed."""
    answer = store._node.engine.recompute_digests()
    stored = {name: value for name, value in answer["stored"].items() if any(value)}
    digests = {name: value for name, value in answer["digests"].items() if any(value)}
    if stored != digests:
        broken(f"LMDB's content does not have the digests that LMDB says: {stored} and {digests}")
    counts = {name: count for name, count in answer["counts"].items() if count}
    seen: dict[str, int] = {}
    for name, _ in found:
        seen[name] = seen.get(name, 0) + 1
    if counts != seen:
        broken(f"LMDB holds {counts} entries, reads show {seen}")
    if answer["diverged"]:
        broken(f"the digest mark at record {answer['diverged']} differs from the primary's")
