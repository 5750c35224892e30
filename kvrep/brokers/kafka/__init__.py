"""Kafka, with confluent-kafka (librdkafka): ``kafka://`` and, with TLS, ``kafkas://``.

``kafka://user:password@host:9092,host:9092/topic``. Options: ``topic``, ``timeout_s`` (10: of the first answer),
``sasl`` (``PLAIN``, ``SCRAM-SHA-256``, ``SCRAM-SHA-512``; used when the address has a user), ``cafile``,
``linger_ms`` (5), ``partitions`` and ``replicas`` (of a topic that does not exist yet: the cluster's default).

Producers are idempotent, wait for all in-sync replicas, and try for ever; a key's hash (the one of Kafka's own
Java client) picks its partition. With a ``transactional_id`` messages become visible in transactions. Readers
see committed messages only. They read all partitions themselves and store the group's position with the
cluster, without joining its rebalancing: one reader per group, as replication wants it; two would both get
everything.

Each publisher has a thread (``kvrep-kafka-publisher``) besides those of librdkafka.
"""

from __future__ import annotations

from kvrep.brokers.broker import BaseBroker
from kvrep.brokers.kafka.cluster import Cluster
from kvrep.brokers.kafka.publisher import KafkaPublisher
from kvrep.brokers.kafka.subscriber import KafkaSubscriber
from kvrep.brokers.kafka.transactions import TransactionalPublisher
from kvrep.brokers.publisher import Window
from kvrep.brokers.url import BrokerUrl
from kvrep.errors import OpenError

__all__ = ["KafkaBroker", "connect"]

OPTIONS = ("timeout_s", "sasl", "cafile", "linger_ms", "partitions", "replicas")


def connect(url: BrokerUrl) -> KafkaBroker:
    """The cluster at ``url``; nothing is connected yet. ``ConfigurationMismatch`` for an unknown option."""
    return KafkaBroker(url)


class KafkaBroker(BaseBroker):
    """See :class:`kvrep.brokers.interface.Broker`."""

    has_partitions = True
    """What comes first in a topic need not arrive first, unless it has the same key."""

    def __init__(self, url: BrokerUrl) -> None:
        super().__init__(url, topic=url.path, options=OPTIONS)
        if not url.hosts:
            raise OpenError(f"not a Kafka address: {url}", hint="kafka://host:9092,host:9092/topic")
        self._cluster = Cluster(url)

    def _publisher(self, topic: str, window: Window) -> KafkaPublisher:
        return KafkaPublisher(self._cluster, topic, window)

    def _transactional(self, topic: str, window: Window, transactional_id: str) -> TransactionalPublisher:
        return TransactionalPublisher(self._cluster, topic, window, transactional_id)

    def _subscriber(self, topic: str, group: str, start: str, prefetch: int) -> KafkaSubscriber:
        return KafkaSubscriber(self._cluster, topic, group, start, prefetch)
