"""Checkers: given what clients did and saw, was every promise kept?

Each ``check_…`` function takes a history (any iterable of :class:`Operation`, such as a :class:`History`)
and returns a list of :class:`Violation`, empty when all is well. :func:`assert_none` raises on a list that
is not empty. They hold no state, start no thread, and may be used on histories from other sources.

Linearizability is decided exactly, key by key (a history is linearizable exactly when that of every key
is), by the search of Wing and Gong ("Testing and verifying concurrent objects", 1993) with Lowe's memory of
configurations that led nowhere ("Testing for linearizability", 2017). Three facts about registers keep it
fast without making it less exact:

- a read that fits the present state and may come next can always come next;
- a write whose outcome is unknown matters only right before something that observed what it wrote;
- one that nobody observed may be left out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from kvrep.testing.history import Operation

__all__ = [
    "Violation",
    "assert_none",
    "check_acknowledged_loss",
    "check_feed",
    "check_linearizable",
    "check_monotonic_reads",
    "check_one_primary",
    "check_read_your_writes",
    "check_sessions",
]

STEPS_MAX = 2_000_000
_FOREVER = float("inf")
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken, with what shows it."""

    check: str
    """Which checker found it."""
    message: str
    key: bytes | None = None
    operations: tuple[Operation, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"{self.check}: {self.message}", *(f"    {o}" for o in self.operations[:_SHOWN])]
        if len(self.operations) > _SHOWN:
            lines.append(f"    … and {len(self.operations) - _SHOWN} more")
        return "\n".join(lines)


def assert_none(violations: Collection[Violation]) -> None:
    """Raise ``AssertionError`` with every violation in its text, if there is one."""
    if violations:
        raise AssertionError("\n".join(str(v) for v in violations))


def _by_key(history: Iterable[Operation]) -> dict[bytes, list[Operation]]:
    keys: dict[bytes, list[Operation]] = defaultdict(list)
    for operation in history:
        if (operation.returned is None) != (operation.result == "unknown"):
            raise ValueError(f"an operation has returned exactly when its outcome is known: {operation}")
        keys[operation.key].append(operation)
    return keys


# -- linearizability -------------------------------------------------------------------------------


def check_linearizable(
    history: Iterable[Operation],
    *,
    initial: Mapping[bytes, bytes] | None = None,
    steps_max: int = STEPS_MAX,
) -> list[Violation]:
    """Is there, for every key, one order of all calls that respects real time and explains every answer?

    ``initial`` holds what was there before. Reads marked ``lagging`` promise less and are left out. A search
    that takes more than ``steps_max`` steps for a key is reported, too: what could not be checked has failed.
    """
    start = initial or {}
    violations = []
    for key, operations in _by_key(history).items():
        violation = _Search(key, operations, start.get(key), steps_max).run()
        if violation is not None:
            violations.append(violation)
    return violations


@dataclass(slots=True)
class _Frame:
    """A configuration on the way down: which known calls are in order, which unknown ones took effect."""

    low: int
    """All known calls before this one are in order."""
    mask: int
    """Bit i: known call ``low + i`` is in order."""
    used: int
    """Bit i: unknown call i took effect."""
    value: bytes | None
    depth: int
    moves: Iterator[tuple[int, int, bytes | None]]
    """(known call, unknown calls that take effect before it, value afterwards)."""


