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

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import confluent_kafka as ck
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kvrep.brokers.interface import (
    BUFFER_BYTES,
    BUFFER_MESSAGES,
    EARLIEST,
    LATEST,
    STORED,
    Delivery,
    Message,
    PublisherStatus,
    Unconfirmed,
)
from kvrep.brokers.outstanding import Outstanding
from kvrep.brokers.sizes import check_message
from kvrep.brokers.url import DEFAULT_TOPIC, BrokerUrl
from kvrep.errors import (
    AuthenticationFailed,
    ClosedError,
    ConfigurationMismatch,
    Error,
    Fenced,
    OpenError,
    Overloaded,
    PeerUnavailable,
    PermissionDenied,
    ReplicationError,
    ValueTooLarge,
    again,
)

__all__ = ["KafkaBroker", "connect"]

log = logging.getLogger("kvrep.brokers")
# librdkafka's own log lines; what matters in them comes as errors, too.
_client_log = logging.getLogger("kvrep.brokers.librdkafka")
_client_log.setLevel(logging.CRITICAL)

PORT = 9092
ID_HEADER = "kvrep-id"
MESSAGE_BYTES_MAX = 8 << 20
FETCH_KIB = 16 << 10
POLL_S = 0.1
CLOSE_S, CLOSE_POLL_S = 2.0, 0.02
REQUEST_TIMEOUT_MS = 10_000
BATCH_MESSAGES = 128
NEVER = 1 << 62
PARTITIONS_CHECK_S = 30.0
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_E = ck.KafkaError
_DENIED = (
    _E.TOPIC_AUTHORIZATION_FAILED,
    _E.GROUP_AUTHORIZATION_FAILED,
    _E.CLUSTER_AUTHORIZATION_FAILED,
    _E.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
)
_SUPERSEDED = (_E._FENCED, _E.INVALID_PRODUCER_EPOCH, _E.PRODUCER_FENCED)


def connect(url: BrokerUrl) -> KafkaBroker:
    """The cluster at ``url``; nothing is connected yet. ``ConfigurationMismatch`` for an unknown option."""
    url.only("topic", "timeout_s", "sasl", "cafile", "linger_ms", "partitions", "replicas")
    if not url.hosts:
        raise OpenError(f"not a Kafka address: {url}", hint="kafka://host:9092,host:9092/topic")
    mechanism = url.options.get("sasl", "PLAIN").upper()
    if mechanism not in _MECHANISMS:
        raise ConfigurationMismatch(
            f"sasl={mechanism!r} is not allowed: {', '.join(_MECHANISMS)}", option="sasl", given=mechanism
        )
    return KafkaBroker(url, mechanism)


