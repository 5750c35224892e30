"""What clients did and what they were told, in one order: the input of :mod:`kvrep.testing.checkers`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kvrep.model.position import Position

__all__ = ["FINISHED", "Action", "Call", "History", "Operation", "Result"]

Action = Literal["get", "put", "delete", "cas"]
Result = Literal["done", "unknown", "refused"]
FINISHED: frozenset[str] = frozenset(("done", "refused"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call of one client on one key, with what is known of its outcome.

    ``invoked`` and ``returned`` are readings of one clock that all clients share (any unit; the
    :class:`History` counts events): what returned before another was invoked happened before it.
    """

    client: str
    """The session: one client makes one call at a time."""
    action: Action
    key: bytes
    value: bytes | None = None
    """What a put or a cas writes, or what a get read (``None``: missing). A delete has ``None``."""
    expected: bytes | None = None
    """What a cas compares with; ``None``: that the key is missing."""
    succeeded: bool = True
    """Whether a finished cas found what it expected, and so wrote."""
    invoked: float
    returned: float | None = None
    """``None`` while the outcome is unknown: the call may take effect at any later time, or never."""
    result: Result = "done"
    position: Position | None = None
    """Of a write that is done: where it is in the log."""
    node: str = ""
    """Which node was asked."""
    lagging: bool = False
    """A get from a node that may be behind: promised to be some earlier state, not the newest."""

    @property
    def writes(self) -> bool:
        """Whether it may have changed its key."""
        if self.action == "get" or self.result == "refused":
            return False
        return self.succeeded or self.result == "unknown"

    def __str__(self) -> str:
        what = f"{self.client} {self.action}({self.key!r}"
        if self.action == "cas":
            what += f", {self.expected!r} -> {self.value!r}"
        elif self.action == "put":
            what += f", {self.value!r}"
        what += ")"
        if self.result != "done":
            what += f" {self.result}"
        elif self.action == "get":
            what += f" = {self.value!r}"
        elif self.action == "cas":
            what += f" = {self.succeeded}"
        end = "" if self.returned is None else f"{self.returned:g}"
        where = f" at {self.position}" if self.position is not None else ""
        asked = f" on {self.node}" if self.node else ""
        return f"[{self.invoked:g}..{end}] {what}{where}{asked}"


class Call:
    """An operation under way. Say how it ended with one of the methods; without one it stays unknown."""

    __slots__ = ("_history", "_operation", "ended")

    def __init__(self, history: History, operation: Operation) -> None:
        self._history = history
        self._operation = operation
        self.ended = False

    def done(
        self, *, value: bytes | None = None, succeeded: bool = True, position: Position | None = None
    ) -> None:
        """It returned: ``value`` is what a get read, ``position`` where a write is."""
        self._end("done", value, succeeded, position)

    def refused(self) -> None:
        """It raised before anything was logged."""
        self._end("refused", None, False, None)

    def unknown(self, position: Position | None = None) -> None:
        """It may or may not take effect, now or later."""
        self._end("unknown", None, True, position)

    def _end(self, result: Result, value: bytes | None, succeeded: bool, position: Position | None) -> None:
        if self.ended:
            raise RuntimeError("the end of this call has been recorded already")
        self.ended = True
        self._history._ended(self._operation, result, value, succeeded, position)


class History:
    """Collects operations from any number of threads; its clock counts invocations and returns."""

    def __init__(self) -> None:
        # Protects the clock, the lists and what they hold.
        self._lock = threading.Lock()
        self._clock = 0
        self._finished: list[Operation] = []
        self._open: dict[int, Operation] = {}

    def begin(
        self,
        client: str,
        action: Action,
        key: bytes,
        value: bytes | None = None,
        *,
        expected: bytes | None = None,
        node: str = "",
        lagging: bool = False,
    ) -> Call:
        """To be called right before the real call; the :class:`Call` takes its outcome."""
        with self._lock:
            self._clock += 1
            operation = Operation(
                client=client, action=action, key=key, value=value, expected=expected,
                invoked=self._clock, result="unknown", node=node, lagging=lagging,
            )  # fmt: skip
            self._open[id(operation)] = operation
        return Call(self, operation)

    def _ended(
        self,
        begun: Operation,
        result: Result,
        value: bytes | None,
        succeeded: bool,
        position: Position | None,
    ) -> None:
        with self._lock:
            self._clock += 1
            del self._open[id(begun)]
            self._finished.append(
                Operation(
                    client=begun.client,
                    action=begun.action,
                    key=begun.key,
                    value=value if begun.action == "get" else begun.value,
                    expected=begun.expected,
                    succeeded=succeeded,
                    invoked=begun.invoked,
                    returned=self._clock if result in FINISHED else None,
                    result=result,
                    position=position,
                    node=begun.node,
                    lagging=begun.lagging,
                )
            )

    @property
    def operations(self) -> list[Operation]:
        """Everything so far, by invocation; what is still under way counts as unknown."""
        with self._lock:
            return sorted([*self._finished, *self._open.values()], key=lambda o: o.invoked)

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.operations)

    def __len__(self) -> int:
        with self._lock:
            return len(self._finished) + len(self._open)
