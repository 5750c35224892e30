"""The agent: takes changes from a source and brings a secondary system up to date, for ever.

::

    source.receive() ──> sink.apply() … ──> sink.commit(place) ──> source.settle(place)

Rows and place move in one transaction of the secondary. So wherever the agent is interrupted, it goes on from
the place that it finds there, and what arrives again is dropped: every change takes effect exactly once.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any, NamedTuple

from kvrep.errors import (
    ConfigurationMismatch,
    LineageMismatch,
    Overloaded,
    PeerUnavailable,
    RejectedChange,
    StaleRead,
    StorageFull,
    StoreInUse,
)
from kvrep.feeds.rows import Rows
from kvrep.model.change import BEGIN, DELETE, END, PUT, Change, Sequence, sequence_text
from kvrep.model.event import Event
from kvrep.model.position import Position
from kvrep.sinks.delays import Delays, Rate, catch_up_s, known
from kvrep.sinks.interface import DeadLetter, Place, Sink
from kvrep.sinks.running import AgentState, Running
from kvrep.sinks.source import Incoming, Source, SourceState, Unreadable

__all__ = ["Agent", "AgentState", "AgentStatus", "retry_dead_letters"]

log = logging.getLogger("kvrep.agent")

IDLE_S = 0.2
UNIT_WAIT_S = 0.25
"""How long the rest of a transaction is waited for before its first part is committed alone."""
FLUSH_CHANGES, FLUSH_BYTES = 20_000, 8 << 20
"""What of a large transaction is kept before it goes to the secondary, uncommitted."""
RETRYABLE = (PeerUnavailable, StorageFull, StoreInUse, StaleRead, TimeoutError)
"""What may pass by itself. Everything else waits for somebody to fix it, so it ends the agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStatus:
    """An agent at one moment."""

    name: str
    state: AgentState
    problem: str
    source: str
    secondary: str
    lineage: str
    position: Position
    """The record of the last change in the secondary."""
    consistent: bool
    """Whether the secondary is all of the source as of ``position``: no part of a transaction, no snapshot
    half way, no change put aside as a dead letter."""
    as_of_s: float
    """The wall clock at the source that the secondary shows: later changes are missing. 0: not known."""
    applied: int
    """Changes applied by this agent."""
    applied_per_s: float
    backlog: int | None
    """Records that are committed at the source and not applied; ``None`` while not known."""
    catch_up_s: float | None
    """Seconds until the backlog is gone at the present speed; ``None`` when it grows, or is not known."""
    delay_p50_s: float | None
    """From commit to taking effect in the secondary, of the last minutes; ``None``: no changes."""
    delay_p99_s: float | None
    commits: int
    snapshots: int
    parked: int
    """Events that wait for a missing one."""
    repeats: int
    asked: int
    """How often missing events were asked for again."""
    dead_letters: int
    reconnects: int

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "state": str(self.state), "position": str(self.position)}


