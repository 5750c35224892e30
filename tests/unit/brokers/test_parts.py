"""The small parts of the brokers: addresses, outstanding deliveries, the twin's faults."""

from __future__ import annotations

import pytest

from kvrep.brokers.interface import Message
from kvrep.brokers.memory import Faults, MemoryBrokers
from kvrep.brokers.outstanding import Outstanding
from kvrep.brokers.url import BrokerUrl, is_broker_url
from kvrep.errors import AuthenticationFailed, ConfigurationMismatch, OpenError, PeerUnavailable
from kvrep.runtime.brokered import split_url


def test_addresses() -> None:
    """All parts of an address are read, and the password is never shown."""
    url = BrokerUrl.parse("amqp://us%2Fer:p%40ss@a:1,[::1]:2,c/vh%2Fost?topic=a%20b&x=")
    assert url.hosts == (("a", 1), ("::1", 2), ("c", 0))
    assert (url.user, url.password, url.path) == ("us/er", "p@ss", "vh/ost")
    assert url.options == {"topic": "a b", "x": ""}
    assert str(url) == "amqp://us%2Fer@a:1,[::1]:2,c/vh/ost?topic=a%20b&x="
    assert "p@ss" not in repr(url)
    assert is_broker_url("kafka://a")
    assert not is_broker_url("host:7400")


@pytest.mark.parametrize(
    "text", ["", "host:1", "amqp:host", "amqp://a:b", "amqp://a:70000", "amqp://[::1", "x" * 5000]
)
def test_what_is_no_address(text: str) -> None:
    """What cannot be an address is refused with the typed error."""
    with pytest.raises(OpenError):
        BrokerUrl.parse(text)


def test_options_are_known_or_refused() -> None:
    """An option twice, or an unknown one, stops the start."""
    with pytest.raises(OpenError):
        BrokerUrl.parse("amqp://a/?topic=b&topic=c")
    with pytest.raises(ConfigurationMismatch, match="known are: topic"):
        BrokerUrl.parse("amqp://a/?colour=b").only("topic")


def test_options_have_bounds() -> None:
    """A number is whole and within its bounds, a choice one of a few; what is not given has a default."""
    url = BrokerUrl.parse("kafka://a/t?linger_ms=7&timeout_s=0&partitions=many&sasl=scram-sha-256&kind=heap")
    assert url.number("linger_ms", 5, 0, 10) == 7
    assert url.number("replicas", -1, 1, 10) == -1
    assert url.choice("sasl", "PLAIN", "SCRAM-SHA-256") == "SCRAM-SHA-256"
    assert url.choice("queue_type", "classic", "quorum") == "classic"
    for name in ("timeout_s", "partitions"):
        with pytest.raises(ConfigurationMismatch, match="a whole number from 1 to 3600") as error:
            url.number(name, 10, 1, 3600)
        assert error.value.option == name
    with pytest.raises(ConfigurationMismatch, match="kind='heap' is not allowed: log or queue"):
        url.choice("kind", "log", "queue")


def test_our_options_are_split_off() -> None:
    """Options of the follower do not reach the broker; the rest is kept as it was."""
    theirs, ours = split_url("kafka://a:1/t?bootstrap=h%3A1&linger_ms=7&group=g")
    assert theirs == "kafka://a:1/t?linger_ms=7"
    assert ours == {"bootstrap": "h:1", "group": "g"}
    assert split_url("kafka:///t") == ("kafka:///t", {})


def test_outstanding_deliveries() -> None:
    """Acks one by one and through a delivery are each told once; the watermark has no gap."""
    out = Outstanding()
    assert out.done_through is None
    for number in range(1, 8):
        out.add(number)
    assert out.done_through == 0
    assert out.ack(3, through=False) == [3]
    assert out.ack(3, through=False) == []
    assert out.done_through == 0
    assert out.ack(4, through=True) == [1, 2, 4]
    assert out.done_through == 4
    assert out.ack(2, through=True) == []
    assert (len(out), list(out)) == (3, [5, 6, 7])
    assert out.ack(9, through=True) == [5, 6, 7]
    assert out.done_through == 7
    out.clear()
    assert out.done_through is None


def test_the_twin_misbehaves_as_told() -> None:
    """Each fault alone: nothing is lost unless it is dropped, and the same seed gives the same faults."""
    seen = {}
    for name in ("duplicate", "reorder", "delay", "drop"):
        orders = []
        for _ in range(2):
            memory = MemoryBrokers(seed=3)
            memory["x"].faults = Faults(**{name: 0.3})
            broker = memory.connect("memory://x/t")
            publisher, subscriber = broker.publisher(), broker.subscriber(prefetch=1000)
            for n in range(100):
                publisher.publish(Message(b"%d" % n))
            publisher.flush(1)
            orders.append([int(d.message.body) for d in subscriber.receive(1000, 0)])
            while more := subscriber.receive(1000, 0):
                orders[-1] += [int(d.message.body) for d in more]
            broker.close()
        assert orders[0] == orders[1]
        seen[name] = orders[0]
    assert len(seen["duplicate"]) > 100
    assert set(seen["duplicate"]) == set(range(100))
    for name in ("reorder", "delay"):
        assert sorted(seen[name]) == list(range(100))
        assert seen[name] != list(range(100))
    assert len(seen["drop"]) < 100


def test_the_twin_refuses_wrong_passwords_and_is_unreachable_when_stopped() -> None:
    """The errors of the real ones."""
    memory = MemoryBrokers()
    memory["x"].password = "secret"
    with pytest.raises(AuthenticationFailed, match="check user and password"):
        memory.connect("memory://me:wrong@x/t").publisher()
    memory.connect("memory://me:secret@x/t").publisher().close()
    memory["x"].stop()
    with pytest.raises(PeerUnavailable):
        memory.connect("memory://me:secret@x/t").subscriber()
