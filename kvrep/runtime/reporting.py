"""The status of a node, as one frozen value. Reads every part, changes nothing; cheap enough for once a second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvrep.errors import Error
from kvrep.status import FollowerStatus, Status

if TYPE_CHECKING:
    from kvrep.runtime.lags import Lag
    from kvrep.runtime.node import Node
    from kvrep.runtime.shipping import Shipping
    from kvrep.storage.engine import Engine

__all__ = ["status_of"]


def status_of(node: Node, *, reading: bool = True) -> Status:
    """Where this node and its followers stand. Without ``reading``, no file is read: how many bytes and seconds a
    follower is behind that lacks more than what is in memory was measured within the last second."""
    engine, shipping, replaying = node.engine, node.shipping, node.replaying
    home, state, committer = engine.home, engine.tree.state, engine.committer
    configuration, effective = engine.configuration, engine.configurations_in_force()[0]
    return Status(
        role=node.role,
        name=home.name,
        store_id=home.store_id.hex(),
        lineage=home.lineage.hex(),
        address=node.address,
        path=str(home.path),
        epoch=committer.epoch or engine.epochs.last_epoch,
        first_offset=committer.log.first,
        last_offset=engine.tail.offset,
        durable_offset=committer.durable,
        committed_offset=committer.committed,
        applied_offset=state.applied.offset,
        position=engine.committed_position,
        acks=configuration.acks,
        ack_timeout_s=configuration.ack_timeout_s,
        durability=node.options.durability,
        voters=tuple(v.name or v.store_id.hex()[:8] for v in configuration.voters),
        copies=effective.copies_wanted,
        away=tuple(v.name or v.store_id.hex()[:8] for v in effective.away),
        unprotected=effective.unprotected,
        degrade_after_s=configuration.degrade_after_s,
        lag_records_max=configuration.lag_records_max,
        not_writable=_not_writable(node),
        primary_address=node.primary_address,
        followers=_followers(engine, shipping, reading) if shipping is not None else (),
        source=replaying.status() if replaying is not None else None,
        verified_through=0 if engine.unverified else state.verified,
        diverged_at=state.diverged,
        memtable_bytes=engine.view.memory_bytes,
        log_bytes=committer.log.size,
        lmdb_bytes=0 if engine.closed else engine.tree.file_bytes,
        flushes=engine.flusher.flushes,
        uncommitted_bytes=committer.pending_bytes,
        snapshot_age_s=engine.view.oldest_snapshot_age_s(),
        rescued=tuple(str(p) for p in engine.rescued),
    )


def _not_writable(node: Node) -> str:
    """Why a write would be refused; empty when it would not."""
    if node.engine.committer.closed is not None:
        return str(node.engine.committer.closed)
    if node.shipping is None and node.replaying is None:
        return ""  # asked, it would begin its epoch
    try:
        node.engine.writable()
    except Error as error:
        return error.message
    return ""


def _followers(engine: Engine, shipping: Shipping, reading: bool) -> tuple[FollowerStatus, ...]:
    """Connected followers and those whose slots are kept, by name."""
    found = []
    lag_of = shipping.lags.measured if reading else shipping.lags.seen
    streams = shipping.followers.streams()
    for store_id, stream in streams.items():
        progress, hello = stream.progress, stream.hello
        assert progress is not None
        assert hello is not None
        found.append(
            _follower(
                engine,
                store_id,
                progress.synced,
                lag_of(store_id, progress.synced),
                name=hello.name,
                address=hello.address or stream.peer,
                state=progress.state.value,
                durability=hello.durability,
                connected=True,
                sent=progress.sent,
                written=progress.written,
                visible=progress.visible,
            )
        )
    for store_id, slot in shipping.slots.all():
        if store_id not in streams:
            found.append(
                _follower(
                    engine,
                    store_id,
                    slot.acked,
                    lag_of(store_id, slot.acked),
                    name=slot.name,
                    address=slot.address,
                    state="bootstrapping" if shipping.spools.serving(store_id) else "gone",
                    durability="",
                    connected=False,
                    sent=slot.acked,
                    written=slot.acked,
                    visible=0,
                )
            )
    return tuple(sorted(found, key=lambda f: (f.name, f.store_id)))


def _follower(engine: Engine, store_id: bytes, synced: int, lag: Lag, **fields: Any) -> FollowerStatus:
    """One that confirmed through ``synced``."""
    return FollowerStatus(
        store_id=store_id.hex(),
        voter=engine.configuration.voter(store_id) is not None,
        synced=synced,
        lag_records=lag.records,
        lag_bytes=lag.bytes,
        lag_s=lag.seconds,
        **fields,
    )
