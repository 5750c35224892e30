"""Clients that write and read without end, and the checks of what they were told.

Keys live in generations of a few seconds: when clients move on to the next one, the history of the last is
complete, is checked, and its keys are deleted. So a soak needs no more memory and disk after a day than after
a minute, and tells of a broken promise within seconds.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from kvrep.errors import Error, RefusedError, RolledBack
from kvrep.model.position import Position
from kvrep.testing.checkers import (
    Violation,
    check_acknowledged_loss,
    check_linearizable,
    check_monotonic_reads,
    check_one_primary,
    check_read_your_writes,
)
from kvrep.testing.cluster import Cluster
from kvrep.testing.embedded import EmbeddedNode
from kvrep.testing.history import Action, Call, History

__all__ = ["Generation", "Load", "damaged", "token_of", "valued"]

T = TypeVar("T")

CALL_S = 2.0
"""What a client waits for a node that stands still."""
WRITE_S = 1.0
GENERATION_CALLS = 3000
GENERATION_S = 10.0
KEYS = 64
PAIRS = 8
PAUSE_S = 0.002
LOOK_S = 0.05
GAP_S = 0.1
_WEIGHTS: dict[str, int] = {"put": 36, "get": 20, "swap": 14, "batch": 10, "stale": 8, "delete": 6, "scan": 6}


def valued(token: bytes, size: int) -> bytes:
    """A value that proves itself: the token, a checksum of it, and filling up to ``size``."""
    head = b"%s %08x " % (token, zlib.crc32(token))
    return head + (token * (size // len(token) + 1))[: max(0, size - len(head))]


def token_of(value: bytes | None) -> bytes | None:
    """The token of a value, ``None`` of none; raises ``ValueError`` for one that nobody made."""
    if value is None:
        return None
    token, _, rest = value.partition(b" ")
    if not token or value != valued(token, len(value)) or not rest:
        raise ValueError("a value that nobody wrote")
    return token


def damaged(key: bytes, value: bytes | None, node: str) -> Violation:
    return Violation("values", f"key {key!r} on {node}: found {value!r:.120}, which nobody wrote", key)


class _AbandonedError(Exception):
    """Nobody waits for the checks any more."""


class Generation:
    """Keys that are in use for some seconds, and the history of the calls on them."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.prefix = b"g%06d/" % number
        self.keys = [self.prefix + b"key/%02d" % i for i in range(KEYS)]
        self.pairs = [self.prefix + b"pair/%d/" % i for i in range(PAIRS)]
        """Of each, ``a`` and ``b`` are only ever written together, and the same."""
        self.history = History()
        self.began_s = time.monotonic()
        self.calls = itertools.count()
        # Protects the next two.
        self._lock = threading.Lock()
        self._users = 0
        self._over = False

    @property
    def everything(self) -> list[bytes]:
        """All keys."""
        return [*self.keys, *(pair + end for pair in self.pairs for end in (b"a", b"b"))]

    @contextmanager
    def used(self) -> Iterator[bool]:
        """A call is under way; ``False`` if it came too late."""
        with self._lock:
            if self._over:
                late = True
            else:
                late, self._users = False, self._users + 1
        try:
            yield not late
        finally:
            if not late:
                with self._lock:
                    self._users -= 1

    def end(self) -> None:
        """No call begins any more."""
        with self._lock:
            self._over = True

    @property
    def idle(self) -> bool:
        """No call is under way any more."""
        with self._lock:
            return self._over and not self._users


