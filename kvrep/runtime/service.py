"""What a node answers to its peers and to clients in other processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvrep.errors import ClosedError, Overloaded, ProtocolError
from kvrep.model.position import Position
from kvrep.model.record import DEFAULT_KEYSPACE, Kind, Op, write_payload
from kvrep.replication.messages import FromFollower, FromPrimary, Refused
from kvrep.runtime.checks import check_key, check_name, check_value, prefix_stop
from kvrep.runtime.horizon import all_committed, horizon
from kvrep.runtime.promoting import (
    Force,
    answer_lower,
    answer_members,
    answer_promise,
    answer_records,
    answer_standing,
)
from kvrep.runtime.reapplying import answer_changes, answer_reapply
from kvrep.runtime.reporting import status_of
from kvrep.runtime.signal import Signal
from kvrep.storage.digest import DIGEST_MODULUS
from kvrep.storage.tree import digests_out
from kvrep.storage.write import Write
from kvrep.transport.interface import Session, SnapshotItem, SnapshotRequest

if TYPE_CHECKING:
    from kvrep.runtime.node import Node

__all__ = ["NodeService"]

SCAN_BYTES = 1 << 18
TIMEOUT_S_MAX = 3600.0


class NodeService:
    """See :class:`kvrep.transport.interface.Service`. Holds no state of its own."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._methods: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
            "status": self._status,
            "get": self._get,
            "write": self._write,
            "resolve": self._resolve,
            "wait": self._wait,
            "digests": self._digests,
            "marks": self._marks,
            "keyspaces": self._keyspaces,
            "horizon": self._horizon,
            "ask": lambda request: node.coordinator.call("ask", request),
            "vote": lambda request: node.coordinator.call("vote", request),
            "forward": node.forwarded.answer,
            "forwarded": node.forwarded.settle,
            "read_position": self._read_position,
            "standing": lambda request: answer_standing(self._node, request),
            "promise": lambda request: answer_promise(self._node, request),
            "lower": lambda request: answer_lower(self._node, request),
            "records": lambda request: answer_records(self._node, request),
            "members": lambda request: answer_members(self._node, request),
            "changes": lambda request: answer_changes(self._node, request),
            "reapply": lambda request: answer_reapply(self._node, request),
            "promote": self._promote,
            "switchover": self._switchover,
        }

    def open_session(self, peer: str) -> Session:
        self._node.roles.await_settled()
        shipping = self._node.shipping
        if shipping is None:
            address = self._node.primary_address
            return _Refusing(
                Refused(
                    reason="not-primary",
                    message=f"{self._node.label} is a follower" + (f" of {address}" if address else ""),
                    primary_address=address,
                    epoch=self._node.engine.epochs.last_epoch,
                )
            )
        return shipping.open_session(peer)

    def snapshot(self, request: SnapshotRequest) -> Iterator[SnapshotItem]:
        from kvrep.runtime.spooling import serve_snapshot

        return serve_snapshot(self._node, request)

    def call(self, method: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = self._methods.get(method) or self._node.calls.get(method)
        if answer is None:
            raise ProtocolError(f"{method!r} is not something this node answers", hint="upgrade it")
        if self._node.engine.closed:
            raise ClosedError("the store is closed")
        return answer(request)

    # -- unary -------------------------------------------------------------------------------------

    def _status(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        del request
        return {"status": status_of(self._node).to_json(), "time": time.time()}

    def _get(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        name, prefix = self._space(request)
        key = check_key(request.get("key"))
        at_least = _position(request.get("at_least"))
        self._node.freshness.need(
            at_least, request.get("max_staleness_s"), _timeout(request), request.get("consistency")
        )
        return {"value": self._node.engine.view.get(name, prefix, key), "position": str(self._position())}

    def _write(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """``ops``: a list of [keyspace, key, value or None]; atomic."""
        options = self._node.options
        ops: list[Op] = []
        size = 0
        for item in request.get("ops", ()):
            name, key, value = item
            self._node.engine.view.admit(check_name(name))
            key = check_key(key)
            if value is not None:
                value = check_value(value, options.value_bytes_max)
            ops.append((name, key, value))
            size += len(key) + len(value or b"") + 16
        if not ops:
            raise ProtocolError("a write without operations")
        self._node.writes.check_record_size(size)
        write = Write(Kind.WRITE, write_payload(ops), size)
        position = self._node.writes.commit(
            write, _timeout(request), request.get("acks"), request.get("level")
        )
        return {"position": str(position)}

    def _read_position(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """What this primary, confirmed by its voters after the question came, has committed."""
        node = self._node
        deadline_s = node.deadline(_timeout(request))
        node.freshness.confirm(deadline_s)
        return {"position": str(node.engine.committed_position)}

    def _promote(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        force = None
        if request.get("force"):
            force = Force(voters=tuple(map(str, request.get("voters") or ())), acks=request.get("acks"))
        self._node.roles.promote(_timeout(request) or 10.0, force, asked=bool(request.get("asked")))
        return {"position": str(self._position()), "epoch": self._node.primary_epoch}

    def _switchover(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        to, dry_run = str(request.get("to", "")), bool(request.get("dry_run"))
        obstacles = self._node.roles.switchover(to, _timeout(request) or 10.0, dry_run=dry_run)
        return {"obstacles": list(obstacles), "primary_address": self._node.primary_address}

    def _resolve(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        position = _position(request.get("position"))
        if position is None:
            raise ProtocolError("resolve needs a position")
        return {"outcome": self._node.writes.resolve(position).value}

    def _wait(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        position = _position(request.get("position"))
        if position is None:
            raise ProtocolError("wait needs a position")
        self._node.freshness.wait_for(position, _timeout(request) or 5.0)
        return {"position": str(self._position())}

    def _digests(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Flush, recompute the digests from LMDB as of one moment, and say which position that is.

        ``Overloaded`` when it takes longer than ``timeout_s`` (default 60). Writes go on meanwhile.
        """
        engine = self._node.engine
        deadline = time.monotonic() + (_timeout(request) or 60.0)
        engine.flush(deadline - time.monotonic())

        def breathe() -> None:
            time.sleep(0)  # lets go of the GIL
            if time.monotonic() > deadline:
                raise Overloaded("the digests were not recomputed in time", hint="allow more time")

        pinned = engine.pinned()
        try:
            off, state = pinned.differing(breathe), pinned.state
        finally:
            pinned.close()
        digests, counts = {}, {}
        for name in state.digests.keys() | off.keys():
            digest_off, count_off = off.get(name, (0, 0))
            digests[name] = (state.digests.get(name, 0) + digest_off) % DIGEST_MODULUS
            counts[name] = state.counts.get(name, 0) + count_off
        return {
            "position": str(engine.position_at(state.applied.offset)),
            "digests": digests_out(digests),
            "counts": counts,
            "stored": digests_out(state.digests),
            "verified": state.verified,
            "diverged": state.diverged,
        }

    def _marks(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The digests kept at the last digest mark, where every node cuts its flush: nothing is recomputed.

        They can be compared between nodes while writes go on.
        """
        del request
        state = self._node.engine.tree.state
        position = self._node.engine.position_at(state.mark) if state.mark else None
        return {
            "mark": None if position is None else str(position),
            "digests": digests_out(state.mark_digests),
        }

    def _horizon(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """What no failover can take back, and whether that is all that is committed."""
        del request
        return {"horizon": horizon(self._node), "all_committed": all_committed(self._node)}

    def _keyspaces(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The names of the keyspaces that hold or held data, sorted; the default one always."""
        del request
        return {"keyspaces": sorted({DEFAULT_KEYSPACE, *self._node.engine.view.keyspaces})}

    def _space(self, request: Mapping[str, Any]) -> tuple[str, bytes]:
        name = check_name(request.get("keyspace", DEFAULT_KEYSPACE))
        return name, self._node.engine.view.admit(name)

    def _position(self) -> Position:
        return self._node.engine.committed_position

    # -- streams -----------------------------------------------------------------------------------

    def scan(self, request: Mapping[str, Any]) -> Iterator[list[tuple[bytes, bytes]]]:
        name, _ = self._space(request)
        self._node.freshness.need(
            _position(request.get("at_least")),
            request.get("max_staleness_s"),
            5.0 if request.get("timeout_s") is None else _timeout(request),
            request.get("consistency"),
        )
        prefix = bytes(request.get("prefix") or b"")
        low = max(prefix, bytes(request.get("start") or b""))
        high = prefix_stop(prefix)
        stop = request.get("stop")
        if stop is not None and (high is None or stop < high):
            high = bytes(stop)
        limit = request.get("limit")
        return self._chunks(name, low, high, bool(request.get("reverse")), limit)

    def _chunks(
        self, name: str, low: bytes, high: bytes | None, reverse: bool, limit: int | None
    ) -> Iterator[list[tuple[bytes, bytes]]]:
        if (high is not None and low >= high) or limit == 0:
            return
        snapshot = self._node.engine.snapshot()
        try:
            chunk: list[tuple[bytes, bytes]] = []
            size = 0
            for count, (key, value) in enumerate(snapshot.scan(name, low, high, reverse=reverse), 1):
                chunk.append((key, value))
                size += len(key) + len(value) + 16
                if size >= SCAN_BYTES or count == limit:
                    yield chunk
                    chunk, size = [], 0
                if count == limit:
                    return
            if chunk:
                yield chunk
        finally:
            snapshot.release()


class _Refusing:
    """A session that has one thing to say."""

    def __init__(self, refused: Refused) -> None:
        self._refused: Refused | None = refused
        self._greeted = Signal()

    def on_message(self, message: FromFollower) -> None:
        del message
        self._greeted.set()

    def next_message(self) -> FromPrimary | None:
        self._greeted.wait(5.0)
        refused, self._refused = self._refused, None
        self._greeted.set()
        return refused

    def on_closed(self, error: Exception | None) -> None:
        del error
        self._greeted.set()


def _position(text: Any) -> Position | None:
    if text is None:
        return None
    try:
        return Position.parse(str(text))
    except ValueError as error:
        raise ProtocolError(str(error)) from None


def _timeout(request: Mapping[str, Any]) -> float | None:
    value = request.get("timeout_s")
    return None if value is None else min(max(0.0, float(value)), TIMEOUT_S_MAX)