class _Search:
    def __init__(
        self, key: bytes, operations: list[Operation], initial: bytes | None, steps_max: int
    ) -> None:
        self._key = key
        self._initial = initial
        self._steps_max = steps_max
        order = sorted(operations, key=lambda o: o.invoked)
        self._known = [o for o in order if o.result == "done" and not (o.action == "get" and o.lagging)]
        unknown = [o for o in order if o.result == "unknown" and o.action != "get"]
        self._observed = {o.value for o in self._known if o.action == "get"}
        self._observed |= {o.expected for o in [*self._known, *unknown] if o.action == "cas"}
        self._unknown = self._relevant(unknown)
        self._ends = [o.returned if o.returned is not None else _FOREVER for o in self._known]

    def _relevant(self, unknown: list[Operation]) -> list[Operation]:
        """Those whose effect somebody may have observed."""
        if any(o.action == "cas" and not o.succeeded for o in self._known):
            return unknown
        return [o for o in unknown if o.value in self._observed]

    def run(self) -> Violation | None:
        """Depth first, without recursion; ``None`` when an order was found."""
        seen: set[tuple[int, int, int, bytes | None]] = set()
        stack = [self._frame(0, 0, 0, self._initial, 0)]
        best, best_order = stack[0], [0] * 0
        order: list[int] = []
        steps = 0
        while stack:
            top = stack[-1]
            if top.low == len(self._known):
                return None
            move = next(top.moves, None)
            if move is None:
                stack.pop()
                if order:
                    order.pop()
                continue
            steps += 1
            if steps > self._steps_max:
                return self._violation(f"no answer within {self._steps_max} steps", best, best_order)
            index, unknowns, value = move
            low, mask = self._with(top.low, top.mask, index)
            state = (low, mask, top.used | unknowns, value)
            if state in seen:
                continue
            seen.add(state)
            order.append(index)
            frame = self._frame(*state, top.depth + 1)
            if frame.depth > best.depth:
                best, best_order = frame, order[-4:]
            stack.append(frame)
        return self._violation("no order of these calls explains what they returned", best, best_order)

    def _violation(self, message: str, best: _Frame, before: list[int]) -> Violation:
        pending = [self._known[i] for i in self._pending(best.low, best.mask)]
        return Violation(
            "linearizability",
            f"key {self._key!r}: {message}; the value may be {best.value!r} after {best.depth} of"
            f" {len(self._known)} calls, of which the last {len(before)} are shown first",
            self._key,
            (*(self._known[i] for i in before), *pending, *self._unknown),
        )

    def _frame(self, low: int, mask: int, used: int, value: bytes | None, depth: int) -> _Frame:
        return _Frame(low, mask, used, value, depth, self._moves(low, mask, used, value))

    @staticmethod
    def _with(low: int, mask: int, index: int) -> tuple[int, int]:
        mask |= 1 << (index - low)
        while mask & 1:
            mask >>= 1
            low += 1
        return low, mask

    def _pending(self, low: int, mask: int) -> list[int]:
        """Known calls that may come next: invoked before any that is not in order has returned."""
        first_end = _FOREVER
        found = []
        for index in range(low, len(self._known)):
            if self._known[index].invoked > first_end:
                break
            if not mask >> (index - low) & 1:
                found.append(index)
                first_end = min(first_end, self._ends[index])
        return [i for i in found if self._known[i].invoked <= first_end]

    def _moves(
        self, low: int, mask: int, used: int, value: bytes | None
    ) -> Iterator[tuple[int, int, bytes | None]]:
        pending = self._pending(low, mask)
        for index in pending:
            if self._known[index].action == "get" and self._known[index].value == value:
                yield index, 0, value
                return  # it can always come next: no other choice can do better
        for index in pending:
            operation = self._known[index]
            if operation.action != "get" and _accepts(operation, value):
                yield index, 0, _after(operation, value)
        yield from self._moves_with_unknown(pending, used, value)

    def _moves_with_unknown(
        self, pending: list[int], used: int, value: bytes | None
    ) -> Iterator[tuple[int, int, bytes | None]]:
        if not self._unknown:
            return
        first_end = min((self._ends[i] for i in pending), default=_FOREVER)
        count = bisect_right(self._unknown, first_end, key=lambda o: o.invoked)
        for index in pending:
            operation = self._known[index]
            if operation.action in ("put", "delete") or _accepts(operation, value):
                continue  # nothing need happen right before it

            def accepts(state: bytes | None, operation: Operation = operation) -> bool:
                return _accepts(operation, state)

            for unknowns, state in self._reach(accepts, used, value, count):
                yield index, unknowns, _after(operation, state)

    def _reach(
        self, wanted: Callable[[bytes | None], bool], used: int, value: bytes | None, count: int
    ) -> Iterator[tuple[int, bytes | None]]:
        """Ways to a wanted state through unknown calls, the last of which makes it."""
        for i in range(count):
            operation = self._unknown[i]
            if used >> i & 1 or not wanted(operation.value):
                continue
            if operation.action != "cas" or operation.expected == value:
                yield 1 << i, operation.value
                if operation.action != "cas" and operation.value not in self._observed:
                    return  # it is good for nothing else, so no other choice can do better
            if operation.action == "cas":
                expected = operation.expected
                ways = self._reach(lambda s, e=expected: s == e, used | 1 << i, value, count)  # type: ignore[misc]
                for unknowns, _ in ways:
                    yield unknowns | 1 << i, operation.value