class Load:
    """Threads named ``kvrep-soak-client-N`` and ``kvrep-soak-checker``. Any thread may ask for the counts."""

    def __init__(
        self, cluster: Cluster, *, clients: int, calls_per_s: float, seed: int, value_bytes_max: int = 2000
    ) -> None:
        self._cluster = cluster
        self._nodes: list[EmbeddedNode] = [n for n in cluster.nodes if isinstance(n, EmbeddedNode)]
        self._interval_s = clients / calls_per_s
        self._value_bytes_max = value_bytes_max
        self._stop = threading.Event()
        self._guess = self._nodes[0]
        """Who acknowledged last."""
        self._counts = [Counter[str]() for _ in range(clients)]
        """Each is changed by one thread only."""
        self.violations: list[Violation] = []
        self.problems: list[BaseException] = []
        """What ended a thread of this load: a fault of the soak itself."""
        self.gaps: list[tuple[float, float]] = []
        """(from, to) of every time without an acknowledgement that was longer than :data:`GAP_S`."""
        # Protects the gaps and the time of the last acknowledgement.
        self._last_lock = threading.Lock()
        self._last_s = time.monotonic()
        self.epochs: set[int] = set()
        """In which writes were acknowledged."""
        self.checked = 0
        """Calls whose history was found to be in order, or not."""
        self._numbers = itertools.count(1)
        # Protects the next two: which generation is in use, and which wait to be checked.
        self._turn = threading.Lock()
        self._now = Generation(next(self._numbers))
        self._ended: deque[Generation] = deque()
        self._finish = threading.Event()
        self._abandoned = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._guarded,
                args=(lambda n=n: self._client(n, random.Random(seed * 1000 + n)),),
                name=f"kvrep-soak-client-{n}",
                daemon=True,
            )
            for n in range(clients)
        ]
        self._checker = threading.Thread(
            target=self._guarded, args=(self._check_all,), name="kvrep-soak-checker", daemon=True
        )

    def start(self) -> None:
        self._last_s = time.monotonic()
        for thread in (*self._threads, self._checker):
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the clients, and wait until everything is checked: for that the nodes must be up by now."""
        self._stop.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
        self._next(self._now)
        self._finish.set()
        self._checker.join(max(0.1, deadline - time.monotonic()))
        alive = [t.name for t in (*self._threads, self._checker) if t.is_alive()]
        self._abandoned.set()
        if alive:
            self._checker.join(CALL_S * 2)
            self.violations.append(Violation("soak", f"not at an end within {timeout_s:g} s: {alive}"))

    def acknowledged(self) -> None:
        """A write was acknowledged now."""
        now_s = time.monotonic()
        with self._last_lock:
            if now_s - self._last_s > GAP_S:
                self.gaps.append((self._last_s, now_s))
            self._last_s = max(self._last_s, now_s)

    def abandon(self) -> None:
        """End all threads without checking anything more."""
        self._stop.set()
        self._abandoned.set()
        for thread in (*self._threads, self._checker):
            if thread.is_alive():
                thread.join(2 * CALL_S)

    @property
    def counts(self) -> Counter[str]:
        """Calls so far, by outcome: ``acknowledged``, ``refused``, ``unknown``, ``read``."""
        total: Counter[str] = Counter()
        for counts in self._counts:
            total.update(dict(counts))
        return total

    @property
    def waiting(self) -> int:
        """Generations that are not checked yet, the one in use not counted."""
        return len(self._ended)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _AbandonedError:
            pass  # the nodes are gone, and stop() has said so
        except BaseException as error:
            self.problems.append(error)
            raise

    # -- clients -----------------------------------------------------------------------------------

    def _client(self, number: int, chance: random.Random) -> None:
        client = _Client(self, number, chance)
        due = time.monotonic() + chance.random() * self._interval_s
        while not self._stop.is_set():
            left = due - time.monotonic()
            if left > 0 and self._stop.wait(left):
                return
            due = max(due + self._interval_s, time.monotonic() - 10 * self._interval_s)
            generation = self._now
            with generation.used() as in_time:
                if in_time:
                    client.call(generation)
            age = time.monotonic() - generation.began_s
            if next(generation.calls) >= GENERATION_CALLS or age > GENERATION_S:
                self._next(generation)

    def _next(self, after: Generation) -> None:
        with self._turn:
            if self._now is after:
                self._now = Generation(next(self._numbers))
                after.end()
                self._ended.append(after)

    # -- checks ------------------------------------------------------------------------------------

    def _check_all(self) -> None:
        """The checker's thread: every generation that has ended, until :meth:`stop` says that no more come."""
        while True:
            last = self._finish.is_set()
            if self._ended and self._ended[0].idle:
                self._retire(self._ended[0])
                self._ended.popleft()
            elif (last and not self._ended) or self._abandoned.wait(LOOK_S):
                return

    def _retire(self, generation: Generation) -> None:
        """Read what is left, check all that was seen, and delete the keys."""
        final = self._final(generation)
        history = generation.history
        direct = [o for o in history if not o.lagging]
        self.violations += (
            check_linearizable(history)
            + check_acknowledged_loss(history, {k: v for k, v in final.items() if v is not None})
            + check_one_primary(history)
            + check_read_your_writes(direct)
            + check_monotonic_reads(history)
        )
        self.checked += len(history)
        self._insist(lambda node: node.batch([(key, None) for key in generation.everything]))

    def _final(self, generation: Generation) -> dict[bytes, bytes | None]:
        """Every key, read after everything that was acknowledged; goes into the history, too."""
        # All calls have ended, so what was acknowledged is below the position of a write made now.
        position = self._insist(lambda node: node.put(generation.prefix + b"end", b"end"))
        final: dict[bytes, bytes | None] = {}
        for key in generation.everything:
            call = generation.history.begin("checker", "get", key)
            value = self._insist(partial(self._at_least, key, position))
            try:
                final[key] = token_of(value)
            except ValueError:
                self.violations.append(damaged(key, value, "?"))
                call.refused()
            else:
                call.done(value=final[key])
        self._insist(lambda node: node.delete(generation.prefix + b"end"))
        return final

    @staticmethod
    def _at_least(key: bytes, position: Position, node: EmbeddedNode) -> bytes | None:
        value: bytes | None = node.get(key, at_least=position, within_s=CALL_S)
        return value

    def _insist(self, work: Callable[[EmbeddedNode], T]) -> T:
        """Do something at whoever takes it, again and again."""
        for node in itertools.chain([self._guess], itertools.cycle(self._nodes)):
            try:
                return work(node)
            except (Error, OSError):
                if self._abandoned.wait(5 * PAUSE_S):
                    break
        raise _AbandonedError


