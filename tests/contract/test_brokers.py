"""What every broker keeps: the in-memory twin, RabbitMQ's queues and streams, Kafka, and the one in examples/."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from kvrep import brokers
from kvrep.brokers import EARLIEST, LATEST, STORED, Message, Unconfirmed
from kvrep.errors import ClosedError, ConfigurationMismatch, OpenError, Overloaded, ValueTooLarge
from tests.broker_kit import WAIT_S, Site, in_order, numbered, numbers, read


def test_what_goes_in_comes_out(site: Site) -> None:
    """Body, key, headers and id arrive as they were, whatever bytes they are."""
    broker = site.connect()
    sent = [
        Message(b"\x00\xff body", key=b"\x00\xffkey", headers={"type": "put", "où": "là"}, id="a/1"),
        Message(b"", key=b"k"),
        Message(b"x" * (3 << 20), key=b"k", id="large"),
    ]
    publisher, subscriber = broker.publisher(), broker.subscriber()
    assert [publisher.publish(message) for message in sent] == [1, 2, 3]
    publisher.flush(WAIT_S)
    assert {d.message.id: d.message for d in read(subscriber, 3)} == {m.id: m for m in sent}


def test_confirms_are_counted_without_gaps(site: Site) -> None:
    """After a flush everything is confirmed, and all of it arrives in order per key."""
    broker = site.connect()
    publisher = broker.publisher()
    for message in numbered(1, 1000):
        number = publisher.publish(message)
        assert publisher.confirmed <= number == publisher.published
    publisher.flush(WAIT_S)
    status = publisher.status()
    assert (publisher.confirmed, status.confirmed, status.published) == (1000, 1000, 1000)
    assert (status.state, status.buffered_bytes) == ("ready", 0)
    assert publisher.wait(1000, 0)
    found = read(broker.subscriber(prefetch=1000), 1000)
    in_order(found)
    assert sorted(numbers(found)) == list(range(1, 1001))


def test_unacked_messages_come_again(site: Site) -> None:
    """What was not acked when a subscriber closed arrives again for its group; what was acked does not."""
    broker = site.connect()
    publisher = broker.publisher()
    for n in range(1, 11):
        publisher.publish(Message(b"%d" % n, key=b"k"))
    publisher.flush(WAIT_S)
    first = broker.subscriber()
    found = read(first, 10)
    assert numbers(found) == list(range(1, 11))
    first.ack(found[5])
    first.close()
    second = broker.subscriber()
    assert numbers(read(second, 4)) == [7, 8, 9, 10]


def test_single_acks(site: Site) -> None:
    """An ack of one delivery leaves earlier ones to come again: a queue's exactly, a log's with all behind."""
    broker = site.connect()
    publisher = broker.publisher()
    for n in range(1, 6):
        publisher.publish(Message(b"%d" % n, key=b"k"))
    publisher.flush(WAIT_S)
    first = broker.subscriber()
    found = read(first, 5)
    for index in (0, 2, 4):
        first.ack(found[index], through=False)
        first.ack(found[index], through=False)  # a second time says nothing new
    first.close()
    second = broker.subscriber()
    left = [2, 3, 4, 5] if broker.is_log else [2, 4]
    again = read(second, len(left))
    assert numbers(again) == left
    second.ack(again[-1])
    second.ack(again[0])
    assert second.receive(10, 0.3) == []


def test_a_log_starts_anywhere(site: Site) -> None:
    """A log can be read from its beginning, its end or a position, by any number of groups; a queue cannot."""
    broker = site.connect()
    publisher = broker.publisher()
    for n in range(1, 11):
        publisher.publish(Message(b"%d" % n, key=b"k"))
    publisher.flush(WAIT_S)
    if not broker.is_log:
        for start in (LATEST, "5"):
            with pytest.raises(OpenError):
                broker.subscriber(start=start)
        assert numbers(read(broker.subscriber(start=EARLIEST), 10)) == list(range(1, 11))
        return
    one, other = broker.subscriber(group="one"), broker.subscriber(group="other", start=STORED)
    found = read(one, 10)
    one.ack(found[-1])
    assert numbers(read(other, 10)) == list(range(1, 11))
    latest = broker.subscriber(group="late", start=LATEST)
    behind = broker.subscriber(group="behind", start=found[6].position)
    assert numbers(read(behind, 3)) == [8, 9, 10]
    publisher.publish(Message(b"11", key=b"k"))
    publisher.flush(WAIT_S)
    assert numbers(read(latest, 1)) == [11]
    assert numbers(read(one, 1)) == [11]
    assert numbers(read(broker.subscriber(group="one", start=EARLIEST), 11)) == list(range(1, 12))
    with pytest.raises(OpenError):
        broker.subscriber(start="nowhere")


def test_prefetch_bounds_what_waits_for_its_ack(site: Site) -> None:
    """No more than ``prefetch`` deliveries come before one is acked; then the next come."""
    broker = site.connect()
    publisher = broker.publisher()
    for n in range(1, 31):
        publisher.publish(Message(b"%d" % n, key=b"k"))
    publisher.flush(WAIT_S)
    subscriber = broker.subscriber(prefetch=10)
    found = read(subscriber, 10)
    assert subscriber.receive(100, 0.3) == []
    subscriber.ack(found[-1])
    assert numbers(read(subscriber, 10)) == list(range(11, 21))


def test_an_outage_fills_the_buffer_and_loses_nothing(site: Site) -> None:
    """While nobody answers, messages are taken up to the bound, then refused; afterwards all arrive in order."""
    broker = site.connect()
    publisher = broker.publisher(buffer_messages=50)
    publisher.publish(Message(b"1", key=b"key-1"))
    publisher.flush(WAIT_S)
    sent = 1
    with site.outage():
        with pytest.raises(Overloaded):
            for message in numbered(2, 100):
                publisher.publish(message, timeout_s=0.3)
                sent += 1
        with pytest.raises(Unconfirmed) as error:
            publisher.flush(0.2)
        assert error.value.published == sent == 51
        assert error.value.confirmed < sent
    for message in numbered(sent + 1, 100):
        publisher.publish(message, WAIT_S)
    publisher.flush(WAIT_S)
    subscriber = broker.subscriber()
    found = read(subscriber, 100)
    while set(numbers(found)) != set(range(1, 101)):
        found += read(subscriber, 1)
    in_order(found)


def test_threads_share_a_publisher(site: Site) -> None:
    """Several threads publish at once: each one's messages stay in order, and none is lost."""
    broker = site.connect()
    publisher = broker.publisher(buffer_messages=64)

    def run(thread: int) -> None:
        for n in range(200):
            publisher.publish(Message(b"%d" % (n + 1), key=b"thread-%d" % thread), WAIT_S)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    publisher.flush(WAIT_S)
    assert publisher.confirmed == 800
    found = read(broker.subscriber(prefetch=1000), 800)
    for i in range(4):
        mine = [d for d in found if d.message.key == b"thread-%d" % i]
        assert numbers(mine) == list(range(1, 201))