def _accepts(operation: Operation, state: bytes | None) -> bool:
    """Whether a known call can have answered what it did in this state."""
    if operation.action == "get":
        return operation.value == state
    if operation.action == "cas":
        return (operation.expected == state) == operation.succeeded
    return True


def _after(operation: Operation, state: bytes | None) -> bytes | None:
    if operation.action == "get" or (operation.action == "cas" and not operation.succeeded):
        return state
    return operation.value


# -- acknowledged loss -----------------------------------------------------------------------------


def check_acknowledged_loss(
    history: Iterable[Operation],
    final: Mapping[bytes, bytes],
    *,
    initial: Mapping[bytes, bytes] | None = None,
) -> list[Violation]:
    """Does ``final``, what a node holds after everything ended, contain every write that returned?

    The last word on a key must be that of a write that no acknowledged write came after: by real time, or,
    where both are known, by position. Keys of ``final`` that nobody wrote are reported as well.
    """
    start = initial or {}
    keys = _by_key(history)
    violations = []
    for key in sorted({*keys, *final, *start}):
        violation = _lost(key, keys.get(key, []), final.get(key), start.get(key))
        if violation is not None:
            violations.append(violation)
    return violations


def _lost(
    key: bytes, operations: list[Operation], final: bytes | None, initial: bytes | None
) -> Violation | None:
    writes = [o for o in operations if o.writes]
    done = [o for o in writes if o.result == "done"]
    if not done and final == initial:
        return None
    last = [o for o in writes if not any(_before(o, other) for other in done)]
    if any(o.value == final for o in last):
        return None
    lost = [o for o in last if o.result == "done"] or last
    if lost and any(o.result == "done" for o in lost):
        message = f"key {key!r}: an acknowledged write is missing; found {final!r}"
    else:
        message = f"key {key!r}: found {final!r}, which nobody wrote"
    return Violation("acknowledged loss", message, key, tuple(lost))


def _before(first: Operation, second: Operation) -> bool:
    """Whether it is certain that ``first`` took effect before ``second``, if both did."""
    if first is second:
        return False
    if first.position is not None and second.position is not None and first.position != second.position:
        return first.position < second.position
    return first.returned is not None and first.returned < second.invoked


# -- epochs ------------------------------------------------------------------------------------------


def check_one_primary(history: Iterable[Operation]) -> list[Violation]:
    """Were all writes of an epoch acknowledged by the same node?

    Looks at writes that are done and name their node and position. Those that were forwarded name another node
    than the one that decided, and do not belong here.
    """
    first: dict[int, Operation] = {}
    violations = []
    for operation in history:
        position = operation.position
        if operation.result != "done" or position is None or not operation.node:
            continue
        other = first.setdefault(position.epoch, operation)
        if other.node != operation.node:
            message = f"two nodes acknowledged writes in epoch {position.epoch}"
            violations.append(Violation("one primary", message, None, (other, operation)))
    return violations


# -- sessions --------------------------------------------------------------------------------------


def check_sessions(
    history: Iterable[Operation], *, initial: Mapping[bytes, bytes] | None = None
) -> list[Violation]:
    """Read your writes and monotonic reads, of every client."""
    operations = list(history)
    return check_read_your_writes(operations, initial=initial) + check_monotonic_reads(
        operations, initial=initial
    )


class _Writers:
    """Of one key: which writes a read can have seen the result of."""

    def __init__(self, operations: list[Operation], initial: bytes | None) -> None:
        self.initial = initial
        self._by_value: dict[bytes | None, list[Operation]] = defaultdict(list)
        for operation in operations:
            if operation.writes:
                self._by_value[operation.value].append(operation)

    def of(self, read: Operation) -> tuple[list[Operation], bool]:
        """(writes that ``read`` may have seen, whether it may have seen what was there before all)."""
        end = read.returned if read.returned is not None else _FOREVER
        found = [w for w in self._by_value.get(read.value, ()) if w.invoked < end]
        return found, read.value == self.initial


