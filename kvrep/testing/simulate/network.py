"""A network that loses, delays, duplicates and reorders, and that can be cut in one direction only.

Two things travel over it, as in gRPC:

* **Calls** are independent of each other: a request or its answer may be lost (then the caller's deadline
  ends it), overtake others, or be carried out twice (the client tries again when a connection breaks).
* **Streams** keep their order and lose nothing while they last, like TCP: what meets a cut or a loss is
  late, with all that follows it. They end as connections do: the other side learns of it if the path is
  open, behind what was sent before (closed) or instead of it (broken); otherwise only its own deadlines tell.
  An old stream may still deliver while a newer one of the same two nodes is open.

A process that is paused receives later, one that is dead refuses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from kvrep.replication.election import WhyGone

if TYPE_CHECKING:
    from kvrep.replication.messages import Hello
    from kvrep.testing.simulate.clock import Time
    from kvrep.testing.simulate.node import Node

__all__ = ["CALL_TIMEOUT_S", "DELAY_S", "End", "Network", "Stream"]

RESEND_S = 0.2
"""How long TCP waits before it sends again."""
CALL_TIMEOUT_S = 0.4
DELAY_S = 0.002
"""The largest delay of a network that works."""


class End(Protocol):
    """Who sits at one end of a stream."""

    def on_message(self, message: Any) -> None: ...

    def on_end(self, why: WhyGone, /) -> None:
        """The stream is over; not called for an end that has ended it itself."""


class _Ended:
    __slots__ = ("why",)

    def __init__(self, why: WhyGone) -> None:
        self.why = why


class _Pipe:
    """One direction of a stream."""

    __slots__ = ("busy", "end", "network", "queue", "source", "target", "target_life")

    def __init__(self, network: Network, source: Node, target: Node, end: End | None) -> None:
        self.network = network
        self.source = source
        self.target = target
        self.target_life = target.life
        self.end = end
        """Who receives; ``None`` from when on nobody does."""
        self.queue: deque[Any] = deque()
        self.busy = False

    def put(self, message: Any) -> None:
        self.queue.append(message)
        if not self.busy:
            self.busy = True
            self.network.time.after(self.network.latency(), self._arrive)

    def _arrive(self) -> None:
        target, network = self.target, self.network
        end = self.end
        if end is None or target.life != self.target_life:
            self.queue.clear()
            return
        if not network.passes(self.source.name, target.name):
            network.time.after(RESEND_S, self._arrive)
            return
        if target.paused:
            target.held.append(self._arrive)
            return
        message = self.queue.popleft()  # there is one: a queue is only cleared for a last word
        if type(message) is _Ended:
            self.end = None
            end.on_end(message.why)
        else:
            end.on_message(message)
        if self.queue:
            network.time.after(network.chance.random() * 0.0003, self._arrive)
        else:
            self.busy = False


class Stream:
    """One connection of a follower (who opens it) to a primary."""

    __slots__ = ("_down", "_follower", "_hello", "_network", "_primary", "_up")

    def __init__(self, network: Network, follower: Node, primary: Node, end: End, hello: Hello) -> None:
        self._hello = hello
        self._network = network
        self._follower = follower
        self._primary = primary
        self._up = _Pipe(network, follower, primary, None)
        self._down = _Pipe(network, primary, follower, end)

    def reach(self) -> None:
        """The first packet is on its way."""
        network, primary = self._network, self._primary
        if self._down.end is None:
            return
        if not network.passes(self._follower.name, primary.name):
            network.time.after(RESEND_S, self.reach)
        elif not primary.up:
            self._down.put(_Ended(WhyGone.REFUSED))
        else:
            primary.run(self._reached)

    def _reached(self) -> None:
        if self._down.end is not None:
            self._primary.on_stream(self, self._hello)

    def accept(self, end: End) -> None:
        """The primary's end."""
        self._up.end = end
        self._up.target_life = self._primary.life

    def to_primary(self, message: Any) -> None:
        if self._down.end is not None:
            self._up.put(message)

    def to_follower(self, message: Any) -> None:
        if self._up.end is not None:
            self._down.put(message)

    def end_by_follower(self) -> None:
        """It receives nothing more; the primary learns that the stream is broken, if the path is open."""
        self._end(self._down, self._up, broken=True)

    def end_by_primary(self, *, broken: bool) -> None:
        """Behind what was sent, or instead of it."""
        self._end(self._up, self._down, broken=broken)

    @staticmethod
    def _end(mine: _Pipe, theirs: _Pipe, *, broken: bool) -> None:
        if mine.end is None:
            return
        mine.end = None
        if broken:
            theirs.queue.clear()
        theirs.put(_Ended(WhyGone.BROKEN))


class Network:
    """Between all nodes; ``blocked`` holds (from, to)."""

    def __init__(self, time: Time, chance: Random) -> None:
        self.time = time
        self.chance = chance
        self.blocked: set[tuple[str, str]] = set()
        self.loss = 0.0
        """Of every message."""
        self.twice = 0.0
        """Of every call: how often it is carried out twice."""
        self.delay_s = DELAY_S

    def latency(self) -> float:
        return 0.0002 + self.chance.random() * self.delay_s

    def passes(self, source: str, target: str) -> bool:
        if (source, target) in self.blocked:
            return False
        return not self.loss or self.chance.random() >= self.loss

    def call(
        self,
        source: Node,
        target: Node,
        serve: Callable[[Callable[[Any], None]], None],
        done: Callable[[Any], None],
        failed: Callable[[WhyGone], None],
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        """``serve`` runs on the target and gives its answer to the function it gets, at once or later, or
        never. ``done`` or ``failed`` runs on the source, once."""
        _Call(self, source, target, serve, done, failed).begin(timeout_s)

    def open(self, follower: Node, primary: Node, end: End, hello: Hello) -> Stream:
        """Open a stream; ``hello`` is its first message. ``end`` hears of a refusal, or nothing for ever."""
        stream = Stream(self, follower, primary, end, hello)
        self.time.after(self.latency(), stream.reach)
        return stream


class _Call:
    __slots__ = ("_done", "_failed", "_life", "_network", "_open", "_serve", "_source", "_target")

    def __init__(
        self,
        network: Network,
        source: Node,
        target: Node,
        serve: Callable[[Callable[[Any], None]], None],
        done: Callable[[Any], None],
        failed: Callable[[WhyGone], None],
    ) -> None:
        self._network = network
        self._source = source
        self._life = source.life
        self._target = target
        self._serve = serve
        self._done = done
        self._failed = failed
        self._open = True

    def begin(self, timeout_s: float) -> None:
        network, source = self._network, self._source
        source.after(timeout_s, lambda: self._end(self._failed, WhyGone.SILENT))
        for _ in range(2 if network.twice and network.chance.random() < network.twice else 1):
            if network.passes(source.name, self._target.name):
                network.time.after(network.latency(), self._arrive)

    def _arrive(self) -> None:
        target = self._target
        if target.up:
            target.run(lambda: self._serve(self._answer))
        else:
            self._back(self._failed, WhyGone.REFUSED)

    def _answer(self, answer: Any) -> None:
        self._back(self._done, answer)

    def _back(self, do: Callable[[Any], None], what: Any) -> None:
        network, source = self._network, self._source
        if network.passes(self._target.name, source.name):
            network.time.after(network.latency(), lambda: self._deliver(do, what))

    def _deliver(self, do: Callable[[Any], None], what: Any) -> None:
        if self._open and self._source.life == self._life:
            self._source.run(lambda: self._end(do, what))

    def _end(self, do: Callable[[Any], None], what: Any) -> None:
        if self._open:
            self._open = False
            do(what)
