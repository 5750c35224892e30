"""Named feeds: the place of a reader, kept in the store itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

from kvrep.codecs import BYTES
from kvrep.errors import ClosedError, ConfigurationMismatch, Error, NoSuchFeed, RefusedError, RolledBack
from kvrep.feeds.changes import LOOK_UP_S, Changes, Held
from kvrep.feeds.reader import LogReader
from kvrep.feeds.selection import Selection
from kvrep.keyspace import Keyspace
from kvrep.model.change import Change
from kvrep.model.feed_state import FeedState, check_feed_name
from kvrep.model.position import ZERO, Position
from kvrep.model.record import FEEDS_KEYSPACE
from kvrep.model.token import Token
from kvrep.runtime.node import Node
from kvrep.transaction import Transaction

__all__ = ["Feed", "FeedInfo", "Feeds"]

ADVANCE_BYTES = 8 << 20
"""An idle feed that selects little moves its place on behind so much log, so that it holds none of it back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedInfo:
    """A named feed as this node sees it."""

    name: str
    position: Position
    """Everything through here was acked."""
    paused: bool
    in_snapshot: bool
    keyspaces: tuple[str, ...] | None
    prefix: bytes
    topics: tuple[str, ...] | None
    lag_records: int
    """Records of this node's log that it has not acked, those that it leaves out included."""
    lag_bytes: int
    lag_s: float
    """Age of the oldest of them, by wall clocks: see :attr:`kvrep.FollowerStatus.lag_s`."""
    held: bool
    """Whether the log that it still needs is here and kept; else the reader gets ``LogTrimmed``."""
    created_s: float
    acked_s: float
    """Wall clock of the last ack; 0: never."""
    token: str
    """Empty: it begins with a snapshot."""

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "position": str(self.position), "prefix": self.prefix.hex()}


