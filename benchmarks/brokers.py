"""Publishing with confirms, against the bare client libraries doing the same."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import kvrep
from benchmarks.measure import Bench, Bound, Outcome, figure
from benchmarks.peer import peak_mb
from benchmarks.stores import LARGE_VALUE, VALUE, put_singly
from kvrep import brokers
from kvrep.brokers import Message

BODY = b"x" * 200
WINDOW = 10_000
"""How many messages may be unconfirmed, on both sides."""
BURST = 128
TIMEOUT_S = 120.0
RSS_MIB_MAX = 200.0
MEMORY_MB_MAX = 200.0
RABBITMQ = bool(find_spec("pika")) and os.access("/usr/lib/rabbitmq/bin/rabbitmq-server", os.X_OK)
KAFKA = bool(find_spec("confluent_kafka"))
_topics = count(1)


def _topic() -> str:
    return f"bench-{time.time_ns()}-{next(_topics)}"


def _messages(number: int) -> list[Message]:
    return [Message(BODY, key=b"key-%d" % (i % 100), id=str(i)) for i in range(number)]


def _ours(url: str, messages: list[Message]) -> float:
    """Messages per second, until the last is confirmed."""
    broker = brokers.connect(url)
    try:
        publisher = broker.publisher(buffer_messages=WINDOW)
        began = time.perf_counter()
        for message in messages:
            publisher.publish(message, TIMEOUT_S)
        publisher.flush(TIMEOUT_S)
        return len(messages) / (time.perf_counter() - began)
    finally:
        broker.close()


class BarePika:
    """An asynchronous publisher on one thread, with confirms, as pika's own example has it."""

    def __init__(self, port: int, queue: str, messages: list[Message]) -> None:
        import pika

        self._messages, self._queue = messages, queue
        self._next = self._confirmed = 0
        self._began = self._ended = 0.0
        self._scheduled = False
        self._channel: Any = None
        self._properties: Callable[..., Any] = pika.BasicProperties
        self._connection = pika.SelectConnection(
            pika.ConnectionParameters("127.0.0.1", port),
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._on_channel),
            on_close_callback=lambda connection, _: connection.ioloop.stop(),
        )

    def run(self) -> float:
        self._connection.ioloop.start()
        self._connection.ioloop.close()
        return len(self._messages) / (self._ended - self._began)

    def _on_channel(self, channel: Any) -> None:
        self._channel = channel
        channel.confirm_delivery(self._on_confirm)
        channel.queue_declare(self._queue, durable=True, callback=lambda _: self._begin())

    def _begin(self) -> None:
        self._began = time.perf_counter()
        self._publish()

    def _publish(self) -> None:
        self._scheduled = False
        end = min(self._next + BURST, self._confirmed + WINDOW, len(self._messages))
        for i in range(self._next, end):
            message = self._messages[i]
            self._channel.basic_publish(
                "",
                self._queue,
                message.body,
                self._properties(delivery_mode=2, message_id=message.id, headers={"kvrep-key": message.key}),
                mandatory=True,
            )
        self._next = end
        if end < len(self._messages) and end < self._confirmed + WINDOW:
            self._scheduled = True
            self._connection.ioloop.add_callback_threadsafe(self._publish)

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        assert method.NAME == "Basic.Ack"
        if method.multiple:
            self._confirmed = max(self._confirmed, method.delivery_tag)
        else:
            self._confirmed += 1
        if self._confirmed >= len(self._messages):
            self._ended = time.perf_counter()
            self._connection.close()
        elif not self._scheduled:
            self._publish()


def _bare_kafka(address: str, topic: str, messages: list[Message]) -> float:
    """A producer with a delivery callback, polled as its documentation says."""
    import confluent_kafka

    confirmed = 0

    def delivered(error: Any, _message: Any) -> None:
        nonlocal confirmed
        assert error is None
        confirmed += 1

    producer = confluent_kafka.Producer(
        {
            "bootstrap.servers": address,
            "enable.idempotence": True,
            "acks": "all",
            "linger.ms": 5,
            "queue.buffering.max.messages": WINDOW,
        }
    )
    producer.list_topics(topic, timeout=10)
    began = time.perf_counter()
    for message in messages:
        while True:
            try:
                producer.produce(
                    topic,
                    message.body,
                    message.key,
                    headers=[("kvrep-id", message.id)],
                    on_delivery=delivered,
                )
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)
    producer.flush(TIMEOUT_S)
    assert confirmed == len(messages)
    return len(messages) / (time.perf_counter() - began)


