"""Writing dropped records again, on the primary: what has changed since, and a write that depends on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvrep.errors import LogTrimmed, Overloaded, ProtocolError, TooOld
from kvrep.model.codec import decode
from kvrep.model.position import Position
from kvrep.model.record import Kind, Op, write_payload, writes_in
from kvrep.runtime.checks import check_key, check_name
from kvrep.storage.write import Write

if TYPE_CHECKING:
    from kvrep.runtime.node import Node

__all__ = ["answer_changes", "answer_reapply"]

PAGE_BYTES = 4 << 20
STEP_BYTES = 1 << 20
KEYS_MAX = 100_000

Key = tuple[str, bytes]


def answer_changes(node: Node, request: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that records after ``after`` have touched, a page of log at a time; ``through`` says how far.

    ``running`` is the log's running checksum through ``after``, by which the asker knows that both histories
    are the same up to there. Raises :class:`TooOld` where the log does not reach back.
    """
    after = _offset(request, "after")
    log = node.engine.committer.log
    try:
        running = log.running_at(after)
        keys, through = _touched(node, after, node.engine.tail.offset, PAGE_BYTES)
    except LogTrimmed as error:
        raise _too_old(after) from error
    return {
        "running": running,
        "keys": [[name, key] for name, key in sorted(keys)],
        "through": through,
        "end": through >= node.engine.tail.offset,
    }


def answer_reapply(node: Node, request: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``ops`` in one record unless one of their keys was touched after record ``checked``.

    Those that were come back as ``changed``; then nothing was written. ``force`` looks at nothing.
    """
    ops, checked, force = _ops(node, request), _offset(request, "checked"), bool(request.get("force"))
    timeout_s = min(max(0.0, float(request.get("timeout_s", 10.0))), 3600.0)
    deadline = time.monotonic() + timeout_s
    engine = node.engine
    size = sum(len(key) + len(value or b"") + 16 for _, key, value in ops)
    node.writes.check_record_size(size)
    engine.writable()
    owner, granted = object(), threading.Event()
    committer = engine.committer
    try:
        if not committer.take_place(owner, granted.set) and not granted.wait(timeout_s):
            raise Overloaded("a transaction held the writer's place for too long")
        changed = [] if force else _changed(node, ops, checked)
        if changed:
            return {"changed": [[name, key] for name, key in changed], "through": engine.tail.offset}
        write = Write(Kind.WRITE, write_payload(ops), size)
        if not committer.leave_place(owner, write):
            raise Overloaded("the writer's place was taken away", hint="try again")
    finally:
        committer.leave_place(owner, None)
    committer.kick()
    position: Position = node.writes.finish(write, max(0.0, deadline - time.monotonic()))
    return {"changed": [], "position": str(position)}


def _changed(node: Node, ops: list[Op], checked: int) -> list[Key]:
    """Which keys of ``ops`` were touched after ``checked``. The place is held, so nothing comes after."""
    wanted = {(name, key) for name, key, _ in ops}
    found: set[Key] = set()
    for record in node.engine.committer.unpublished():
        if type(record) is Write and not record.offset:
            found |= _keys_of(writes_in(record.kind, record.payload))
    try:
        touched, _ = _touched(node, checked, node.engine.tail.offset, None)
    except LogTrimmed as error:
        raise _too_old(checked) from error
    return sorted(wanted & (found | touched))


def _touched(node: Node, after: int, last: int, bytes_max: int | None) -> tuple[set[Key], int]:
    """(the keys that records ``after + 1`` … touched, the last record looked at)."""
    log = node.engine.committer.log
    keys: set[Key] = set()
    seen = 0
    while after < last and (bytes_max is None or (seen < bytes_max and len(keys) < KEYS_MAX)):
        running = log.running_at(after)
        run = log.read(after + 1, STEP_BYTES)
        if run is None:
            break
        for record in decode(run.data, run.first, running)[0]:
            keys |= _keys_of(writes_in(record.kind, record.payload))
        after, seen = run.last, seen + len(run.data)
    return keys, after


def _keys_of(payload: Any) -> set[Key]:
    return {(payload[i], key) for i in range(0, len(payload), 2) for key in payload[i + 1][::2]}


def _ops(node: Node, request: Mapping[str, Any]) -> list[Op]:
    ops: list[Op] = []
    try:
        for name, key, value in request["ops"]:
            node.engine.view.admit(check_name(name))
            ops.append((name, check_key(key), None if value is None else bytes(value)))
    except (KeyError, TypeError) as error:
        raise ProtocolError(f"not operations: {error}") from error
    if not ops:
        raise ProtocolError("nothing to write")
    return ops


def _offset(request: Mapping[str, Any], name: str) -> int:
    try:
        return max(0, int(request[name]))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"{name} must be a record's number") from error


def _too_old(after: int) -> TooOld:
    return TooOld(
        f"the log here does not reach back to record {after}, so nobody can tell what has changed since",
        hint="look at the keys by hand; --force writes them whatever they hold now",
        position=None,
    )
