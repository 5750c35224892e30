"""A node without storage, for tests of coordinators: what is durable lives in a :class:`MemoryDisk`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvrep.coordination.interface import Coordinator
from kvrep.errors import Error, Fenced, ProtocolError
from kvrep.model.configuration import Acks, Configuration
from kvrep.model.position import EpochTable, Position
from kvrep.replication.ballots import PrimarySeen
from kvrep.replication.election import BecomePrimary, Standing
from kvrep.replication.messages import Promise
from kvrep.transport.interface import Session, SnapshotItem, SnapshotRequest, Transport

__all__ = ["MemoryDisk", "MemoryNode"]


@dataclass
class MemoryDisk:
    """What survives a crash. The log holds epoch starts only."""

    store_id: bytes = field(default_factory=lambda: os.urandom(16))
    lineage: bytes = b""
    promised: int = 0
    promised_to: bytes = b""
    epochs: tuple[int, ...] = ()
    rules: tuple[Configuration, ...] = ()
    broken: bool = False
    """Nothing can be stored."""


class MemoryNode:
    """See :class:`kvrep.coordination.interface.NodeView`; also the service that its peers call.

    Following copies the primary's log once, through the transport. ``crash`` ends it without a word.
    """

    def __init__(
        self,
        name: str,
        transport: Transport,
        coordinator: Coordinator,
        *,
        disk: MemoryDisk | None = None,
        listen: str = "127.0.0.1:0",
        acks: Acks = "majority",
    ) -> None:
        self.name = name
        self.label = name
        self.transport = transport
        self.coordinator = coordinator
        self.disk = disk or MemoryDisk()
        self.acks = acks
        self.able = True
        self.primary_epoch = 0
        self.following: PrimarySeen | None = None
        self.history: list[str] = []
        """What the coordinator had this node do."""
        self._lock = threading.Lock()
        self._server = transport.serve(self, listen, name=name)
        self.address = self._server.start()

    def start(self) -> None:
        self.coordinator.start(self)

    def stop(self) -> None:
        """In order: the others are told."""
        self.coordinator.stop()
        self._server.stop()

    def stop_listening(self) -> None:
        """As if the process were gone: connections break and new ones are refused."""
        self._server.stop(1.0)

    # -- NodeView ----------------------------------------------------------------------------------

    def standing(self) -> Standing:
        disk = self.disk
        last = Position(disk.epochs[-1], len(disk.epochs)) if disk.epochs else Position(0, 0)
        return Standing(
            store_id=disk.store_id,
            name=self.name,
            address=self.address,
            lineage=disk.lineage,
            rules=disk.rules,
            promised_epoch=disk.promised,
            last=last,
            primary_epoch=self.primary_epoch if self.primary_epoch >= disk.promised else 0,
            able=self.able,
            witness=self.coordinator.witness,
        )

    def promise(self, epoch: int, to: bytes) -> Promise | None:
        with self._lock:
            disk = self.disk
            if disk.broken:
                raise OSError("no space left on device")
            if epoch < disk.promised or (epoch == disk.promised and to != disk.promised_to):
                return None
            disk.promised, disk.promised_to = epoch, to
            if self.coordinator.witness:
                return Promise.without_data(epoch)
            return self._own_promise()

    def _own_promise(self) -> Promise:
        disk = self.disk
        table = EpochTable((epoch, offset) for offset, epoch in enumerate(disk.epochs, 1))
        last = Position(table.last_epoch, len(disk.epochs))
        return Promise(epoch=disk.promised, last=last, committed=0, epochs=table)

    def become_primary(self, order: BecomePrimary) -> None:
        self.history.append(f"primary {order.epoch}")
        fetch = order.promotion.fetch
        if fetch is not None:
            self._copy(order.addresses[fetch.voter.store_id])
        with self._lock:
            disk = self.disk
            if disk.promised != order.epoch or disk.promised_to != disk.store_id:
                raise Fenced(f"epoch {disk.promised} was promised", epoch=disk.promised)
            if order.founding:
                disk.lineage = os.urandom(16)
                members = len(order.founding) + 1
                rule = Configuration(acks=self.acks, voters=order.founding, next_member=members)
                disk.rules = (rule,)
            disk.epochs = (*disk.epochs, order.epoch)
            self.primary_epoch, self.following = order.epoch, None

    def follow(self, primary: PrimarySeen) -> None:
        self.history.append(f"follow {primary.name}")
        self.primary_epoch, self.following = 0, primary
        try:
            self._copy(primary.address)
        except Error as error:
            self.history.append(f"no copy: {type(error).__name__}")

    def step_down(self, reason: str, epoch: int) -> None:
        del epoch
        self.history.append(f"step down: {reason}")
        self.primary_epoch = 0

    def adopt(self, lineage: bytes) -> None:
        self.disk.lineage = lineage

    def admit(self, *others: MemoryNode) -> None:
        """Make other nodes voters, everywhere at once."""
        rule = self.disk.rules[-1]
        for other in others:
            rule = rule.with_voter(other.disk.store_id, other.name, other.address)
        for node in (self, *others):
            node.disk.rules = (replace(rule, acks=self.acks),)
            node.coordinator.changed()

    def _copy(self, address: str) -> None:
        connection = self.transport.connect(address, name=self.name)
        try:
            answer = connection.call("copy", {}, 1.0)
        finally:
            connection.close()
        with self._lock:
            self.disk.lineage = answer["lineage"]
            self.disk.epochs = tuple(answer["epochs"])
            self.disk.rules = tuple(Configuration.from_wire(rule) for rule in answer["rules"])

    # -- what peers call ---------------------------------------------------------------------------

    def call(self, method: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if method != "copy":
            return self.coordinator.call(method, request)
        with self._lock:
            disk = self.disk
            return {
                "lineage": disk.lineage,
                "epochs": list(disk.epochs),
                "rules": [rule.to_wire() for rule in disk.rules],
            }

    def open_session(self, peer: str) -> Session:
        raise ProtocolError(f"{self.name} has no records for {peer}")

    def snapshot(self, request: SnapshotRequest) -> Iterator[SnapshotItem]:
        raise ProtocolError(f"{self.name} has no snapshot for {request.name}")

    def scan(self, request: Mapping[str, Any]) -> Iterator[list[tuple[bytes, bytes]]]:
        del request
        raise ProtocolError(f"{self.name} holds no keys")
