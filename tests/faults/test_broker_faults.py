"""What bad luck with brokers gets: killed, blocking, full, wrongly addressed, superseded."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import brokers
from kvrep.brokers import Message
from kvrep.errors import (
    AuthenticationFailed,
    ConfigurationMismatch,
    Error,
    Fenced,
    OpenError,
    Overloaded,
    PeerUnavailable,
    PermissionDenied,
)
from tests.broker_kit import WAIT_S, Site, numbers, read
from tests.kafka_kit import REAL, KafkaCluster
from tests.rabbit_kit import RabbitServer
from tests.relay_kit import far, publishing
from tests.replication_kit import FAST, same, until

AT_ONCE_S = 8.0


@pytest.fixture
def rabbitmq(shared_rabbitmq: RabbitServer) -> Iterator[RabbitServer]:
    """The RabbitMQ that all tests share, running again afterwards whatever was done to it."""
    yield shared_rabbitmq
    shared_rabbitmq.control("set_vm_memory_high_watermark", "0.4")


@pytest.mark.parametrize("stream", [False, True], ids=["queue", "stream"])
def test_rabbitmq_killed_in_the_middle(shared_rabbitmq: RabbitServer, stream: bool) -> None:
    """kill -9 and a restart while messages flow: all that was published arrives, in order. (RabbitMQ 3.10 does
    not find a stream again after a kill -9 of its only node, so with a stream it is SIGTERM.)"""
    broker = brokers.connect(shared_rabbitmq.url(Site.topic(), stream=stream))
    publisher, subscriber = broker.publisher(buffer_messages=200), broker.subscriber()
    count = 3000
    killed = threading.Event()

    def publish() -> None:
        for n in range(1, count + 1):
            if n == count // 3:
                killed.wait(WAIT_S)
            publisher.publish(Message(b"%d" % n, key=b"k"), 60)

    thread = threading.Thread(target=publish)
    thread.start()
    found: list[int] = []
    confirmed = 0
    while len(set(found)) < count:
        deliveries = subscriber.receive(100, 60)
        assert deliveries, f"{len(set(found))} of {count} came"
        found += numbers(deliveries)
        subscriber.ack(deliveries[-1])
        if not killed.is_set() and len(found) > 300:
            confirmed = publisher.confirmed
            if stream:
                shared_rabbitmq.terminate()
            else:
                shared_rabbitmq.kill()
            killed.set()
            shared_rabbitmq.start()
    thread.join()
    publisher.flush(WAIT_S)
    assert confirmed > 0
    assert publisher.confirmed == count
    assert publisher.status().reconnects == 1
    first_seen = list(dict.fromkeys(found))
    assert first_seen == list(range(1, count + 1))
    broker.close()


def test_a_far_store_through_a_killed_rabbitmq(shared_rabbitmq: RabbitServer, memory_path: Path) -> None:
    """The broker between two stores is killed and comes back: the far one ends up the same."""
    url = shared_rabbitmq.url(Site.topic())
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with publishing(primary, url, name="far") as relay, far(memory_path / "f", url, **FAST) as f:
            f.wait_for(primary.put(b"before", b"1"), 20)
            shared_rabbitmq.kill()
            for i in range(500):
                primary.put(b"key-%d" % i, b"v" * 500)
            until(lambda: relay.relay.status().broker == "connecting")
            shared_rabbitmq.start()
            f.wait_for(primary.put(b"after", b"2"), 60)
            same(primary, f)


def test_a_rabbitmq_that_blocks_publishers(rabbitmq: RabbitServer) -> None:
    """A memory alarm is back-pressure: the status says so, the buffer fills, and nothing is lost."""
    broker = brokers.connect(rabbitmq.url(Site.topic()))
    publisher = broker.publisher(buffer_messages=20)
    rabbitmq.control("set_vm_memory_high_watermark", "absolute", "1")
    with pytest.raises(Overloaded, match="blocks publishers"):
        for n in range(1, 100):
            publisher.publish(Message(b"%d" % n, key=b"k"), 2.0)
    status = publisher.status()
    assert status.state == "blocked"
    assert "low on memory" in status.problem
    assert status.published == status.confirmed + 20
    rabbitmq.control("set_vm_memory_high_watermark", "0.4")
    publisher.flush(WAIT_S)
    assert publisher.status().state == "ready"
    assert numbers(read(broker.subscriber(), status.published)) == list(range(1, status.published + 1))
    broker.close()


def test_a_queue_that_is_full(shared_rabbitmq: RabbitServer) -> None:
    """A queue that refuses messages is back-pressure, too: they are sent again until there is room."""
    import pika

    topic = Site.topic()
    with pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", shared_rabbitmq.port)) as connection:
        arguments = {"x-max-length": 10, "x-overflow": "reject-publish"}
        connection.channel().queue_declare(topic, durable=True, arguments=arguments)
    broker = brokers.connect(shared_rabbitmq.url(topic))
    publisher = broker.publisher(buffer_messages=30)
    with pytest.raises(Overloaded, match="is the queue full"):
        for n in range(1, 100):
            publisher.publish(Message(b"%d" % n, key=b"k"), 1.0)
    published = publisher.published
    assert 10 <= publisher.confirmed < published
    subscriber = broker.subscriber()
    found: list[int] = []
    while len(set(found)) < published:
        deliveries = subscriber.receive(5, WAIT_S)
        found += numbers(deliveries)
        subscriber.ack(deliveries[-1])
    publisher.flush(WAIT_S)
    assert set(found) == set(range(1, published + 1))
    broker.close()


def test_what_follows_a_refused_message_comes_behind_it(
    shared_rabbitmq: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that refuses a message and stores a later one of its key gets that again: the last state is right."""
    import pika

    from kvrep.brokers.rabbitmq.publisher import RabbitPublisher

    held: list[Any] = []
    holding = True
    on_confirm = RabbitPublisher._on_confirm

    def confirm(publisher: RabbitPublisher, frame: Any) -> None:
        if holding:
            held.append(frame)
        else:
            on_confirm(publisher, frame)

    monkeypatch.setattr(RabbitPublisher, "_on_confirm", confirm)
    topic = Site.topic()
    with pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", shared_rabbitmq.port)) as connection:
        arguments = {"x-max-length": 2, "x-overflow": "reject-publish"}
        connection.channel().queue_declare(topic, durable=True, arguments=arguments)
    broker = brokers.connect(shared_rabbitmq.url(topic))
    publisher: Any = broker.publisher()
    for n in (1, 2, 3):
        publisher.publish(Message(b"%d" % n, key=b"k"))
    until(lambda: any(frame.method.NAME == "Basic.Nack" for frame in held))
    subscriber = broker.subscriber()
    found = numbers(read(subscriber, 2))
    publisher.publish(Message(b"4", key=b"k"))
    publisher.publish(Message(b"5", key=b"another"))
    found += numbers(read(subscriber, 2))
    assert found == [1, 2, 4, 5]

    def let_go() -> None:
        nonlocal holding
        holding = False
        for frame in held:
            on_confirm(publisher, frame)

    publisher._link.call(let_go)

    def settled() -> bool:
        found.extend(numbers(subscriber.receive(10, 0.05)))
        return publisher.confirmed == 5 and found[-1] == 4

    until(settled)
    assert list(dict.fromkeys(reversed(found))) == [4, 3, 5, 2, 1]
    assert found.count(5) == 1
    broker.close()