class Feeds:
    """All named feeds of a store. Any thread."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._space: Keyspace[bytes] | None = None

    @property
    def space(self) -> Keyspace[bytes]:
        """Where the states are kept."""
        if self._space is None:
            self._space = Keyspace(self.node, FEEDS_KEYSPACE, BYTES)
        return self._space

    def get(self, name: str) -> FeedState | None:
        data = self.space.get(check_feed_name(name).encode())
        return None if data is None else FeedState.unpack(data)

    def need(self, name: str) -> FeedState:
        """:class:`NoSuchFeed` when there is none of that name."""
        state = self.get(name)
        if state is None:
            raise _no_feed(name)
        return state

    def create(self, name: str, state: FeedState) -> FeedState:
        """Store a new feed, unless somebody was faster; returns what there is. On the primary."""
        self.space.put_if_absent(name.encode(), state.pack())
        return self.get(name) or state

    def change(
        self, name: str, change: Callable[[FeedState], FeedState | None], *, wait: bool = True
    ) -> Position | None:
        """Replace the state of a feed by ``change(state)``, atomically; ``None`` there leaves it as it is.

        :class:`NoSuchFeed`; refusals as of any write (:class:`NotPrimary` on a follower).
        Without ``wait`` the outcome of the write is left open and its position not known.
        """
        key = check_feed_name(name).encode()

        def body(txn: Transaction[bytes]) -> bool:
            data = txn.get(key)
            if data is None:
                raise _no_feed(name)
            made = change(FeedState.unpack(data))
            if made is not None:
                txn.put(key, made.pack())
            return made is not None

        if wait:
            return self.space._atomically(body)[1]
        txn: Transaction[bytes] = self.space.transaction()
        try:
            write = txn.end(commit=body(txn))
        except BaseException:
            txn.end(commit=False)
            raise
        if write is not None:
            self.node.engine.committer.kick()
        return None

    def drop(self, name: str) -> None:
        """Forget a feed; :class:`NoSuchFeed` when there is none of that name."""
        self.need(name)
        self.space.delete(name.encode())

    def pause(self, name: str, *, paused: bool) -> None:
        """Stop handing out changes to its readers, or go on."""
        self.change(name, lambda state: replace(state, paused=paused))

    def seek(self, name: str, to: str | Position) -> None:
        """Move a feed: to a position, a token, ``"now"``, ``"oldest"`` (what the log still holds) or
        ``"snapshot"`` (begin with the present state). Its readers go on from there."""
        token, needs = self.place(to)
        self.change(name, lambda s: replace(s, token=token, needs=needs, generation=s.generation + 1))

    def place(self, to: str | Position) -> tuple[str, int]:
        """(token, first record needed) of a place as :meth:`seek` takes it; ``ValueError`` for another word,
        :class:`RolledBack` or :class:`Truncated` for what is not part of this history."""
        node = self.node
        reader = LogReader(node, Selection(), committed=False)
        limit = reader.limit()
        if to == "snapshot":
            return "", limit + 1
        if isinstance(to, Position) or to in ("now", "oldest"):
            if to == "now":
                at = node.engine.position_at(limit)
            elif to == "oldest":
                at = node.engine.position_at(node.engine.committer.log.first - 1)
            else:
                assert isinstance(to, Position)
                at = Position(*to)
                reader.at = at
                if not reader.here():
                    raise RolledBack(f"{at} is not here", position=at, hint="give a position that exists")
            if at != ZERO:
                reader.move(at)
            token = reader.token()
        else:
            token = Token.parse(to)
            reader.start(token)
            reader.here()
        return str(token), token.needs

    def infos(self) -> list[FeedInfo]:
        """Every feed, by name."""
        return [self._info(key.decode(), FeedState.unpack(value)) for key, value in self.space.scan()]

    def info(self, name: str) -> FeedInfo:
        return self._info(name, self.need(name))

    def _info(self, name: str, state: FeedState) -> FeedInfo:
        engine = self.node.engine
        log = engine.committer.log
        token = Token.parse(state.token) if state.token else None
        behind = max(0, engine.view.last - state.needs + 1)
        since_us = engine.time_at(state.needs) if behind else 0
        lag_bytes = log.bytes_after(state.needs - 1) if behind else 0
        return FeedInfo(
            name=name,
            position=token.position if token is not None else ZERO,
            paused=state.paused,
            in_snapshot=token is None or token.scan is not None,
            keyspaces=state.keyspaces,
            prefix=state.prefix,
            topics=state.topics,
            lag_records=behind,
            lag_bytes=lag_bytes,
            lag_s=max(0.0, time.time() - since_us / 1e6) if since_us else 0.0,
            held=state.needs >= log.first and lag_bytes <= engine.options.retention_bytes_max,
            created_s=state.created_us / 1e6,
            acked_s=state.acked_us / 1e6,
            token=state.token,
        )


def _no_feed(name: str) -> NoSuchFeed:
    return NoSuchFeed(f"there is no feed named {name!r}", name=name)


class Feed:
    """The changes of a store for one named reader, whose place is kept in the store. Made by ``Store.feed``.

    Iterate over it and :meth:`ack` what is done; after a restart or a failover it goes on behind the last ack,
    so a change may come again, but none is left out. One reader at a time; acks are writes, so the reader runs
    where the primary is, or on a follower with ``forward_writes``. An ack of an earlier change moves the place
    back to it.
    """

    def __init__(
        self,
        feeds: Feeds,
        name: str,
        selection: Selection,
        *,
        after: Position | None,
        snapshot: bool,
        committed: bool,
    ) -> None:
        self.name = check_feed_name(name)
        self._feeds = feeds
        self._node = feeds.node
        self._committed = committed
        self._closed = False
        self._ready: Iterator[Change] = iter(())
        self._midway = False
        """Whether a read was interrupted (Ctrl-C), so that nobody knows what has reached the reader."""
        self._last: Change | None = None
        """The last change that was handed out."""
        self._batch_end: Change | None = None
        """The last one of those that were read with it."""
        self._acked = True
        """Whether that one was acked."""
        state = feeds.get(name)
        if state is None:
            state = self._create(selection, after, snapshot)
        kept = Selection(
            None if state.keyspaces is None else frozenset(state.keyspaces),
            state.prefix,
            None if state.topics is None else frozenset(state.topics),
        )
        given = replace(selection, transform=None, before=False)
        if given not in (kept, Selection()):
            raise ConfigurationMismatch(
                f"the feed {name} selects {kept}, and was opened with {given}",
                option="feed", given=given, stored=kept,
                hint="open it without a selection, or drop it, or take another name",
            )  # fmt: skip
        self._selection = replace(kept, transform=selection.transform, before=selection.before)
        self._generation = state.generation
        self._changes = self._open(state)

    def _create(self, selection: Selection, after: Position | None, snapshot: bool) -> FeedState:
        token, needs = self._feeds.place("snapshot" if snapshot else ZERO if after is None else after)
        topics, keyspaces = selection.topics, selection.keyspaces
        state = FeedState(
            token=token,
            needs=needs,
            keyspaces=None if keyspaces is None else tuple(sorted(keyspaces)),
            prefix=selection.prefix,
            topics=None if topics is None else tuple(sorted(topics)),
            created_us=time.time_ns() // 1000,
        )
        return self._feeds.create(self.name, state)

    def _open(self, state: FeedState, have: Held | None = None) -> Changes:
        return Changes(
            self._node,
            self._selection,
            token=Token.parse(state.token) if state.token else None,
            snapshot=not state.token,
            committed=self._committed,
            have=have,
        )

    # -- reading -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Change]:
        while not self._closed:
            for change in self._ready:
                self.handed_out(change)
                yield change
                if self.closed:
                    return
            self._ready = iter(self.read(LOOK_UP_S))
            self._midway = False

    @property
    def behind(self) -> bool:
        """Whether the last read that gave nothing has left something unread."""
        return not self._closed and self._changes.behind

    def handed_out(self, change: Change) -> None:
        """``change`` is the last one that the reader has."""
        self._last, self._acked, self._midway = change, False, False

    def poll(self, timeout_s: float = 1.0) -> list[Change]:
        """The next changes; none after ``timeout_s`` without any, while paused, and when it is closed.

        Raises what ``Store.changes`` raises, and :class:`NoSuchFeed` when it was dropped.
        """
        changes = list(self._ready) or self.read(timeout_s)
        if changes:
            self.handed_out(changes[-1])
        self._midway = False
        return changes

    def read(self, timeout_s: float) -> list[Change]:
        """As :meth:`poll`, for a reader who calls :meth:`handed_out` when the changes have reached it."""
        if self._midway:  # an interrupt took changes with it: they come again
            self._go_on(self._feeds.need(self.name))
        self._midway = True
        try:
            return self._read(timeout_s)
        except Exception:
            self._midway = False
            raise

    def read_quietly(self, timeout_s: float) -> list[Change]:
        """As :meth:`read`, on a thread that no Ctrl-C reaches, for one who keeps the changes himself."""
        return self._read(timeout_s)

    def _read(self, timeout_s: float) -> list[Change]:
        deadline_s = time.monotonic() + timeout_s
        while not self._closed:
            state = self._feeds.need(self.name)
            if state.generation != self._generation:
                self._go_on(state)
            left = max(0.0, deadline_s - time.monotonic())
            if state.paused:
                if self._node.closing:
                    raise ClosedError("the store is closed")
                self._node.moves.wait_once(lambda: self._closed, min(left, LOOK_UP_S))
            else:
                changes = self._changes.poll(min(left, LOOK_UP_S))
                if changes:
                    self._batch_end = changes[-1]
                    return changes
                self._advance(state)
            if left <= 0:
                break
        return []

    def _go_on(self, state: FeedState, have: Held | None = None) -> None:
        """Somebody moved the feed: read from there."""
        self._changes.close()
        self._changes = self._open(state, have)
        self._generation, self._ready = state.generation, iter(())
        self._last, self._batch_end, self._acked = None, None, True

    def _advance(self, state: FeedState) -> None:
        """Nothing is left to hand out: perhaps move the place behind what was left out."""
        at = self._changes.position.offset
        if not self._acked or self._changes.in_snapshot or not state.token or at < state.needs:
            return
        step = min(ADVANCE_BYTES, self._node.options.retention_bytes_max // 4)
        if self._node.engine.committer.log.bytes_after(state.needs - 1) >= step:
            try:
                self._save(self._changes.token, wait=False)
            except Error:
                pass  # not now, then: it is only about old log

    # -- its place ---------------------------------------------------------------------------------

    def ack(self, through: Change | str | None = None, *, wait: bool = True) -> Position | None:
        """All through ``through`` (a change or its token; default: all that was handed out) is done.

        Returns the position of this write; ``None`` when there was nothing to ack, without ``wait``, or when
        somebody moved the feed meanwhile, so that the ack does not count. Raises as any write does. Without
        ``wait`` it returns at once: should it be lost, the changes come again.
        """
        if through is None:
            if self._last is None or self._acked:
                return None
            all_done = self._last is self._batch_end
            token = self._changes.token if all_done else self._last.resume
        else:
            token = through if isinstance(through, str) else through.resume
        if through is None or through is self._last:
            self._acked = True
        try:
            return self._save(token, wait=wait)
        except RefusedError:
            self._acked = False
            raise

    def _save(self, text: str, *, wait: bool) -> Position | None:
        token, now_us, generation = Token.parse(text), time.time_ns() // 1000, self._generation
        LogReader(self._node, Selection(), committed=True).start(token)  # refuses another store's

        def moved(state: FeedState) -> FeedState | None:
            return state.moved(text, token.needs, now_us) if state.generation == generation else None

        return self._feeds.change(self.name, moved, wait=wait)

    @property
    def token(self) -> str:
        """The place that is stored; empty when the feed begins with a snapshot."""
        return self._feeds.need(self.name).token

    @property
    def position(self) -> Position:
        """Everything through here was acked."""
        return self.info().position

    def info(self) -> FeedInfo:
        """Where it stands and how far it is behind."""
        return self._feeds.info(self.name)

    def pause(self) -> None:
        """Hand out nothing until :meth:`resume`; its place still holds the log back."""
        self._feeds.pause(self.name, paused=True)

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._feeds.pause(self.name, paused=False)

    def seek(self, to: str | Position) -> None:
        """Go on from a position, a token, ``"now"``, ``"oldest"`` or ``"snapshot"``."""
        self._feeds.seek(self.name, to)
        self._go_on(self._feeds.need(self.name))

    def resnapshot(self, have: Held | None = None) -> None:
        """Begin again with the present state: after :class:`LogTrimmed` or :class:`Truncated`.

        Without ``have`` the marks ``begin`` and ``end`` enclose all rows: what the receiver holds of this feed
        and does not get between them is gone. With ``have``, the receiver's (keyspace, key, value) in order,
        only the difference comes: puts of what is new or another, deletes of what is gone. Should it be broken
        off, call it again with what the receiver holds then.
        """
        self._feeds.seek(self.name, "snapshot")
        self._go_on(self._feeds.need(self.name), have)

    def drop(self) -> None:
        """Forget the feed altogether."""
        self.close()
        self._feeds.drop(self.name)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """End the iteration; the place stays. Idempotent, any thread."""
        self._closed = True
        self._changes.close()

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