class Agent(Running):
    """Keeps a secondary up to date. ``start()`` runs it in a thread, ``run()`` in the calling one.

    Source and secondary may be given by their addresses (:mod:`kvrep.sinks.addresses`). The agent closes both.

    Wrong credentials, addresses and the like raise from :meth:`start` at once; what does not answer is an
    error there, too, unless ``wait`` is set. Later, what may pass by itself is tried again for ever.
    ``status`` and ``close`` may be called on any thread.
    """

    kind, retryable = "agent", RETRYABLE

    def __init__(
        self,
        source: Source | str,
        sink: Sink | str,
        *,
        name: str = "agent",
        batch_changes: int = 1000,
        batch_bytes: int = 4 << 20,
        dead_letters_max: int = 10_000,
        wait: bool = False,
        log_interval_s: float = 60.0,
    ) -> None:
        if batch_changes < 1 or batch_bytes < 1:
            raise ValueError("a batch has at least one change and one byte")
        from kvrep.sinks.addresses import sink_at, source_at

        super().__init__(name, wait=wait)
        self.sink = sink_at(sink) if isinstance(sink, str) else sink
        self.source = source_at(source) if isinstance(source, str) else source
        self._batch_changes, self._batch_bytes = batch_changes, batch_bytes
        self._letters_max = dead_letters_max
        self.source.widen(self.sink.batch_changes)
        self._log_interval_s = log_interval_s
        self._place = Place()
        self._batch = _Batch()
        self._letters: dict[tuple[str, bytes], list[int]] = {}
        self._letter_count = 0
        self._applied = self._commits = self._snapshots = 0
        self.delays = Delays()
        self._speed, self._growth = Rate(), Rate()
        self._logged_s = time.monotonic()

    # -- waiting -----------------------------------------------------------------------------------

    def wait_for(self, position: Position, timeout_s: float = 10.0) -> None:
        """Return once the secondary is consistent at or after ``position``.

        :class:`StaleRead` after ``timeout_s``; the error that ended the agent, if one did.
        """
        deadline = time.monotonic() + timeout_s
        with self._moved:
            while not (self._place.whole and self._place.position >= position):
                self.raise_error()
                left = deadline - time.monotonic()
                if left <= 0 or self._state is AgentState.CLOSED:
                    raise StaleRead(
                        f"{self.sink.url} is at {self._place.position}, not yet at {position}",
                        position=self._place.position, wanted=position, staleness_s=None,
                    )  # fmt: skip
                self._moved.wait(left)

    def _close_sides(self) -> None:
        self.source.end()

    def _progress(self) -> int:
        return self._commits

    # -- the loop ----------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Both sides open, at the place that the secondary knows."""
        try:
            place = self.sink.open()
            self._count_letters()
            self.source.open(place)
            if place.lineage and self.source.lineage and place.lineage != self.source.lineage:
                raise LineageMismatch(
                    f"{self.sink.url} holds a copy of another store",
                    ours=place.lineage, theirs=self.source.lineage,
                    hint="check both addresses; for a new copy, give an empty schema or file",
                )  # fmt: skip
            self._refuse_itself()
        except BaseException:
            self._disconnect()
            raise
        self._place = place
        self._batch = _Batch()
        self._say(AgentState.SNAPSHOT if place.staging else AgentState.APPLYING, "")

    def _refuse_itself(self) -> None:
        """A store that is copied into itself changes with every change that is copied."""
        if self.sink.own_lineage and self.sink.own_lineage == self.source.lineage:
            raise ConfigurationMismatch(
                f"{self.sink.url} is the source itself, or a node of its group", option="to",
                given=self.sink.url, hint="give another store",
            )  # fmt: skip

    def _disconnect(self) -> None:
        for one in (self.source, self.sink):
            try:
                one.close()
            except Exception as error:  # it is being given up: what it says does not matter any more
                log.debug("closing %s: %s", one.url, error)

    def _session(self) -> None:
        """Receive, apply, commit, until told to end or something fails."""
        while not self._stop.is_set():
            batch = self._batch
            most, most_bytes = self._limits()
            arrived = self.source.receive(max(1, most - batch.count), self._patience())
            if arrived and self._state is AgentState.WAITING:
                self._say(AgentState.APPLYING, "")
            self._take(arrived)
            full = batch.count >= most or batch.bytes >= most_bytes
            if batch.count and (full or self._waited(arrived)) and self._may_commit(full):
                self._commit()
                self.sink.tend(self._stop.is_set)
            if not arrived:
                self._idle()
            self._log_now_and_then()

    def _limits(self) -> tuple[int, int]:
        """Changes and bytes of a commit."""
        most, most_bytes = self._batch_changes, self._batch_bytes
        if self._staging:
            most, most_bytes = self.sink.snapshot_batches * most, max(most_bytes, self.sink.snapshot_bytes)
        most, most_bytes = max(most, self.sink.batch_changes), max(most_bytes, self.sink.batch_bytes)
        return most if self.source.window is None else min(most, self.source.window), most_bytes

    @property
    def _staging(self) -> bool:
        """Whether a snapshot is arriving, what is not committed yet included."""
        staging = self._batch.staging
        return self._place.staging if staging is None else staging

    def _due_s(self) -> float:
        """In how many seconds a batch that is not full is committed. The end of a snapshot is awaited."""
        batch = self._batch
        lingers = batch.staging is not False
        return max(0.0, batch.began_s + self.sink.linger_s - time.monotonic()) if lingers else 0.0

    def _waited(self, arrived: SequenceOf[Incoming]) -> bool:
        """Whether a batch that is not full has been waited for: nothing more is there, or it is time."""
        return not self._due_s() and (not arrived or self.sink.linger_s > 0)

    def _patience(self) -> float:
        """How long to wait for more: not at all where something is ready to be committed."""
        if not self._batch.count:
            return IDLE_S
        return min(IDLE_S, self._due_s()) if self._batch.at_end else UNIT_WAIT_S / 5

    def _may_commit(self, full: bool) -> bool:
        """At the end of a transaction; inside one only when it is large, or its rest is long in coming."""
        batch = self._batch
        if batch.at_end:
            return True
        window = self.source.window
        large = (
            batch.count >= 4 * max(self._batch_changes, self.sink.batch_changes)
            or batch.bytes >= 4 * max(self._batch_bytes, self.sink.batch_bytes)
            or (window is not None and batch.count >= window)
        )
        return large or (not full and time.monotonic() - batch.began_s > UNIT_WAIT_S)

    def _idle(self) -> None:
        if not self._batch.count:
            self.source.settle(self._place)
            self.sink.tend(self._stop.is_set)
        source = self.source.state()
        behind = source.behind
        if behind is not None:
            self._growth.add(self._place.sequence[1] + behind, time.monotonic())
        if source.problem:
            self._say(AgentState.WAITING, source.problem)
        elif self._place.staging:
            self._say(AgentState.SNAPSHOT, "")
        else:
            busy = behind or self.sink.behind or not self._place.whole
            self._say(AgentState.APPLYING if busy else AgentState.CURRENT, "")

    # -- applying ----------------------------------------------------------------------------------

    def _take(self, arrived: SequenceOf[Incoming]) -> None:
        batch = self._batch
        if isinstance(arrived, Rows) and self._staging:
            self._take_rows(arrived)
            return
        changes, size = batch.changes, 0
        for one in arrived:
            if isinstance(one, Unreadable):
                self._make_room(one.reason)
                self._bury(DeadLetter(raw=one.raw, reason=one.reason))
                continue
            kind = one.kind
            if kind == PUT or kind == DELETE:  # noqa: PLR1714, SIM109 (a set costs twice as much here)
                changes.append(one)
                size += len(one.key) + len(one.value or b"") + 32
                if one.before:
                    size += len(one.before)
            elif kind == BEGIN:
                self._flush()
                self.sink.unstage()
                batch.aside.clear()
                self._forget_letters()
                batch.staging = True
            elif kind == END and self._staging:
                self._flush()
                self.sink.swap()
                batch.staging = False
                self._snapshots += 1
            batch.last = one
        batch.count += len(arrived)
        batch.bytes += size
        if self._staging or len(batch.changes) > FLUSH_CHANGES or batch.bytes > FLUSH_BYTES:
            self._flush()

    def _take_rows(self, rows: Rows) -> None:
        """Rows of a snapshot go straight to the secondary, without becoming changes on the way."""
        batch = self._batch
        self._flush()
        batch.last = rows[-1]
        batch.count += len(rows)
        batch.bytes += sum(len(key) + len(value or b"") + 32 for _, key, value in rows.ops)
        try:
            self.sink.stage_changes(rows)
        except RejectedChange:
            batch.changes += rows
            self._flush()
            return
        self._supersede(rows)
        batch.applied += len(rows)

    def _flush(self) -> None:
        """What was gathered goes to the secondary; what it cannot hold becomes dead letters."""
        batch = self._batch
        while batch.changes:
            try:
                if self._staging:
                    self.sink.stage_changes(batch.changes)
                else:
                    self.sink.apply_changes(batch.changes)
            except RejectedChange as error:
                self._put_aside(batch.changes.pop(error.index), error.message)
                continue
            self._supersede(batch.changes)
            batch.note_applied()
            batch.changes.clear()

    def _supersede(self, changes: Iterable[Change | Event]) -> None:
        """A later change of the same key makes a dead letter of no use, and wrong to apply."""
        aside = self._batch.aside
        if not self._letters and not aside:
            return
        for change in changes:
            place = (change.keyspace, change.key)
            if place in aside and aside[place].sequence < change.sequence:
                del aside[place]
            numbers = self._letters.pop(place, None)
            if numbers:
                self.sink.forget(numbers)
                self._letter_count -= len(numbers)
                self._batch.letters = True

    def _forget_letters(self) -> None:
        """A snapshot begins that replaces every key: with one of them, an older value would come back."""
        outdated = [number for numbers in self._letters.values() for number in numbers]
        if outdated:
            self.sink.forget(outdated)
            self._letters.clear()
            self._letter_count -= len(outdated)
            self._batch.letters = True

    def _put_aside(self, change: Change | Event, reason: str) -> None:
        """Bury it with the next commit, unless a later change of its key comes before that."""
        self._supersede([change])
        self._make_room(reason)
        self._batch.aside[(change.keyspace, change.key)] = _Aside(change.sequence, _letter(change, reason))

    def _make_room(self, reason: str) -> None:
        count = self._letter_count + len(self._batch.aside)
        if count >= self._letters_max:
            raise Overloaded(
                f"{count} dead letters: no room for {reason}",
                hint="look at them with 'kvrep agent dead-letters', fix the cause, retry or discard them",
            )

    def _bury(self, letter: DeadLetter) -> None:
        self.sink.bury(letter)
        self._letter_count += 1
        self._batch.letters = True
        log.warning(
            "agent %s puts aside %s %s: %s", self.name, letter.position, letter.keyspace, letter.reason
        )

    def _commit(self) -> None:
        self._refuse_itself()  # behind a broker it is known only now whose changes they are
        self._flush()
        batch, place, staging = self._batch, self._place, self._staging
        for aside in batch.aside.values():
            self._bury(aside.letter)
        if batch.last is not None:
            last = batch.last
            place = Place(
                lineage=self.source.lineage or place.lineage,
                sequence=last.sequence,
                time_us=last.time_us or place.time_us,
                token=last.resume,
                staging=staging,
                whole=last.last and not staging,
            )
        self.sink.commit(place)
        now_s, now_us = time.monotonic(), time.time_ns() // 1000
        for time_us, count in batch.times.items():
            self.delays.add((now_us - time_us) / 1e6, now_s, count)
        self._applied += batch.applied
        self._commits += 1
        self._speed.add(self._applied, now_s)
        if batch.letters:
            self._count_letters()
        self._batch = _Batch()
        with self._moved:
            self._place = place
            if self.sink.behind:
                self._state = AgentState.APPLYING
            self._moved.notify_all()
        self.source.settle(place)

    def _count_letters(self) -> None:
        self._letters = {}
        letters = self.sink.dead_letters()
        for letter in letters:
            if letter.readable:
                self._letters.setdefault((letter.keyspace, letter.key), []).append(letter.number)
        self._letter_count = len(letters)

    # -- what it says ------------------------------------------------------------------------------

    def status(self) -> AgentStatus:
        """Where the secondary stands, as one frozen value."""
        place, source, now_s = self._place, self.source.state(), time.monotonic()
        backlog = None if source.behind is None else source.behind + self._batch.count
        speed = self._speed.per_s(now_s)
        until = inf if backlog is None else catch_up_s(backlog, speed, self._growth.per_s(now_s))
        return AgentStatus(
            name=self.name,
            state=self._state,
            problem=self._problem,
            source=self.source.url,
            secondary=self.sink.url,
            lineage=place.lineage,
            position=place.position,
            consistent=place.whole and not self._letter_count,
            as_of_s=_as_of_us(place, source, backlog) / 1e6,
            applied=self._applied,
            applied_per_s=round(speed, 1),
            backlog=backlog,
            catch_up_s=None if until == inf else round(until, 3),
            delay_p50_s=self.delays.percentile(50, now_s),
            delay_p99_s=self.delays.percentile(99, now_s),
            commits=self._commits,
            snapshots=self._snapshots,
            parked=source.parked,
            repeats=source.repeats,
            asked=source.asked,
            dead_letters=self._letter_count,
            reconnects=self._reconnects,
        )

    def _log_now_and_then(self) -> None:
        now_s = time.monotonic()
        if now_s - self._logged_s < self._log_interval_s:
            return
        self._logged_s = now_s
        s = self.status()
        log.info(
            "agent %s: %s at %s, consistent %s, %.0f changes/s, backlog %s, delay p50 %s p99 %s, dead letters %d",
            s.name, s.state, s.position, s.consistent, s.applied_per_s, known(s.backlog), known(s.delay_p50_s, " s"),
            known(s.delay_p99_s, " s"), s.dead_letters,
        )  # fmt: skip


