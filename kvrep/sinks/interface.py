"""What a secondary system has to be able to do, and what an agent keeps there of itself.

A sink works in transactions of its own: :meth:`Sink.apply`, :meth:`Sink.stage`, :meth:`Sink.swap` and
:meth:`Sink.bury` take effect together at :meth:`Sink.commit`, which also stores the :class:`Place`: how far the
copy has got. Because rows and place move in one step, whatever happens in between, a change takes effect exactly
once. One thread uses a sink at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from types import TracebackType

from kvrep.feeds.rows import Rows
from kvrep.model.change import Change, Sequence
from kvrep.model.event import Event
from kvrep.model.position import Position
from kvrep.model.record import Op

__all__ = ["NOTHING", "DeadLetter", "Place", "Sink", "ops_of"]

NOTHING: Sequence = (0, 0, 0)
"""Before every change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How far a secondary has got. The empty one: nothing has arrived yet."""

    lineage: str = ""
    """The history that the copy belongs to."""
    sequence: Sequence = NOTHING
    """(epoch, offset, index) of the last change in the copy; all before it are in it, and nothing after it."""
    time_us: int = 0
    """When that change was committed, by the primary's wall clock, in microseconds; 0: not known."""
    token: str = ""
    """Where the source goes on, in the source's own words."""
    staging: bool = False
    """Whether a snapshot is arriving that will replace the copy."""
    whole: bool = False
    """Whether the copy is consistent: all of the source as of :attr:`position`, no more and no less."""

    @property
    def position(self) -> Position:
        """The record of the last change."""
        return Position(self.sequence[0], self.sequence[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An event that could not be applied, with the reason. ``number`` names it within its sink."""

    number: int = 0
    position: str = ""
    """``epoch:offset:index`` as far as it could be read."""
    keyspace: str = ""
    key: bytes = b""
    value: bytes | None = None
    raw: bytes = b""
    """The message as it came, where it could not even be read; else empty."""
    reason: str = ""
    time_us: int = 0
    """When it was put aside."""

    @property
    def readable(self) -> bool:
        """Whether it is a change that can be tried again."""
        return bool(self.keyspace)


def ops_of(changes: SequenceOf[Change | Event]) -> SequenceOf[Op]:
    """What changes do."""
    return changes.ops if isinstance(changes, Rows) else [(c.keyspace, c.key, c.value) for c in changes]


class Sink(ABC):
    """A secondary system that keeps a copy. ``url`` names it without secrets."""

    url: str = ""
    linger_s: float = 0.0
    """How long an agent gathers changes for a commit that is not full: for those where a commit is dear."""
    batch_changes: int = 0
    """How many changes fill a commit at the least, whatever the agent was told; and how many bytes."""
    batch_bytes: int = 0
    snapshot_batches: int = 16
    """A snapshot goes in larger pieces, since nobody waits for single rows of it: so many times what else fills a
    commit, and ``snapshot_bytes`` at the least."""
    snapshot_bytes: int = 4 << 20

    @property
    def own_lineage(self) -> str:
        """Of the store that this secondary is itself, once open; empty for other systems."""
        return ""

    @abstractmethod
    def open(self) -> Place:
        """Connect, make what is missing, and return the stored place.

        :class:`PeerUnavailable`: no answer now, a later try may succeed. :class:`AuthenticationFailed`,
        :class:`PermissionDenied`, :class:`ConfigurationMismatch`: somebody has to fix what the text names.
        :class:`StoreInUse`: another agent writes there.
        """

    def look(self) -> Place:
        """Like :meth:`open`, for those who look after a copy: it makes nothing. :class:`NotAStore` where none is."""
        return self.open()

    @abstractmethod
    def apply(self, ops: SequenceOf[Op]) -> None:
        """Put and delete in order. :class:`RejectedChange` names one that cannot be stored; none is then."""

    @abstractmethod
    def stage(self, ops: SequenceOf[Op]) -> None:
        """Like :meth:`apply`, on the snapshot that replaces the copy at :meth:`swap`."""

    def apply_changes(self, changes: SequenceOf[Change | Event]) -> None:
        """:meth:`apply`, with all that is known of the changes, for sinks that keep more of it."""
        self.apply(ops_of(changes))

    def stage_changes(self, changes: SequenceOf[Change | Event]) -> None:
        """:meth:`stage` in the same way."""
        self.stage(ops_of(changes))

    @abstractmethod
    def swap(self) -> None:
        """What was staged becomes the copy; what was there before is gone."""

    @abstractmethod
    def unstage(self) -> None:
        """Forget what was staged: the snapshot begins anew."""

    @abstractmethod
    def commit(self, place: Place) -> None:
        """All since the last commit, and ``place``, take effect together and durably.

        When it raises :class:`PeerUnavailable` the outcome is unknown: :meth:`open` tells.
        """

    @abstractmethod
    def rollback(self) -> None:
        """Forget all since the last commit."""

    @abstractmethod
    def bury(self, letter: DeadLetter) -> None:
        """Put an event aside, at the next commit. The sink numbers it."""

    @abstractmethod
    def forget(self, numbers: Iterable[int]) -> None:
        """Remove dead letters, at the next commit."""

    @abstractmethod
    def dead_letters(self) -> list[DeadLetter]:
        """What was put aside, oldest first."""

    @property
    def behind(self) -> bool:
        """Whether something that follows from commits is not done yet."""
        return False

    def tend(self, give_up: Callable[[], bool] = lambda: False) -> None:  # noqa: B027 (most have nothing to do)
        """Do what follows from commits but is no part of them, if it is time for that.

        Called between commits. Returns soon once ``give_up`` is true. Raises what :meth:`commit` does.
        """

    def hold(self) -> Place:
        """The place; until :meth:`rollback` reads show one moment, that of this place. Without it: only while
        nobody writes."""
        return self.open()

    @abstractmethod
    def keyspaces(self) -> list[str]:
        """The keyspaces of which there is a copy, sorted."""

    @abstractmethod
    def scan(self, keyspace: str) -> Iterator[tuple[object, object]]:
        """The rows of a keyspace, in key order where it has one: the value as bytes, or a tuple of columns where
        it is mapped."""

    @abstractmethod
    def close(self) -> None:
        """Let go; what was not committed is forgotten. Idempotent."""

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
