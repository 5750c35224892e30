"""Publishing: librdkafka's queue of unsent messages is the buffer, and its delivery reports are the confirms."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import confluent_kafka as ck

from kvrep.brokers.interface import Message
from kvrep.brokers.kafka.cluster import MESSAGE_BYTES_MAX, Cluster, Faults, client_log
from kvrep.brokers.publisher import BasePublisher, Window
from kvrep.errors import Overloaded

__all__ = ["ID_HEADER", "KafkaPublisher"]

ID_HEADER = "kvrep-id"
POLL_S = 0.1
JOIN_S = 1.0
"""The least that a close waits for the polling thread, which looks up every tenth of a second."""
BATCH_MESSAGES = 128
_E = ck.KafkaError


class KafkaPublisher(BasePublisher):
    """See :class:`kvrep.brokers.interface.Publisher`."""

    def __init__(
        self, cluster: Cluster, topic: str, window: Window, settings: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(window, message_bytes_max=MESSAGE_BYTES_MAX)
        self._cluster, self._topic = cluster, topic
        self._batches: deque[_Batch] = deque()
        """What is unconfirmed, in order; the last one is filled up."""
        self._faults = Faults(cluster)
        own: dict[str, Any] = {
            "enable.idempotence": True,
            "acks": "all",
            "linger.ms": cluster.linger_ms,
            "partitioner": "murmur2_random",
            # Never given up: the buffer's bound says when it takes too long.
            "message.timeout.ms": 0,
            # Room for one more than we let in: our own bound is the one that waits.
            "queue.buffering.max.messages": window.messages + 1,
            "queue.buffering.max.kbytes": (window.bytes >> 10) + 1024,
            "error_cb": self._faults,
        }
        self._producer = ck.Producer(cluster.settings | own | dict(settings or {}), logger=client_log)
        self._begin()
        self._faults.forget()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="kvrep-kafka-publisher", daemon=True)
        self._thread.start()

    def _begin(self) -> None:
        """Reach the topic; raises what keeps it from being reached."""
        self._cluster.partitions(self._producer, self._topic, self._faults)

    def _send(self, message: Message, size: int) -> None:
        batches = self._batches
        batch = batches[-1] if batches else None
        if batch is None or batch.size == BATCH_MESSAGES:
            batch = _Batch(self._failed)
            batches.append(batch)
        # Counted first: it may be delivered before produce() returns.
        batch.size += 1
        try:
            self._produce(message, batch.on_delivery)
        except Exception:
            batch.size -= 1
            raise
        batch.bytes += size

    def _produce(self, message: Message, on_delivery: Callable[[Any, Any], None]) -> None:
        headers: list[tuple[str, Any]] = [(ID_HEADER, message.id)] if message.id else []
        if message.headers:
            headers += message.headers.items()
        try:
            # By position, since keywords cost a dictionary: partition, callback, its other name, timestamp, headers.
            self._producer.produce(self._topic, message.body, message.key, -1, on_delivery, None, 0, headers)
        except BufferError as error:
            raise Overloaded(f"{self._cluster.shown}: librdkafka's buffer is full") from error
        except ck.KafkaException as error:
            raise self._cluster.mapped(error.args[0]) from error

    def _health(self) -> tuple[str, str]:
        faults = self._faults
        return "connecting" if faults.down else "ready", str(faults.last or "")

    def _disconnect(self, deadline: float) -> None:
        self._producer.purge()
        self._stop.set()
        self._thread.join(max(JOIN_S, deadline - time.monotonic()))
        self._producer.poll(0)

    # -- the polling thread ------------------------------------------------------------------------

    def _poll(self) -> None:
        producer, faults = self._producer, self._faults
        while not self._stop.is_set():
            if producer.poll(POLL_S):
                self._count()
            if faults.fatal is not None and self._ended is None:
                self._end(faults.fatal)

    def _failed(self, error: Any) -> None:
        """librdkafka gave a message up; later ones may have arrived, so that going on would break the order."""
        self._end(self._cluster.mapped(error))

    def _count(self) -> None:
        """Advance over the batches that are delivered as a whole; the open one is, if all in it are."""
        count = size = 0
        with self._changed:
            batches = self._batches
            while batches and batches[0].delivered == batches[0].size:
                batch = batches.popleft()
                count += batch.size
                size += batch.bytes
            if count:
                self._faults.forget()
                self._confirm(count, size)


class _Batch:
    """Some messages that follow each other, counted as one: a counter for each would cost more than Kafka."""

    __slots__ = ("_failed", "bytes", "delivered", "on_delivery", "size")

    def __init__(self, failed: Callable[[Any], None]) -> None:
        self._failed = failed
        self.size = self.delivered = self.bytes = 0
        self.on_delivery = self._on_delivery

    def _on_delivery(self, error: Any, _message: Any) -> None:
        """On the polling thread, for each message."""
        if error is None:
            self.delivered += 1
        elif error.code() not in (_E._PURGE_QUEUE, _E._PURGE_INFLIGHT):
            self._failed(error)