def test_bad_messages_are_refused(site: Site) -> None:
    """What can never be sent is refused by size or type, before anything is taken."""
    publisher = site.connect().publisher(buffer_bytes=1 << 20)
    with pytest.raises(ValueTooLarge):
        publisher.publish(Message(b"x" * (1 << 20)))
    with pytest.raises(TypeError):
        publisher.publish(Message("text"))  # type: ignore[arg-type]
    assert publisher.published == 0


def test_nothing_to_receive(site: Site) -> None:
    """Without messages a receive ends at its deadline with an empty list."""
    subscriber = site.connect().subscriber()
    began = time.monotonic()
    assert subscriber.receive(10, 0.3) == []
    assert 0.25 <= time.monotonic() - began < 5


def test_closing(site: Site) -> None:
    """What is closed says so, wakes who waits, and closes again without a word."""
    broker = site.connect()
    publisher, subscriber = broker.publisher(), broker.subscriber()
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            subscriber.receive(1, WAIT_S)
        except ClosedError as error:
            outcome.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    broker.close()
    waiting.join(WAIT_S)
    assert len(outcome) == 1
    with pytest.raises(ClosedError):
        publisher.publish(Message(b"x"))
    with pytest.raises(ClosedError):
        subscriber.receive(1, 0)
    assert publisher.status().state == "closed"
    publisher.close()
    subscriber.close()
    broker.close()


def test_a_closed_broker_opens_nothing(site: Site) -> None:
    """Neither a publisher nor a subscriber, which nobody would close."""
    broker = site.connect()
    broker.publisher()
    broker.close()
    with pytest.raises(ClosedError):
        broker.publisher()
    with pytest.raises(ClosedError):
        broker.subscriber()


def test_what_is_closed_is_let_go(site: Site) -> None:
    """A broker that lives long keeps none of the publishers and subscribers that came and went."""
    broker = site.connect()
    broker.publisher().close()  # what pika logs when it makes a queue is kept by pytest, with the connection
    gone = []
    for _ in range(3):
        for made in (broker.publisher(), broker.subscriber()):
            gone.append(weakref.ref(made))
            made.close()
    del made
    broker.publisher()
    gc.collect()
    assert [one() for one in gone if one() is not None] == []


def test_only_a_kafka_has_transactions(site: Site) -> None:
    """Where there are none, a publisher that asks for them is refused; it would promise what is not so."""
    broker = site.connect()
    if broker.url.startswith("kafka"):
        broker.publisher(transactional_id=site.topic()).close()
        return
    with pytest.raises(OpenError, match="no transactions"):
        broker.publisher(transactional_id="one")


def test_closing_in_an_outage(site: Site) -> None:
    """Nobody answers, and messages wait: closing ends in bounded time all the same."""
    broker = site.connect()
    publisher, subscriber = broker.publisher(), broker.subscriber()
    publisher.publish(Message(b"1"))
    publisher.flush(WAIT_S)
    (delivery,) = read(subscriber, 1)
    with site.outage():
        publisher.publish(Message(b"2"))
        subscriber.ack(delivery)
        began = time.monotonic()
        publisher.close(0.5)
        broker.close()
        assert time.monotonic() - began < 20
    assert publisher.confirmed == 1


def test_options_that_are_not_understood_stop_the_start(site: Site) -> None:
    """An unknown option in the address is refused by name."""
    url = site.url("t")
    with pytest.raises(ConfigurationMismatch, match="colour"):
        brokers.connect(url + ("&" if "?" in url else "?") + "colour=red", **site._options)
