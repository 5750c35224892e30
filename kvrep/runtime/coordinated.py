"""A node as its coordinator sees it: see :class:`kvrep.runtime.coordinator.NodeView`."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

from kvrep.errors import ClosedError, Fenced, NotPrimary
from kvrep.model.configuration import Configuration
from kvrep.model.position import Position
from kvrep.replication.ballots import PrimarySeen
from kvrep.replication.election import BecomePrimary, Standing
from kvrep.replication.messages import Promise
from kvrep.runtime.promoting import fetch_all, promise_of
from kvrep.transport.interface import Transport

if TYPE_CHECKING:
    from kvrep.runtime.node import Node

__all__ = ["CoordinatedNode"]

log = logging.getLogger("kvrep.coordination")

FETCH_TIMEOUT_S = 60.0


class CoordinatedNode:
    """Holds no state of its own."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._witness = node.witness

    @property
    def label(self) -> str:
        return self._node.label

    @property
    def transport(self) -> Transport:
        transport = self._node.transport
        assert transport is not None
        return transport

    def standing(self) -> Standing:
        node = self._node
        engine, home = node.engine, node.engine.home
        effective, proposed = engine.configurations_in_force()
        rules = tuple(c for c in (effective, proposed[1] if proposed is not None else None) if c is not None)
        promised, tail = home.promised_epoch, engine.tail
        primary_epoch = node.primary_epoch
        return Standing(
            store_id=home.store_id,
            name=home.name,
            address=node.address,
            lineage=home.lineage,
            rules=rules if rules[0].voters else (),
            promised_epoch=promised,
            last=Position(tail.epoch, tail.offset),
            lowered=home.lowered,
            primary_epoch=primary_epoch if primary_epoch >= promised else 0,
            able=self._able(),
            witness=self._witness,
        )

    def _able(self) -> bool:
        """Whether this node may become primary, and its promise says what it has stored."""
        node = self._node
        engine = node.engine
        bootstrapping = node.replaying is not None and node.replaying.bootstrapping
        return (
            not self._witness
            and not bootstrapping
            and engine.committer.failure is None
            and engine.tail.offset >= engine.home.vote_floor
        )

    def promise(self, epoch: int, to: bytes) -> Promise | None:
        node = self._node
        engine, home = node.engine, node.engine.home
        with engine.committer.lead:
            if engine.closed:
                raise ClosedError("the store is closed")
            engine.committer.log.sync()
            if not home.promise(epoch, to):
                return None
            if to != home.store_id:
                # Under the lock: nothing is appended, or acked, in the old epoch after this answer was made.
                node.roles.promised(epoch, "")
            return Promise.without_data(epoch, home.lowered) if self._witness else promise_of(node, epoch)

    def become_primary(self, order: BecomePrimary) -> None:
        node, roles = self._node, self._node.roles
        home = node.engine.home
        deadline = time.monotonic() + FETCH_TIMEOUT_S
        with roles.changing(FETCH_TIMEOUT_S), roles.standing_still():
            if home.promised_epoch != order.epoch or home.promised_to != home.store_id:
                raise Fenced(f"epoch {home.promised_epoch} was promised", epoch=home.promised_epoch)
            founding = None
            if order.founding:
                founding = self._founding(order)
            else:
                fetch_all(
                    roles, order.promotion, deadline, addresses=order.addresses, forced=not order.fenced
                )
            roles.take_over(
                order.epoch, order.promotion.promised, founding=founding, unfenced=not order.fenced
            )

    def _founding(self, order: BecomePrimary) -> Configuration:
        """Make the lineage (unless an earlier attempt has) and the first configuration of a new group."""
        node = self._node
        options = node.options
        if not node.engine.home.lineage:
            node.engine.adopt_lineage(os.urandom(16))
        return Configuration(
            acks=options.acks if options.acks is not None else "majority",
            ack_timeout_s=options.ack_timeout_s if options.ack_timeout_s is not None else 5.0,
            degrade_after_s=options.degrade_after_s or 0.0,
            lag_records_max=options.lag_records_max or 0,
            voters=order.founding,
            next_member=max(v.member for v in order.founding) + 1,
        )

    def follow(self, primary: PrimarySeen) -> None:
        if self._witness:
            return
        roles = self._node.roles
        with roles.changing(FETCH_TIMEOUT_S):
            roles.go_after(primary.address)

    def step_down(self, reason: str, epoch: int) -> None:
        roles = self._node.roles
        if not self._node.coordinator.automatic:
            roles.seek()  # by hand a node leaves when it is fenced, or has seen the other primary itself
            return
        with roles.changing(FETCH_TIMEOUT_S):
            shipping = self._node.shipping
            if shipping is None:
                return
            error = (
                Fenced(reason, epoch=epoch) if epoch else NotPrimary(reason, primary_address=None, epoch=None)
            )
            roles.end_primary(error)

    def adopt(self, lineage: bytes) -> None:
        self._node.engine.adopt_lineage(lineage)