class KafkaBroker:
    """See :class:`kvrep.brokers.interface.Broker`."""

    def __init__(self, url: BrokerUrl, mechanism: str) -> None:
        self._url = url
        self._timeout_s = _number(url, "timeout_s", 10, 1, 3600)
        self._linger_ms = _number(url, "linger_ms", 5, 0, 10_000)
        self._partitions = _number(url, "partitions", -1, 1, 10_000)
        self._replicas = _number(url, "replicas", -1, 1, 100)
        self._open: list[Any] = []
        self._closed = False
        tls = url.scheme == "kafkas"
        self._settings: dict[str, Any] = {
            "bootstrap.servers": ",".join(_place(host, port) for host, port in url.hosts),
            "security.protocol": ("SASL_" if url.user else "") + ("SSL" if tls else "PLAINTEXT"),
            "client.id": "kvrep",
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 2000,
            "message.max.bytes": MESSAGE_BYTES_MAX,
            "allow.auto.create.topics": True,
        }
        if url.user:
            self._settings |= {
                "sasl.mechanism": mechanism,
                "sasl.username": url.user,
                "sasl.password": url.password,
            }
        if url.options.get("cafile"):
            self._settings["ssl.ca.location"] = url.options["cafile"]

    @property
    def url(self) -> str:
        return str(self._url)

    @property
    def topic(self) -> str:
        return self._url.options.get("topic") or self._url.path or DEFAULT_TOPIC

    @property
    def is_log(self) -> bool:
        return True

    def publisher(
        self,
        topic: str = "",
        *,
        buffer_messages: int = BUFFER_MESSAGES,
        buffer_bytes: int = BUFFER_BYTES,
        transactional_id: str = "",
    ) -> KafkaPublisher:
        self._need_open()
        settings = self._settings | {
            "enable.idempotence": True,
            "acks": "all",
            "linger.ms": self._linger_ms,
            "partitioner": "murmur2_random",
            # Never given up: the buffer's bound says when it takes too long.
            "message.timeout.ms": 0,
            # Room for one more than we let in: our own bound is the one that waits.
            "queue.buffering.max.messages": buffer_messages + 1,
            "queue.buffering.max.kbytes": (buffer_bytes >> 10) + 1024,
        }
        if transactional_id:
            settings |= {"transactional.id": transactional_id, "transaction.timeout.ms": 60_000}
        made = KafkaPublisher(self, topic or self.topic, settings, buffer_messages, buffer_bytes)
        self._open.append(made)
        return made

    def subscriber(
        self, topic: str = "", *, group: str = "kvrep", start: str = STORED, prefetch: int = 500
    ) -> KafkaSubscriber:
        self._need_open()
        settings = self._settings | {
            "group.id": group,
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "queued.max.messages.kbytes": FETCH_KIB,
            "socket.timeout.ms": REQUEST_TIMEOUT_MS,
            "fetch.wait.max.ms": 100,
            "fetch.message.max.bytes": 1 << 20,
            "receive.message.max.bytes": 64 << 20,
        }
        made = KafkaSubscriber(self, topic or self.topic, settings, start, prefetch)
        self._open.append(made)
        return made

    def _need_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the broker {self.url} is closed")

    def close(self) -> None:
        self._closed = True
        for one in self._open:
            one.close()
        self._open.clear()

    # -- for publishers and subscribers ------------------------------------------------------------

    def mapped(self, error: Any) -> Error:
        """A ``KafkaError`` in words of ours."""
        where, code, text = self.url, error.code(), error.str()
        if code in (_E._AUTHENTICATION, _E.SASL_AUTHENTICATION_FAILED, _E._SSL):
            hint = "check user, password and sasl= in the address, and cafile= with kafkas://"
            return AuthenticationFailed(f"{where} refused user {self._url.user!r}: {text}", hint=hint)
        if code in _DENIED:
            return PermissionDenied(f"{where}: {text}", hint="check the topic and the user's permissions")
        if code == _E._RESOLVE:
            return PeerUnavailable(f"{where}: {text}", hint="check the host in the address", address=where)
        if code in _SUPERSEDED:
            return Fenced(f"{where}: another publisher has this transactional id: {text}", epoch=0)
        if code in (_E.MSG_SIZE_TOO_LARGE, _E.RECORD_LIST_TOO_LARGE):
            return ValueTooLarge(f"{where}: {text}", hint="raise max.message.bytes of the topic")
        if code in (_E._TRANSPORT, _E._ALL_BROKERS_DOWN, _E._TIMED_OUT):
            hint = "check host and port, and that it runs"
            return PeerUnavailable(f"{where} cannot be reached: {text}", hint=hint, address=where)
        return ReplicationError(f"{where}: {text}")

    def partitions(self, client: Any, topic: str, faults: Faults) -> list[int]:
        """The topic's partitions, as soon as the cluster tells; raises what keeps it from telling."""
        deadline = time.monotonic() + self._timeout_s
        tried = False
        while True:
            faults.look(client)
            try:
                found = client.list_topics(topic, timeout=0.5).topics[topic]
            except ck.KafkaException as error:
                fault = self.mapped(error.args[0])
                if isinstance(fault, AuthenticationFailed | PermissionDenied):
                    raise fault from error
            else:
                if found.error is None and found.partitions:
                    return sorted(found.partitions)
                fault = self.mapped(found.error) if found.error else ReplicationError("no partitions yet")
                if isinstance(fault, PermissionDenied):
                    raise fault
                if not tried and found.error and found.error.code() == _E.UNKNOWN_TOPIC_OR_PART:
                    tried = True
                    self._create(topic)
            if time.monotonic() >= deadline:
                raise again(faults.last or fault)
            time.sleep(0.02)

    def _create(self, topic: str) -> None:
        """Make the topic; on a cluster that made it by itself meanwhile, that is no error."""
        admin = AdminClient(self._settings)
        new = NewTopic(topic, num_partitions=self._partitions, replication_factor=self._replicas)
        try:
            admin.create_topics([new], request_timeout=self._timeout_s)[topic].result(self._timeout_s)
        except ck.KafkaException as error:
            if error.args[0].code() != _E.TOPIC_ALREADY_EXISTS:
                log.info("%s: topic %r was not created: %s", self.url, topic, error)