class _Client:
    """One client: one call at a time, recorded."""

    def __init__(self, load: Load, number: int, chance: random.Random) -> None:
        self._load = load
        self._name = f"client{number}"
        self._chance = chance
        self._counts = load._counts[number]
        self._values = itertools.count()
        self._known: dict[bytes, bytes | None] = {}
        """What this client believes its keys to hold: what a compare-and-set expects."""
        self._generation = 0
        self._node = load._guess
        """Who is believed to be primary."""

    def call(self, generation: Generation) -> None:
        """One call of some kind."""
        if generation.number != self._generation:
            self._generation, self._known = generation.number, {}
        (kind,) = self._chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
        getattr(self, f"_{kind}")(generation, self._node)

    def _value(self) -> bytes:
        size = int(2 ** self._chance.uniform(4, self._load._value_bytes_max.bit_length()))
        return valued(b"%s-%d" % (self._name.encode(), next(self._values)), size)

    def _put(self, generation: Generation, node: EmbeddedNode) -> None:
        key, value = self._chance.choice(generation.keys), self._value()
        call = self._begin(generation, "put", key, value, node)
        if self._write([call], node, lambda: node.put(key, value, timeout_s=WRITE_S, within_s=CALL_S)):
            self._known[key] = value

    def _delete(self, generation: Generation, node: EmbeddedNode) -> None:
        key = self._chance.choice(generation.keys)
        call = self._begin(generation, "delete", key, None, node)
        if self._write([call], node, lambda: node.delete(key, timeout_s=WRITE_S, within_s=CALL_S)):
            self._known[key] = None

    def _swap(self, generation: Generation, node: EmbeddedNode) -> None:
        key = self._chance.choice(list(self._known) or generation.keys)
        expected, value = self._known.get(key), self._value()
        call = self._begin(generation, "cas", key, value, node, expected=token_of(expected))

        def swap() -> Position | None:
            return node.compare_and_set(
                key, expected=expected, value=value, timeout_s=WRITE_S, within_s=CALL_S
            )

        if self._write([call], node, swap):
            self._known[key] = value
        else:
            self._known.pop(key, None)

    def _batch(self, generation: Generation, node: EmbeddedNode) -> None:
        pair, value = self._chance.choice(generation.pairs), self._value()
        calls = [self._begin(generation, "put", pair + end, value, node) for end in (b"a", b"b")]
        pairs = [(pair + b"a", value), (pair + b"b", value)]
        self._write(calls, node, lambda: node.batch(pairs, timeout_s=WRITE_S, within_s=CALL_S))

    def _get(self, generation: Generation, node: EmbeddedNode) -> None:
        """The newest value, of the primary or of a follower that asks it."""
        if self._chance.random() < 0.4:
            node = self._chance.choice(self._load._nodes)
        key = self._chance.choice(generation.everything)
        self._read(generation, node, key, consistency="linearizable", timeout_s=WRITE_S)

    def _stale(self, generation: Generation, node: EmbeddedNode) -> None:
        """From any node: some earlier state, never going back while the process lives."""
        del node
        self._read(generation, self._chance.choice(self._load._nodes), self._chance.choice(generation.keys))

    def _scan(self, generation: Generation, node: EmbeddedNode) -> None:
        """A scan shows one moment: both halves of a pair, in order."""
        node, pair = self._chance.choice(self._load._nodes), self._chance.choice(generation.pairs)
        try:
            found = node.ask("scan", CALL_S, prefix=pair)
            seen = {bytes(key): token_of(value) for key, value in found}
        except ValueError:
            self._load.violations.append(damaged(pair, None, node.name))
            return
        except (Error, OSError):
            self._counts["refused"] += 1
            return
        self._counts["read"] += 1
        if [key for key, _ in found] != sorted(seen) or len(set(seen.values())) > 1 or len(seen) == 1:
            self._load.violations.append(
                Violation("batches", f"{node.name} shows half of a batch, or out of order: {seen}", pair)
            )

    def _read(self, generation: Generation, node: EmbeddedNode, key: bytes, **options: Any) -> None:
        lagging = not options
        session = f"{self._name}@{node.name}#{node.pid}" if lagging else self._name
        call = generation.history.begin(session, "get", key, node=node.name, lagging=lagging)
        value: bytes | None = None
        try:
            value = node.get(key, within_s=CALL_S, **options)
            token = token_of(value)
        except ValueError:
            call.refused()
            self._load.violations.append(damaged(key, value, node.name))
        except (Error, OSError):
            call.refused()
            self._counts["refused"] += 1
            if not lagging:
                self._elsewhere()
        else:
            call.done(value=token)
            self._counts["read"] += 1

    def _begin(
        self,
        generation: Generation,
        action: Action,
        key: bytes,
        value: bytes | None,
        node: EmbeddedNode,
        *,
        expected: bytes | None = None,
    ) -> Call:
        return generation.history.begin(
            self._name, action, key, token_of(value), expected=expected, node=node.name
        )

    def _write(self, calls: list[Call], node: EmbeddedNode, write: Callable[[], Position | None]) -> bool:
        """Write, record what is known of the outcome, and tell whether it took effect for sure."""
        try:
            position = write()
        except (RefusedError, RolledBack):
            for call in calls:
                call.refused()
            self._counts["refused"] += 1
            self._elsewhere()
            return False
        except (Error, OSError) as error:
            for call in calls:
                call.unknown(getattr(error, "position", None))
            self._counts["unknown"] += 1
            self._elsewhere()
            return False
        except BaseException:
            for call in calls:
                call.unknown()
            raise
        if position is None:  # a primary that was replaced just now does not know better: it says nothing
            for call in calls:
                call.refused()
            return False
        for call in calls:
            call.done(position=position)
        node.acknowledged.clear()  # the history has it
        self._counts["acknowledged"] += 1
        self._load.acknowledged()
        self._load._guess = node
        self._load.epochs.add(position.epoch)
        return True

    def _elsewhere(self) -> None:
        """A call failed: try where somebody was heard last, or anywhere."""
        found = self._load._guess if self._chance.random() < 0.5 else self._chance.choice(self._load._nodes)
        self._node = found
        self._load._stop.wait(PAUSE_S)