class _Aside(NamedTuple):
    """A change that does not fit, until the next commit."""

    sequence: Sequence
    letter: DeadLetter


class _Batch:
    """What will take effect with the next commit."""

    __slots__ = (
        "applied",
        "aside",
        "began_s",
        "bytes",
        "changes",
        "count",
        "last",
        "letters",
        "staging",
        "times",
    )

    def __init__(self) -> None:
        self.changes: list[Change | Event] = []
        """Not yet given to the sink."""
        self.count = self.bytes = self.applied = 0
        self.last: Change | Event | None = None
        self.times: Counter[int] = Counter()
        """commit time: changes of it, for the delays."""
        self.staging: bool | None = None
        """Whether a snapshot is arriving, once this batch has changed that."""
        self.aside: dict[tuple[str, bytes], _Aside] = {}
        self.letters = False
        """Whether the dead letters of the secondary will have changed."""
        self.began_s = time.monotonic()

    def note_applied(self) -> None:
        """Count what has just been given to the sink, and its commit times."""
        self.applied += len(self.changes)
        if not self.changes[
            0
        ].snapshot:  # rows are as old as they are; the few changes between them do not matter
            self.times.update(c.time_us for c in self.changes if not c.snapshot and c.time_us)

    @property
    def at_end(self) -> bool:
        """Whether it ends with a whole transaction."""
        return self.last is None or self.last.last