def rabbitmq(bench: Bench) -> Outcome:
    from tests.rabbit_kit import RabbitServer

    messages = _messages(bench.size(40_000, 500))
    with tempfile.TemporaryDirectory(prefix="kvrep-bench-") as folder:
        server = RabbitServer(Path(folder))
        server.start()
        try:
            outcome = bench.alternate(
                lambda: _ours(server.url(_topic()), messages),
                lambda: BarePika(server.port, _topic(), messages).run(),
                pairs=1 if bench.quick else None,
            )
            if not bench.quick:
                outcome.bounds.append(_backlog(server.url(_topic()), server.freeze, server.thaw))
            return outcome
        finally:
            server.stop()


def kafka(bench: Bench) -> Outcome:
    from tests.kafka_kit import KafkaCluster

    messages = _messages(bench.size(200_000, 500))
    cluster = KafkaCluster()
    cluster.start()
    try:
        outcome = bench.alternate(
            lambda: _ours(cluster.url(_topic()), messages),
            lambda: _bare_kafka(cluster.address, _topic(), messages),
            pairs=1 if bench.quick else None,
        )
        outcome.notes.append("librdkafka's mock cluster of three brokers, in a process of its own")
        if not bench.quick:
            outcome.bounds.append(_backlog(cluster.url(_topic()), cluster.freeze, cluster.thaw))
        return outcome
    finally:
        cluster.stop()


def memory(bench: Bench) -> Outcome:
    """What ``kvrep publish`` has allocated at the most while it works off a backlog, into each kind of broker."""
    outcome, most = Outcome("MB"), 0.0
    for records, value in ((bench.size(400_000, 2000), VALUE), (bench.size(4000, 40), LARGE_VALUE)):
        with bench.path("store") as path, kvrep.open(path, listen="127.0.0.1:0") as db:
            put_singly(db, records, value)
            peaks = {
                name: peak_mb("RssAnon", "publish", db.address, "--to", url, "--until-caught-up")
                for name, url in _brokers()
            }
        most = max(most, *peaks.values())
        found = ", ".join(f"{name} {peak:.1f} MB" for name, peak in peaks.items())
        outcome.notes.append(f"{records:,} records of {len(value):,} bytes: {found}")
    outcome.bounds.append(Bound("the most of all", most, MEMORY_MB_MAX, "MB"))
    return outcome


def _brokers() -> Iterator[tuple[str, str]]:
    """The brokers that are here, each with the address of a new topic; they run meanwhile."""
    if RABBITMQ:
        from tests.rabbit_kit import RabbitServer

        with tempfile.TemporaryDirectory(prefix="kvrep-bench-") as folder:
            server = RabbitServer(Path(folder))
            server.start()
            try:
                yield "RabbitMQ queue", server.url(_topic())
                yield "RabbitMQ stream", server.url(_topic(), stream=True)
            finally:
                server.stop()
    if KAFKA:
        from tests.kafka_kit import KafkaCluster

        cluster = KafkaCluster()
        cluster.start()
        try:
            yield "Kafka", cluster.url(_topic())
        finally:
            cluster.stop()


def _backlog(url: str, freeze: Callable[[], None], thaw: Callable[[], None]) -> Bound:
    """The memory of a process that publishes more and more while the broker says nothing."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.brokers", url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "connected\n"
        freeze()
        try:
            child.stdin.write("go\n")
            child.stdin.flush()
            mib = float(child.stdout.readline())
        finally:
            thaw()
            child.kill()
    return Bound("memory of a publisher with a full buffer", mib, RSS_MIB_MAX, "MiB")


def _fill(url: str) -> None:
    """The child of ``_backlog``: 64 KiB messages until there is no room; prints its memory in MiB."""
    from kvrep.errors import Overloaded

    publisher = brokers.connect(url).publisher()
    publisher.publish(Message(b"x"))
    publisher.flush(TIMEOUT_S)
    print("connected", flush=True)
    sys.stdin.readline()
    try:
        while True:
            publisher.publish(Message(os.urandom(64 << 10), key=b"k"), 1.0)
    except Overloaded:
        pass
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    print(pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), flush=True)
    sys.stdin.readline()


# Registered where there is something to measure.
if RABBITMQ:
    figure(41, "rabbitmq", "publishing 200-byte messages to RabbitMQ, confirmed",
           "bare pika doing the same", 0.8)(rabbitmq)  # fmt: skip
if KAFKA:
    figure(42, "kafka", "publishing 200-byte messages to Kafka, confirmed",
           "a bare confluent-kafka producer", 0.7)(kafka)  # fmt: skip
if RABBITMQ or KAFKA:
    figure(
        43, "publish-memory", "memory of kvrep publish (RssAnon) at a large backlog, into RabbitMQ and Kafka"
    )(memory)

if __name__ == "__main__":
    _fill(sys.argv[1])
