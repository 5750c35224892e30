"""Reading: all partitions, assigned by ourselves; the group's position is kept by the cluster."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import confluent_kafka as ck

from kvrep.brokers.interface import EARLIEST, LATEST, STORED, Delivery, Message
from kvrep.brokers.kafka.cluster import HOPELESS, Cluster, Faults, client_log
from kvrep.brokers.kafka.publisher import ID_HEADER
from kvrep.brokers.outstanding import Outstanding
from kvrep.errors import ClosedError, OpenError, ReplicationError

__all__ = ["KafkaSubscriber"]

log = logging.getLogger("kvrep.brokers")

POLL_S = 0.1
CLOSE_S, CLOSE_POLL_S = 2.0, 0.02
PARTITIONS_CHECK_S = 30.0
SETTINGS = {
    "enable.auto.commit": False,
    "isolation.level": "read_committed",
    "auto.offset.reset": "earliest",
    "queued.max.messages.kbytes": 16 << 10,
    "socket.timeout.ms": 10_000,
    "fetch.wait.max.ms": 100,
    "fetch.message.max.bytes": 1 << 20,
    "receive.message.max.bytes": 64 << 20,
}


class KafkaSubscriber:
    """See :class:`kvrep.brokers.interface.Subscriber`.

    A position names, for every partition, the last offset received: ``"0:17,1:4"``.
    """

    def __init__(self, cluster: Cluster, topic: str, group: str, start: str, prefetch: int) -> None:
        self._cluster, self._topic, self._prefetch = cluster, topic, prefetch
        given = {} if start in (STORED, EARLIEST, LATEST) else _parse(start)
        self._faults = Faults(cluster)
        own = {"group.id": group, "error_cb": self._faults, "on_commit": self._on_commit}
        self._storing = 0
        """How many positions are on their way to the cluster."""
        self._consumer = ck.Consumer(cluster.settings | SETTINGS | own, logger=client_log)
        # Protects the consumer against use after close.
        self._lock = threading.RLock()
        self.closed = False
        self._seen: dict[int, int] = {}
        self._outstanding: dict[int, Outstanding] = {}
        self._stored: dict[int, int] = {}
        try:
            # A consumer that reads nothing yet may be polled only once it is assigned something.
            self._consumer.assign([])
            self._assign(start, given)
        except BaseException:
            self._consumer.close()
            raise
        self._faults.forget()
        self._look_again = time.monotonic() + PARTITIONS_CHECK_S

    def _assign(self, start: str, given: dict[int, int]) -> None:
        partitions = self._cluster.partitions(self._consumer, self._topic, self._faults)
        places = [ck.TopicPartition(self._topic, one, ck.OFFSET_BEGINNING) for one in partitions]
        timeout_s = self._cluster.timeout_s
        with self._cluster.asked():
            if start == LATEST:  # the end as of now, not as of the first fetch
                for place in places:
                    _, place.offset = self._consumer.get_watermark_offsets(place, timeout_s)
            elif start == STORED:
                stored = self._consumer.committed(places, timeout_s)
                given = {one.partition: one.offset - 1 for one in stored if one.offset > 0}
        for place in places:
            self._outstanding[place.partition] = Outstanding()
            if place.partition in given:
                place.offset = given[place.partition] + 1
        self._seen = given
        self._consumer.assign(places)

    def receive(self, max_messages: int, timeout_s: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if self.closed:
                    raise ClosedError("the subscriber is closed")
                room = self._prefetch - sum(map(len, self._outstanding.values()))
                left = deadline - time.monotonic()
                found = self._receive(min(max_messages, room), min(POLL_S, max(0.0, left)))
            if found or left <= 0:
                return found

    def _receive(self, count: int, timeout_s: float) -> list[Delivery]:
        if time.monotonic() >= self._look_again:
            self._look_again = time.monotonic() + PARTITIONS_CHECK_S
            self._add_partitions()
        if count <= 0:
            time.sleep(timeout_s)
            return []
        found = []
        for one in self._consumer.consume(count, timeout_s):
            error = one.error()
            if error is None:
                found.append(self._delivery(one))
            elif error.fatal() or error.code() in HOPELESS:
                raise self._cluster.mapped(error)
            elif error.code() == ck.KafkaError._AUTO_OFFSET_RESET:
                raise ReplicationError(f"{self._cluster.shown}: the position is gone: {error.str()}")
        return found

    def _delivery(self, one: Any) -> Delivery:
        partition, offset = one.partition(), one.offset()
        headers = {name: (value or b"").decode("utf-8", "replace") for name, value in one.headers() or ()}
        message = Message(
            body=one.value() or b"", key=one.key() or b"", id=headers.pop(ID_HEADER, ""), headers=headers
        )
        self._seen[partition] = offset
        self._outstanding[partition].add(offset)
        position = ",".join(f"{p}:{o}" for p, o in self._seen.items())
        return Delivery(message, position=position, tag=(partition, offset))

    def _add_partitions(self) -> None:
        """A topic that grew: its new partitions are read from their beginnings."""
        try:
            found = self._consumer.list_topics(self._topic, timeout=1.0).topics[self._topic].partitions
        except ck.KafkaException:
            return
        new = [one for one in found if one not in self._outstanding]
        for one in new:
            self._outstanding[one] = Outstanding()
        if new:
            self._consumer.incremental_assign(
                [ck.TopicPartition(self._topic, one, ck.OFFSET_BEGINNING) for one in new]
            )

    def ack(self, delivery: Delivery, *, through: bool = True) -> None:
        """As the interface says; ``through`` covers, in the other partitions, what was received before."""
        partition, offset = delivery.tag
        with self._lock:
            if self.closed:
                return
            if through:
                for other, last in _parse(delivery.position).items():
                    if other in self._outstanding:
                        self._outstanding[other].ack(last, through=True)
            else:
                self._outstanding[partition].ack(offset, through=False)
            self._store()

    def _on_commit(self, error: Any, _places: Any) -> None:
        """A position was stored, or not. Called while the consumer is polled."""
        self._storing -= 1
        if error is not None:
            log.info("%s: positions were not stored: %s", self._cluster.shown, error)

    def _store(self) -> None:
        places = []
        for partition, outstanding in self._outstanding.items():
            done = outstanding.done_through
            if done is not None and self._stored.get(partition) != done:
                places.append(ck.TopicPartition(self._topic, partition, done + 1))
                self._stored[partition] = done
        if places:
            try:
                self._consumer.commit(offsets=places, asynchronous=True)
                self._storing += 1
            except ck.KafkaException as error:
                log.info("%s: positions were not stored: %s", self._cluster.shown, error)

    def close(self) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed = True
            deadline = time.monotonic() + CLOSE_S
            while self._storing and time.monotonic() < deadline:
                self._consumer.poll(CLOSE_POLL_S)  # what it returns was not acked and comes again
            # With a cluster that says nothing, librdkafka waits for its requests to time out: without us.
            closing = threading.Thread(target=self._consumer.close, name="kvrep-kafka-close", daemon=True)
            closing.start()
            closing.join(CLOSE_S)


def _parse(position: str) -> dict[int, int]:
    found = {}
    for part in position.split(","):
        partition, colon, offset = part.partition(":")
        if not (colon and partition.isdecimal() and offset.isdecimal()):
            raise OpenError(f"not a position in Kafka: {position[:300]!r}")
        found[int(partition)] = int(offset)
    return found