def _as_of_us(place: Place, source: SourceState, backlog: int | None) -> int:
    """A source that has nothing newer vouches for the time at which it said so, also if it is silent since."""
    return place.time_us if backlog else max(place.time_us, source.as_of_us)


def _letter(change: Change | Event, reason: str) -> DeadLetter:
    return DeadLetter(
        position=sequence_text(change.sequence), keyspace=change.keyspace, key=change.key, value=change.value,
        reason=reason,
    )  # fmt: skip


def retry_dead_letters(
    sink: Sink, numbers: Iterable[int] | None = None
) -> tuple[list[int], list[DeadLetter]]:
    """Apply dead letters again: all, or those of these numbers. Tables that ``sink`` was not told of stay mapped
    as their agent maps them.

    Returns the numbers that took effect, and those that failed again with their new reasons (they stay).
    ``ValueError`` for a number that does not exist; :class:`StoreInUse` when an agent committed meanwhile
    (nothing was done; try again).
    """
    place = sink.look()
    letters = {letter.number: letter for letter in sink.dead_letters()}
    wanted = sorted(letters) if numbers is None else list(numbers)
    for number in wanted:
        if number not in letters:
            raise ValueError(f"there is no dead letter {number}")
    done: list[int] = []
    failed: list[DeadLetter] = []
    for number in wanted:
        letter = letters[number]
        if not letter.readable:
            failed.append(replace(letter, reason=f"it cannot be read: {letter.reason}"))
            continue
        try:
            sink.apply([(letter.keyspace, letter.key, letter.value)])
        except RejectedChange as error:
            failed.append(replace(letter, reason=error.message))
            continue
        done.append(number)
    sink.forget(done)
    sink.commit(place)
    sink.tend()
    return done, failed