@pytest.mark.parametrize("stream", [False, True], ids=["queue", "stream"])
def test_what_waits_is_bounded_in_bytes(
    shared_rabbitmq: RabbitServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Large messages behind small ones: few are held, none is lost, and who needs more of them unacked gets more."""
    from kvrep.brokers.rabbitmq import subscriber as module

    monkeypatch.setattr(module, "BUFFER_BYTES", 1 << 20)
    broker = brokers.connect(shared_rabbitmq.url(Site.topic(), stream=stream))
    publisher = broker.publisher()
    for n in range(1, 201):
        publisher.publish(Message(b"%d" % n + (b" " * 65_536 if n > 50 else b"")))
        if stream:
            publisher.flush(WAIT_S)  # what a stream got at one time is sent at one time
    publisher.flush(WAIT_S)
    peak = 0
    on_message = module.RabbitSubscriber._on_message

    def watched(self: Any, *arrived: Any) -> None:
        nonlocal peak
        on_message(self, *arrived)
        peak = max(peak, self._held)

    monkeypatch.setattr(module.RabbitSubscriber, "_on_message", watched)
    subscriber: Any = broker.subscriber()
    until(lambda: subscriber._link.reconnects == 1)
    assert peak < (2 << 20) + (128 << 10)
    last: dict[int, Any] = {}  # nothing is acked before all are here
    deadline = time.monotonic() + WAIT_S
    while len(last) < 200 and time.monotonic() < deadline:
        last |= {int(d.message.body): d for d in subscriber.receive(7, 0.1)}
    assert sorted(last) == list(range(1, 201))
    assert peak < (2 << 20) + (128 << 10)
    assert subscriber._link.reconnects == 1
    subscriber.ack(last[120])
    publisher.publish(Message(b"201"))
    until(lambda: last.update({int(d.message.body): d for d in subscriber.receive(7, 0.1)}) or 201 in last)
    for n in (122, *range(124, 202), 121):
        subscriber.ack(last[n], through=False)
    subscriber.close()
    expected = set(range(123, 202)) if stream else {123}
    again, rest = broker.subscriber(), set[int]()
    # A reader that learns anew how large messages are begins again: some come twice.
    until(lambda: rest.update(int(d.message.body) for d in again.receive(7, 0.1)) or rest >= expected)
    assert rest == expected
    broker.close()


def test_who_wants_more_before_a_stream_is_read_again_misses_nothing(
    shared_rabbitmq: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a window was taken when the connection broke: what is not acked comes again, whenever one asks for it."""
    from kvrep.brokers.rabbitmq.subscriber import RabbitSubscriber

    broker = brokers.connect(shared_rabbitmq.url(Site.topic(), stream=True))
    publisher = broker.publisher()
    for n in range(1, 6):
        publisher.publish(Message(b"%d" % n))
    publisher.flush(WAIT_S)
    subscriber: Any = broker.subscriber(prefetch=5)
    assert numbers(read(subscriber, 5)) == [1, 2, 3, 4, 5]
    begin = RabbitSubscriber._read_position

    def asked_meanwhile(self: Any, channel: Any) -> None:
        self.receive(1, 0.0)
        begin(self, channel)

    monkeypatch.setattr(RabbitSubscriber, "_read_position", asked_meanwhile)
    subscriber._link.call(lambda: subscriber._link.break_off("a test"))
    until(lambda: subscriber._link.reconnects == 1)
    assert numbers(read(subscriber, 5)) == [1, 2, 3, 4, 5]
    broker.close()


@pytest.mark.parametrize("stream", [False, True], ids=["queue", "stream"])
def test_messages_above_the_bound_arrive(
    shared_rabbitmq: RabbitServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Messages that are each larger than all that may wait come one by one."""
    from kvrep.brokers.rabbitmq import subscriber as module

    monkeypatch.setattr(module, "BUFFER_BYTES", 1 << 20)
    broker = brokers.connect(shared_rabbitmq.url(Site.topic(), stream=stream))
    publisher = broker.publisher()
    for n in range(3):
        publisher.publish(Message(b"%d" % n + b" " * (3 << 20)))
        publisher.flush(WAIT_S)
    subscriber: Any = broker.subscriber()
    found: list[int] = []
    for _ in range(3 + 2):  # what came before the connection was broken off comes again
        for delivery in read(subscriber, 1):
            found += numbers([delivery])
            subscriber.ack(delivery)
        if found[-1] == 2:
            break
    assert list(dict.fromkeys(found)) == [0, 1, 2]
    assert subscriber._link.reconnects == 1
    broker.close()


def test_a_queue_that_is_deleted(shared_rabbitmq: RabbitServer) -> None:
    """A queue that somebody deletes is made anew; nothing that is published later vanishes."""
    import pika

    topic = Site.topic()
    broker = brokers.connect(shared_rabbitmq.url(topic))
    publisher, subscriber = broker.publisher(), broker.subscriber()
    publisher.publish(Message(b"1"))
    publisher.flush(WAIT_S)
    assert numbers(read(subscriber, 1)) == [1]
    with pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", shared_rabbitmq.port)) as connection:
        connection.channel().queue_delete(topic)
    for n in range(2, 12):
        publisher.publish(Message(b"%d" % n))
    publisher.flush(WAIT_S)
    assert numbers(read(subscriber, 10)) == list(range(2, 12))
    broker.close()


def test_wrong_ways_into_rabbitmq(shared_rabbitmq: RabbitServer) -> None:
    """Credentials, virtual host, host and port that are wrong are named at once, and nothing is left running."""
    server = shared_rabbitmq
    with socket.create_server(("127.0.0.1", 0)) as other:
        answering = threading.Thread(target=_say_hello, args=(other,))
        answering.start()
        cases: list[tuple[str, type[Error], str]] = [
            (server.url("t", user="guest:wrong"), AuthenticationFailed, "check user and password"),
            (server.url("t", user="nobody:guest"), AuthenticationFailed, "user 'nobody'"),
            (server.url("t", vhost="nowhere"), PermissionDenied, "virtual host 'nowhere'"),
            ("amqp://guest:guest@127.0.0.1:1/", PeerUnavailable, "check host and port"),
            ("amqp://guest:guest@no-such-host.invalid/", PeerUnavailable, "check the host"),
            (f"amqp://127.0.0.1:{other.getsockname()[1]}/", Error, "127.0.0.1"),
        ]
        for url, kind, text in cases:
            began = time.monotonic()
            broker = brokers.connect(url)
            with pytest.raises(kind, match=text) as error:
                broker.publisher()
            assert time.monotonic() - began < AT_ONCE_S
            assert "wrong" not in str(error.value), "a password is nobody's business"
            with pytest.raises(kind, match=text):
                broker.subscriber()
            broker.close()
        answering.join()


def _say_hello(server: socket.socket) -> None:
    """What answers on a port that is not RabbitMQ's: twice, for a publisher and a subscriber."""
    for _ in range(2):
        connection, _ = server.accept()
        with connection:
            connection.recv(8)
            connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n")


def test_a_queue_is_no_stream(shared_rabbitmq: RabbitServer) -> None:
    """A queue read as a stream is refused, not read in a way that loses its place."""
    topic = Site.topic()
    broker = brokers.connect(shared_rabbitmq.url(topic))
    publisher = broker.publisher()
    publisher.publish(Message(b"1"))
    publisher.flush(WAIT_S)
    stream = brokers.connect(shared_rabbitmq.url(topic, stream=True))
    with pytest.raises(ConfigurationMismatch, match="something else"):
        read(stream.subscriber(), 1)
    stream.close()
    assert numbers(read(broker.subscriber(), 1)) == [1]
    broker.close()


def test_closing_while_it_still_begins(
    shared_rabbitmq: RabbitServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A subscriber of a stream that is closed before it knows its position ends without an error in the log."""
    broker = brokers.connect(shared_rabbitmq.url(Site.topic(), stream=True))
    broker.publisher().close()
    for _ in range(10):
        publisher, subscriber = broker.publisher(), broker.subscriber()
        publisher.close()  # about as long as the questions of the subscriber take
        subscriber.close()
    broker.close()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_wrong_ways_into_kafka(shared_kafka: KafkaCluster) -> None:
    """Host, port and credentials that are wrong are named at once."""
    cases: list[tuple[str, type[Error], str]] = [
        ("kafka://127.0.0.1:1/t", PeerUnavailable, "check host and port"),
        ("kafka://no-such-host.invalid/t", PeerUnavailable, "check"),
        (f"kafka://user:wrong@{shared_kafka.address}/t", AuthenticationFailed, "check user, password"),
    ]
    for url, kind, text in cases:
        broker = brokers.connect(url)
        began = time.monotonic()
        with pytest.raises(kind, match=text) as error:
            broker.publisher()
        with pytest.raises(kind, match=text):
            broker.subscriber()
        assert time.monotonic() - began < 2 * AT_ONCE_S
        assert "wrong" not in str(error.value)
        broker.close()


def test_kafka_transactions(shared_kafka: KafkaCluster) -> None:
    """What is committed is read and counted. A real cluster also hides what is not committed and shuts out the
    old publisher of an id; librdkafka's mock does neither."""
    topic = Site.topic()
    broker = brokers.connect(shared_kafka.url(topic))
    old = broker.publisher(transactional_id=topic)
    for n in range(1, 11):
        old.publish(Message(b"%d" % n, key=b"k"))
    old.flush(WAIT_S)
    assert old.confirmed == 10
    for n in range(11, 21):
        old.publish(Message(b"%d" % n, key=b"k"))
    subscriber = broker.subscriber()
    assert numbers(read(subscriber, 10)) == list(range(1, 11))
    if REAL:
        assert subscriber.receive(10, 0.5) == []
    new = broker.publisher(transactional_id=topic)  # aborts what the old one has not committed
    for n in range(21, 31):
        new.publish(Message(b"%d" % n, key=b"k"))
    new.flush(WAIT_S)
    assert numbers(read(subscriber, 10 if REAL else 20))[-10:] == list(range(21, 31))
    assert new.confirmed == 10
    if REAL:
        with pytest.raises(Fenced, match="another publisher"):
            old.flush(WAIT_S)
        assert old.confirmed == 10
        assert old.status().state == "failed"
    broker.close()


def test_transactions_are_committed_when_the_buffer_is_full(shared_kafka: KafkaCluster) -> None:
    """Without a flush, a full buffer commits: nothing waits for ever."""
    broker = brokers.connect(shared_kafka.url(Site.topic()))
    publisher = broker.publisher(transactional_id=Site.topic(), buffer_messages=10)
    for n in range(1, 36):
        publisher.publish(Message(b"%d" % n, key=b"k"), WAIT_S)
    assert publisher.confirmed == 30
    assert numbers(read(broker.subscriber(), 30)) == list(range(1, 31))
    broker.close()


def test_a_group_that_was_set_back(shared_kafka: KafkaCluster) -> None:
    """Somebody's tool set a group to the beginning of all partitions: it is read from there, and acked."""
    import confluent_kafka as ck

    topic = Site.topic()
    broker = brokers.connect(shared_kafka.url(topic))
    publisher = broker.publisher()
    publisher.publish(Message(b"1", key=b"k"))
    publisher.flush(WAIT_S)
    tool = ck.Consumer({"bootstrap.servers": shared_kafka.address, "group.id": "far"})
    places = [ck.TopicPartition(topic, p, 0) for p in tool.list_topics(topic).topics[topic].partitions]
    tool.commit(offsets=places, asynchronous=False)
    tool.close()
    subscriber = broker.subscriber(group="far")
    (delivery,) = read(subscriber, 1)
    subscriber.ack(delivery)
    broker.close()
    again = brokers.connect(shared_kafka.url(topic))
    assert again.subscriber(group="far").receive(1, 0.5) == []
    again.close()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the error is one line that says what to install."""
    import sys

    for module in [name for name in sys.modules if name.startswith("kvrep.brokers.rabbitmq")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pika", None)
    with pytest.raises(OpenError, match=r'pip install "kvrep\[rabbitmq\]"'):
        brokers.connect("amqp://localhost/")