class Faults:
    """What a client says outside of calls: its error callback, looked at by whoever waits for it."""

    def __init__(self, broker: KafkaBroker) -> None:
        self._broker = broker
        self.last: Error | None = None
        self.down = False
        self.fatal: Error | None = None

    def __call__(self, error: Any) -> None:
        if error.code() == _E._ALL_BROKERS_DOWN:
            self.down = True
            return
        self.last = self._broker.mapped(error)
        if error.fatal():
            self.fatal = self.last

    def look(self, client: Any) -> None:
        """Have the callback called for what has come up; raise it if there is no hope."""
        client.poll(0)
        if self.last is not None and (self.down or isinstance(self.last, AuthenticationFailed)):
            raise again(self.last)

    def forget(self) -> None:
        self.last, self.down = None, False


class KafkaPublisher:
    """See :class:`kvrep.brokers.interface.Publisher`."""

    def __init__(
        self,
        broker: KafkaBroker,
        topic: str,
        settings: Mapping[str, Any],
        buffer_messages: int,
        buffer_bytes: int,
    ) -> None:
        self._broker, self._topic = broker, topic
        self._messages_max, self._bytes_max = buffer_messages, buffer_bytes
        self._timeout_s = broker._timeout_s
        # Protects what follows; announces confirms to those who wait.
        self._changed = threading.Condition()
        self._waiters = 0
        self._wanted = NEVER
        """The first number that somebody waits for."""
        self._bytes = 0
        self._batches: deque[_Batch] = deque()
        """What is unconfirmed, in order; the last one is filled up."""
        self._closed = False
        self._ended: Error | None = None
        self.published = 0
        self.confirmed = 0
        self._faults = Faults(broker)
        self._producer = ck.Producer(dict(settings) | {"error_cb": self._faults}, logger=_client_log)
        self._stop = threading.Event()
        self._transactions: _Transactions | None = None
        broker.partitions(self._producer, topic, self._faults)
        self._faults.forget()
        if "transactional.id" in settings:
            self._transactions = _Transactions(self)
        self._thread = threading.Thread(target=self._poll, name="kvrep-kafka-publisher", daemon=True)
        self._thread.start()

    def publish(self, message: Message, timeout_s: float = 30.0) -> int:
        size = check_message(message, min(self._bytes_max, MESSAGE_BYTES_MAX))
        with self._changed:
            if self._bytes + size > self._bytes_max or self.published - self.confirmed >= self._messages_max:
                self._await_room(size, timeout_s)
            self._need_alive()
            if self._transactions is not None:
                self._transactions.add(message)
            batches = self._batches
            batch = batches[-1] if batches else None
            if batch is None or batch.size == BATCH_MESSAGES:
                batch = _Batch(self)
                batches.append(batch)
            # Counted first: it may be delivered before produce() returns.
            batch.size += 1
            try:
                self._produce(message, batch.on_delivery)
            except BaseException:
                batch.size -= 1
                raise
            batch.bytes += size
            self._bytes += size
            self.published += 1
            return self.published

    def _produce(self, message: Message, on_delivery: Callable[[Any, Any], None]) -> None:
        headers: list[tuple[str, Any]] = [(ID_HEADER, message.id)] if message.id else []
        if message.headers:
            headers += message.headers.items()
        try:
            self._producer.produce(
                self._topic,
                message.body,
                message.key,
                headers=headers,
                on_delivery=on_delivery,
            )
        except BufferError as error:
            raise Overloaded(f"{self._broker.url}: librdkafka's buffer is full") from error
        except ck.KafkaException as error:
            raise self._broker.mapped(error.args[0]) from error

    def _await_room(self, size: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        if self._transactions is not None:  # room comes with a commit
            self._transactions.commit(deadline)

        def room() -> bool:
            return (
                self._closed
                or self._ended is not None
                or (
                    self.published - self.confirmed < self._messages_max
                    and self._bytes + size <= self._bytes_max
                )
            )

        if not self._wait_for(room, deadline - time.monotonic()):
            raise Overloaded(
                f"{self.published - self.confirmed} messages wait to be confirmed{self._why()}",
                hint="nothing was taken; try again later",
            )

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        self._waiters += 1
        try:
            return self._changed.wait_for(condition, timeout_s)
        finally:
            self._waiters -= 1

    def _need_alive(self) -> None:
        if self._ended is not None:
            raise again(self._ended)
        if self._closed:
            raise ClosedError("the publisher is closed")

    def _why(self) -> str:
        return f": {self._faults.last}" if self._faults.last is not None else ""

    # -- confirms, on the polling thread -----------------------------------------------------------

    def _poll(self) -> None:
        producer, faults = self._producer, self._faults
        while not self._stop.is_set():
            if producer.poll(POLL_S):
                self._count()
            if faults.fatal is not None and self._ended is None:
                self.end(faults.fatal)

    def end(self, error: Error) -> None:
        """Nothing goes on after ``error``."""
        with self._changed:
            self._ended = error
            self._changed.notify_all()

    def _count(self) -> None:
        """Advance over the batches that are delivered as a whole; the open one is, if all in it are."""
        with self._changed:
            batches, before = self._batches, self.confirmed
            while batches and batches[0].delivered == batches[0].size:
                batch = batches.popleft()
                self.confirmed += batch.size
                self._bytes -= batch.bytes
            if self.confirmed == before:
                return
            self._faults.forget()
            self._wake()

    def _reached(self, number: int) -> bool:
        """Whether a wait for ``number`` is over; asks to be woken for it. The lock is held."""
        if self.confirmed >= number or self._closed or self._ended is not None:
            return True
        self._wanted = min(self._wanted, number)
        return False

    def _wake(self) -> None:
        """Wake those who wait, if it is worth it: at half of the buffer, not at every confirm. The lock is held."""
        half = (
            self._bytes * 2 <= self._bytes_max and (self.published - self.confirmed) * 2 <= self._messages_max
        )
        if self._waiters and (half or self.confirmed >= self._wanted):
            self._wanted = NEVER
            self._changed.notify_all()

    def all_confirmed(self) -> None:
        """A transaction with everything published is committed. The lock is held."""
        self.confirmed = self.published
        self._batches.clear()
        self._bytes = 0
        self._changed.notify_all()

    # -- waiting -----------------------------------------------------------------------------------

    def wait(self, number: int, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            if self._transactions is not None and self.confirmed < number:
                self._need_alive()
                self._transactions.commit(deadline)
            self._wait_for(lambda: self._reached(number), deadline - time.monotonic())
            if self._ended is not None and self.confirmed < number:
                raise again(self._ended)
            return self.confirmed >= number

    def flush(self, timeout_s: float) -> None:
        number = self.published
        if not self.wait(number, timeout_s):
            raise Unconfirmed(
                f"{number - self.confirmed} messages are not confirmed{self._why()}",
                confirmed=self.confirmed,
                published=number,
            )

    def status(self) -> PublisherStatus:
        if self._closed:
            state = "closed"
        elif self._ended is not None:
            state = "failed"
        else:
            state = "connecting" if self._faults.down else "ready"
        return PublisherStatus(
            state=state,
            problem=str(self._ended or self._faults.last or ""),
            published=self.published,
            confirmed=self.confirmed,
            buffered_bytes=self._bytes,
        )

    def close(self, timeout_s: float = 5.0) -> None:
        if self._closed:
            return
        try:
            self.wait(self.published, timeout_s)
        except Error:
            pass  # said already, by what waits or by the status
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._producer.purge()
        self._stop.set()
        self._thread.join()
        self._producer.poll(0)


class _Batch:
    """Some messages that follow each other, counted as one: a counter for each would cost more than Kafka."""

    __slots__ = ("_publisher", "bytes", "delivered", "on_delivery", "size")

    def __init__(self, publisher: KafkaPublisher) -> None:
        self._publisher = publisher
        self.size = self.delivered = self.bytes = 0
        self.on_delivery = _ignored if publisher._transactions is not None else self._on_delivery

    def _on_delivery(self, error: Any, _message: Any) -> None:
        """On the polling thread, for each message."""
        if error is None:
            self.delivered += 1
        elif error.code() not in (_E._PURGE_QUEUE, _E._PURGE_INFLIGHT):
            # librdkafka gave it up; later ones may have arrived, so that going on would break the order.
            self._publisher.end(self._publisher._broker.mapped(error))


def _ignored(_error: Any, _message: Any) -> None:
    """Of a transaction: its commit counts."""


class _Transactions:
    """What a transactional publisher does besides. Used under the publisher's lock."""

    def __init__(self, publisher: KafkaPublisher) -> None:
        self._publisher = publisher
        self._producer = publisher._producer
        self._messages: list[Message] = []
        """Of the open transaction: an abort publishes them again."""
        self._begun = False
        try:
            self._producer.init_transactions(publisher._timeout_s)
        except ck.KafkaException as error:
            raise publisher._broker.mapped(error.args[0]) from error

    def add(self, message: Message) -> None:
        if not self._begun:
            self._producer.begin_transaction()
            self._begun = True
        self._messages.append(message)

    def commit(self, deadline: float) -> None:
        """Commit what is open before ``deadline``; raises what ends this publisher."""
        publisher = self._publisher
        while self._begun and time.monotonic() < deadline:
            try:
                self._producer.commit_transaction(max(0.01, deadline - time.monotonic()))
            except ck.KafkaException as error:
                if not self._recover(error.args[0], deadline):
                    return
                continue
            self._begun = False
            self._messages.clear()
            publisher.all_confirmed()

    def _recover(self, error: Any, deadline: float) -> bool:
        """Make the best of a failed commit; whether to try again."""
        publisher = self._publisher
        if error.retriable():
            return True
        if error.code() == _E._TIMED_OUT:
            return False
        if not error.txn_requires_abort():
            publisher._ended = publisher._broker.mapped(error)
            raise again(publisher._ended)
        try:
            self._producer.abort_transaction(max(0.01, deadline - time.monotonic()))
        except ck.KafkaException as second:
            publisher._ended = publisher._broker.mapped(second.args[0])
            raise again(publisher._ended) from second
        self._producer.begin_transaction()
        for message in self._messages:
            publisher._produce(message, _ignored)
        return True


class KafkaSubscriber:
    """See :class:`kvrep.brokers.interface.Subscriber`.

    A position names, for every partition, the last offset received: ``"0:17,1:4"``.
    """

    def __init__(
        self, broker: KafkaBroker, topic: str, settings: Mapping[str, Any], start: str, prefetch: int
    ) -> None:
        self._broker, self._topic, self._prefetch = broker, topic, prefetch
        given = None if start in (STORED, EARLIEST, LATEST) else _parse(start)
        self._faults = Faults(broker)
        callbacks = {"error_cb": self._faults, "on_commit": self._on_commit}
        self._storing = 0
        """How many positions are on their way to the cluster."""
        self._consumer = ck.Consumer(dict(settings) | callbacks, logger=_client_log)
        # Protects the consumer against use after close.
        self._lock = threading.RLock()
        self._closed = False
        self._seen: dict[int, int] = {}
        self._outstanding: dict[int, Outstanding] = {}
        self._stored: dict[int, int] = {}
        try:
            # A consumer that reads nothing yet may be polled only once it is assigned something.
            self._consumer.assign([])
            partitions = broker.partitions(self._consumer, topic, self._faults)
            self._assign(partitions, start, given)
        except BaseException:
            self._consumer.close()
            raise
        self._faults.forget()
        self._look_again = time.monotonic() + PARTITIONS_CHECK_S

    def _assign(self, partitions: list[int], start: str, given: dict[int, int] | None) -> None:
        special = {EARLIEST: ck.OFFSET_BEGINNING, LATEST: ck.OFFSET_END}
        places = [ck.TopicPartition(self._topic, one) for one in partitions]
        if given is not None:
            for place in places:
                last = given.get(place.partition)
                place.offset = ck.OFFSET_BEGINNING if last is None else last + 1
            self._seen = dict(given)
        elif start == STORED:
            places = self._committed(places)
        else:
            for place in places:
                place.offset = special[start]
            if start == LATEST:  # the end as of now, not as of the first fetch
                for place in places:
                    _, place.offset = self._consumer.get_watermark_offsets(place, self._broker._timeout_s)
        for place in places:
            self._outstanding[place.partition] = Outstanding()
        self._consumer.assign(places)

    def _committed(self, places: list[Any]) -> list[Any]:
        try:
            stored = self._consumer.committed(places, self._broker._timeout_s)
        except ck.KafkaException as error:
            raise self._broker.mapped(error.args[0]) from error
        for place in stored:
            if place.offset < 0:
                place.offset = ck.OFFSET_BEGINNING
            else:
                self._seen[place.partition] = place.offset - 1
        return list(stored)

    @property
    def problem(self) -> str:
        faults = self._faults
        return str(faults.last or "no broker of the cluster answers") if faults.down else ""

    def receive(self, max_messages: int, timeout_s: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if self._closed:
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
            elif error.fatal() or error.code() in (*_DENIED, _E._AUTHENTICATION):
                raise self._broker.mapped(error)
            elif error.code() == _E._AUTO_OFFSET_RESET:
                raise ReplicationError(f"{self._broker.url}: the position is gone: {error.str()}")
        if found:
            self._faults.forget()
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
            if self._closed:
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
            log.info("%s: positions were not stored: %s", self._broker.url, error)

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
                log.info("%s: positions were not stored: %s", self._broker.url, error)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
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


def _number(url: BrokerUrl, name: str, default: int, low: int, high: int) -> int:
    text = url.options.get(name)
    if text is None:
        return default
    if not text.isdecimal() or not low <= int(text) <= high:
        raise ConfigurationMismatch(
            f"{name}={text!r} is not allowed: {low} to {high}", option=name, given=text
        )
    return int(text)


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port or PORT}" if ":" in host else f"{host}:{port or PORT}"