def check_read_your_writes(
    history: Iterable[Operation], *, initial: Mapping[bytes, bytes] | None = None
) -> list[Violation]:
    """After a client's write returned, does the same client ever read something older?

    Older means: certain to come before it, by real time or by position. What cannot be decided passes.
    """
    start = initial or {}
    violations = []
    for key, operations in _by_key(history).items():
        writers = _Writers(operations, start.get(key))
        for session in _sessions(operations):
            own: Operation | None = None
            for operation in session:
                if operation.writes and operation.result == "done":
                    own = operation
                elif operation.action == "get" and operation.result == "done" and own is not None:
                    seen, _ = writers.of(operation)
                    if all(_before(w, own) for w in seen):
                        violations.append(
                            Violation(
                                "read your writes",
                                f"key {key!r}: {operation.client} read what was there before its own write",
                                key,
                                (own, operation, *seen),
                            )
                        )
    return violations


def check_monotonic_reads(
    history: Iterable[Operation], *, initial: Mapping[bytes, bytes] | None = None
) -> list[Violation]:
    """Does a client ever read something older than it has read before?

    Older means: certain to come before it, by real time or by position; or a value that only one write can
    have made and that another value has replaced since. What cannot be decided passes.
    """
    start = initial or {}
    violations = []
    for key, operations in _by_key(history).items():
        writers = _Writers(operations, start.get(key))
        for session in _sessions(operations):
            reads = [o for o in session if o.action == "get" and o.result == "done"]
            pair = _backwards(reads, writers)
            if pair is not None:
                first, second = pair
                message = f"key {key!r}: {first.client} read {second.value!r} after the newer {first.value!r}"
                violations.append(Violation("monotonic reads", message, key, pair))
    return violations


def _sessions(operations: list[Operation]) -> list[list[Operation]]:
    sessions: dict[str, list[Operation]] = defaultdict(list)
    for operation in sorted(operations, key=lambda o: o.invoked):
        sessions[operation.client].append(operation)
    return list(sessions.values())


def _backwards(reads: list[Operation], writers: _Writers) -> tuple[Operation, Operation] | None:
    """The first two reads of which the second shows something older."""
    replaced: dict[bytes | None, Operation] = {}
    for first, second in pairwise(reads):
        if first.value == second.value:
            continue
        sources, was_initial = writers.of(first)
        if len(sources) + was_initial == 1:
            replaced[first.value] = second
        newer, older_initial = writers.of(second)
        if second.value in replaced and len(newer) + older_initial == 1:
            return replaced[second.value], second
        if was_initial or not sources:
            continue
        if older_initial and not newer:
            return first, second
        if newer and not older_initial and all(_before(n, s) for n in newer for s in sources):
            return first, second
    return None


# -- feeds -----------------------------------------------------------------------------------------


def check_feed(
    received: Iterable[int],
    *,
    after: int = 0,
    last: int | None = None,
    expected: Iterable[int] | None = None,
    repeats: bool = False,
) -> list[Violation]:
    """Did a feed deliver every record, in order, without gap and without repeat?

    ``received`` are offsets or indices as they came. They must be ``after + 1``, ``after + 2``, … (through
    ``last``, if given), or exactly ``expected``, if given. With ``repeats`` the feed is at-least-once: it may
    go back to something it has delivered, and from there go on without a gap.
    """
    wanted = None if expected is None else list(expected)
    violations = []
    at = 0  # how many of what is wanted have been delivered without a gap
    places = {} if wanted is None else {offset: i for i, offset in enumerate(wanted)}
    highest = 0
    for number, offset in enumerate(received):
        place = offset - after - 1 if wanted is None else places.get(offset, -1)
        if place < 0:
            violations.append(_feed(f"delivery {number}: {offset} was not to be delivered"))
            continue
        if place < at:
            if not repeats:
                violations.append(_feed(f"delivery {number}: {offset} came again, or too late"))
                continue
        elif place > at:
            first = at + after + 1 if wanted is None else wanted[at] if at < len(wanted) else None
            violations.append(_feed(f"delivery {number}: {offset} came where {first} was due"))
        at = place + 1
        highest = max(highest, at)
    end = (last - after if last is not None else highest) if wanted is None else len(wanted)
    if highest < end:
        first = highest + after + 1 if wanted is None else wanted[highest]
        violations.append(_feed(f"the end is missing, from {first} on"))
    if wanted is None and last is not None and highest > end:
        violations.append(_feed(f"it went on beyond {last}"))
    return violations


def _feed(message: str) -> Violation:
    return Violation("feed", message)
