"""What both transports promise: every test runs on gRPC over loopback and on the in-memory twin."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from zlib import crc32

import pytest

from kvrep.errors import (
    ClosedError,
    Fenced,
    InvalidKey,
    NotPrimary,
    OpenError,
    Overloaded,
    PeerUnavailable,
    ProtocolError,
    ReplicationError,
    RolledBack,
    ValueTooLarge,
)
from kvrep.model.position import EpochTable, Position
from kvrep.replication.messages import (
    Ack,
    Credit,
    FromFollower,
    FromPrimary,
    Heartbeat,
    Hello,
    Refused,
    Segment,
    Welcome,
)
from kvrep.transport.interface import (
    STREAM_QUEUE_MAX,
    Connection,
    ConnectionRefused,
    NoAnswer,
    Server,
    SnapshotChunk,
    SnapshotInfo,
    SnapshotItem,
    SnapshotRequest,
    StreamEnded,
    Transport,
)
from kvrep.transport.memory import MemoryTransport
from kvrep.transport.network import GrpcTransport

WAIT_S = 10.0
ID = b"0123456789abcdef"
HELLO = Hello(store_id=ID, name="b", epochs=EpochTable([(1001, 1)]), last=Position(1001, 7))
WELCOME = Welcome(
    lineage=ID, branch=b"", store_id=ID, name="a", epoch=1001, protocol=1, last=Position(1001, 7)
)


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        threading.Event().wait(0.001)


class FakeSession:
    """Sends what the test puts into ``outbox`` (an exception is raised) and keeps what arrives."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.inbox: queue.SimpleQueue[FromFollower] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.closed: list[Exception | None] = []
        self.reader: str = ""
        self.bad_message: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def on_message(self, message: FromFollower) -> None:
        assert not self.closed
        assert self.gate.wait(WAIT_S)
        self.reader = threading.current_thread().name
        if self.bad_message is not None:
            raise self.bad_message
        self.inbox.put(message)

    def next_message(self) -> FromPrimary | None:
        message = self.outbox.get()
        if isinstance(message, Exception):
            raise message
        return message

    def on_closed(self, error: Exception | None) -> None:
        self.closed.append(error)
        self.outbox.put(None)

    def end(self) -> Exception | None:
        """Wait for the end, and return the only error that was given."""
        until(lambda: self.closed)
        return self.closed[0]


class FakeService:
    """Each test replaces the part it looks at."""

    def __init__(self) -> None:
        self.sessions: queue.SimpleQueue[FakeSession] = queue.SimpleQueue()
        self.release = threading.Event()
        self.entered = threading.Semaphore(0)
        self.items_closed = threading.Event()
        self.data = bytes(range(256)) * 10
        self.error: Exception | None = None
        self.snapshot_items: list[SnapshotItem] | None = None

    def open_session(self, peer: str) -> FakeSession:
        if self.error is not None:
            raise self.error
        session = FakeSession(peer)
        self.sessions.put(session)
        return session

    def snapshot(self, request: SnapshotRequest) -> Iterator[SnapshotItem]:
        if self.snapshot_items is not None:
            yield from self.snapshot_items
            return
        yield SnapshotInfo(
            snapshot_id="s1", bytes_total=len(self.data), position=Position(1001, 9), meta=b"m"
        )
        start = request.offset if request.snapshot_id == "s1" else 0
        for at in range(start, len(self.data), 1000):
            data = self.data[at : at + 1000]
            yield SnapshotChunk(offset=at, data=data, crc32=crc32(data))

    def call(self, method: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if method == "wait":
            self.entered.release()
            assert self.release.wait(WAIT_S)
        if method == "big":
            return {"value": bytes(request["size"])}
        if self.error is not None:
            raise self.error
        return {"method": method, **request}

    def scan(self, request: Mapping[str, Any]) -> Iterator[list[tuple[bytes, bytes]]]:
        try:
            for i in range(request["chunks"]):
                yield [(b"%d" % i, b"v"), (b"%d+" % i, b"")]
            if request.get("hang"):
                self.entered.release()
                assert self.release.wait(WAIT_S)
            if self.error is not None:
                raise self.error
        finally:
            self.items_closed.set()


class Pair:
    """A server and a connection to it."""

    def __init__(self, transport: Transport, max_streams: int = 8) -> None:
        self.transport = transport
        self.service = FakeService()
        self.server: Server = transport.serve(self.service, "127.0.0.1:0", name="a", max_streams=max_streams)
        self.server.start()
        self.connections: list[Connection] = []
        self.connection = self.connect()

    def connect(self) -> Connection:
        self.connections.append(self.transport.connect(self.server.address, name="b"))
        return self.connections[-1]

    def stream(self) -> tuple[Any, FakeSession]:
        stream = self.connection.open_stream()
        return stream, self.service.sessions.get(timeout=WAIT_S)

    def close(self) -> None:
        self.service.release.set()
        for connection in self.connections:
            connection.close()
        self.server.stop()


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """Every test ends with the threads it began with."""
    before = set(threading.enumerate())
    yield
    until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture(params=["grpc", "memory"])
def transport(request: pytest.FixtureRequest) -> Transport:
    if request.param == "grpc":
        return GrpcTransport(max_calls=2)
    return MemoryTransport(max_calls=2)


@pytest.fixture
def pair(transport: Transport) -> Iterator[Pair]:
    pair = Pair(transport, max_streams=2)
    yield pair
    pair.close()


def in_thread(work: Callable[[], Any]) -> "queue.SimpleQueue[Any]":
    """Run in a thread; the queue gets its result or exception."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(work())
        except Exception as error:
            results.put(error)

    threading.Thread(target=run).start()
    return results


# --- streams ---


def test_messages_go_both_ways(pair: Pair) -> None:
    """Messages arrive in order, equal to what was sent, in both directions."""
    stream, session = pair.stream()
    up: list[FromFollower] = [HELLO, Credit(bytes_granted=5), Ack(written=9, synced=8, visible=7)]
    down: list[FromPrimary] = [
        WELCOME,
        Segment(epoch=1001, first=8, last=9, data=b"records" * 99, committed=7),
        Heartbeat(epoch=1001, last=9, committed=9),
    ]
    for message in up:
        stream.send(message)
    for message in down:
        session.outbox.put(message)
    assert [session.inbox.get(timeout=WAIT_S) for _ in up] == up
    assert [stream.receive() for _ in down] == down
    assert session.reader.startswith("kvrep-a-reader-")
    stream.cancel()


def test_primary_ends_a_stream_in_order(pair: Pair) -> None:
    """When next_message returns None, what was sent before still arrives, and there is no error."""
    stream, session = pair.stream()
    session.outbox.put(WELCOME)
    session.outbox.put(None)
    assert stream.receive() == WELCOME
    with pytest.raises(StreamEnded) as caught:
        stream.receive()
    assert caught.value.error is None
    assert session.end() is None
    until(lambda: _refuses_send(stream))


def _refuses_send(stream: Any) -> bool:
    try:
        stream.send(Credit(bytes_granted=1))
    except StreamEnded:
        return True
    return False


def test_cancel_wakes_receive(pair: Pair) -> None:
    """A receive that waits returns at once when another thread cancels, and the primary sees it go."""
    stream, session = pair.stream()
    result = in_thread(stream.receive)
    stream.send(HELLO)
    session.inbox.get(timeout=WAIT_S)
    started = time.monotonic()
    stream.cancel()
    stream.cancel()
    error = result.get(timeout=WAIT_S)
    assert time.monotonic() - started < 1
    assert isinstance(error, StreamEnded)
    assert isinstance(error.error, ClosedError)
    assert isinstance(session.end(), PeerUnavailable)
    with pytest.raises(StreamEnded):
        stream.receive()


def test_session_error_reaches_follower(pair: Pair) -> None:
    """What next_message raises ends the stream with the same class and fields on the other side."""
    stream, session = pair.stream()
    failure = Fenced("newer epoch", epoch=2001)
    session.outbox.put(failure)
    with pytest.raises(StreamEnded) as caught:
        stream.receive()
    assert isinstance(caught.value.error, Fenced)
    assert caught.value.error.epoch == 2001
    assert session.end() is failure


def test_reader_error_reaches_follower(pair: Pair) -> None:
    """What on_message raises ends the stream with that error on both sides."""
    stream, session = pair.stream()
    session.bad_message = ProtocolError("a credit before the hello")
    stream.send(Credit(bytes_granted=1))
    with pytest.raises(StreamEnded) as caught:
        stream.receive()
    assert isinstance(caught.value.error, ProtocolError)
    assert caught.value.error.message == "a credit before the hello"
    assert session.end() is session.bad_message


def test_unexpected_reader_error_is_hidden(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """A bug in the session is logged with its traceback on its side and not shown to the peer."""
    stream, session = pair.stream()
    session.bad_message = RuntimeError("secret detail")
    stream.send(HELLO)
    with pytest.raises(StreamEnded) as caught:
        stream.receive()
    assert type(caught.value.error) is ReplicationError
    assert "secret" not in str(caught.value.error)
    assert session.end() is session.bad_message
    assert "secret detail" in caplog.text


def test_open_session_error(pair: Pair) -> None:
    """What open_session raises is why the stream ended."""
    pair.service.error = NotPrimary("a follower", primary_address="c:1", epoch=3)
    stream = pair.connection.open_stream()
    with pytest.raises(StreamEnded) as caught:
        stream.receive()
    assert isinstance(caught.value.error, NotPrimary)
    assert caught.value.error.primary_address == "c:1"


def test_full_server_refuses_streams_but_answers_calls(pair: Pair) -> None:
    """Above max_streams a stream gets Refused "full" at once, calls go on, and an end makes room."""
    streams = [pair.stream() for _ in range(2)]
    third = pair.connection.open_stream()
    refused = third.receive()
    assert isinstance(refused, Refused)
    assert refused.reason == "full"
    with pytest.raises(StreamEnded) as caught:
        third.receive()
    assert caught.value.error is None
    assert pair.connection.call("echo", {"a": 1}, 5) == {"method": "echo", "a": 1}
    streams[0][1].outbox.put(None)
    with pytest.raises(StreamEnded):
        streams[0][0].receive()
    fourth, session = pair.stream()
    session.outbox.put(WELCOME)
    assert fourth.receive() == WELCOME


def test_send_never_blocks(pair: Pair) -> None:
    """A follower that sends more than the primary takes gets Overloaded instead of a wait."""
    stream, session = pair.stream()
    session.gate.clear()
    big = Hello(store_id=ID, name="b", epochs=EpochTable((i, i) for i in range(1, 500)))

    def send_much() -> None:
        for _ in range(STREAM_QUEUE_MAX * 5):
            stream.send(big)

    with pytest.raises(Overloaded):
        send_much()
    session.gate.set()
    stream.cancel()


def test_stop_ends_streams(pair: Pair) -> None:
    """Stopping the server ends its sessions and tells followers that the peer is unavailable."""
    stream, session = pair.stream()
    pair.server.stop(2)
    with pytest.raises(StreamEnded) as caught:
        stream.receive()
    assert isinstance(caught.value.error, PeerUnavailable)
    assert isinstance(session.end(), ClosedError)
    pair.server.stop(2)


def test_closing_the_connection_ends_streams(pair: Pair) -> None:
    """Closing a connection wakes its receivers with ClosedError."""
    stream, session = pair.stream()
    result = in_thread(stream.receive)
    pair.connection.close()
    error = result.get(timeout=WAIT_S)
    assert isinstance(error, StreamEnded)
    assert isinstance(error.error, ClosedError)
    assert isinstance(session.end(), PeerUnavailable)


def test_nobody_there(transport: Transport) -> None:
    """A connection to a port where nobody listens fails at once, for calls and streams alike."""
    spare = transport.serve(FakeService(), "127.0.0.1:0", name="x")
    address = spare.start()
    spare.stop()
    connection = transport.connect(address, name="b")
    connection.open_stream().cancel()
    fastest = min(_time_of_refusal(transport, address) for _ in range(3))
    assert fastest < 0.05
    with pytest.raises(StreamEnded) as caught:
        connection.open_stream().receive()
    assert isinstance(caught.value.error, ConnectionRefused)
    assert caught.value.error.address == address
    connection.close()


def _time_of_refusal(transport: Transport, address: str) -> float:
    connection = transport.connect(address, name="b")
    started = time.monotonic()
    with pytest.raises(ConnectionRefused) as caught:
        connection.call("echo", {}, 5)
    took = time.monotonic() - started
    assert caught.value.address == address
    connection.close()
    return took


# --- calls ---


def test_call_carries_values(pair: Pair) -> None:
    """A call's request and answer keep every msgpack type."""
    request = {"b": b"\x00\xff", "t": "ä", "n": -1, "big": 2**63, "l": [1, [None, True]], "f": 0.5}
    assert pair.connection.call("echo", request, 5) == {"method": "echo", **request}


@pytest.mark.parametrize(
    "failure",
    [
        NotPrimary("no", primary_address="h:1", epoch=2001, hint="go there"),
        RolledBack("gone", position=Position(1001, 5)),
        InvalidKey("empty key"),
        ClosedError("closed"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_call_raises_what_the_peer_raised(pair: Pair, failure: Any) -> None:
    """The class, text, hint and fields of a peer's error are the same here."""
    pair.service.error = failure
    with pytest.raises(type(failure)) as caught:
        pair.connection.call("echo", {}, 5)
    assert str(caught.value) == str(failure)
    assert caught.value.fields == failure.fields
    assert type(caught.value) is type(failure)


def test_call_hides_bugs(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception is logged where it happened and comes without its details."""
    pair.service.error = RuntimeError("secret detail")
    for _ in range(3):
        with pytest.raises(ReplicationError) as caught:
            pair.connection.call("echo", {}, 5)
        assert type(caught.value) is ReplicationError
        assert "secret" not in str(caught.value)
    assert caplog.text.count("RuntimeError: secret detail") == 1


def test_call_has_a_deadline(pair: Pair) -> None:
    """A call that is not answered in time raises PeerUnavailable, and says that this was it."""
    started = time.monotonic()
    with pytest.raises(NoAnswer):
        pair.connection.call("wait", {}, 0.05)
    assert time.monotonic() - started < 2


def test_a_broken_connection_is_neither_refused_nor_silent(pair: Pair) -> None:
    """What ends a stream or a call half-way is told apart by its class, whatever the words say."""
    stream, _ = pair.stream()
    call = in_thread(lambda: pair.connection.call("wait", {}, WAIT_S))
    assert pair.service.entered.acquire(timeout=WAIT_S)
    pair.server.stop(0.1)
    pair.service.release.set()
    with pytest.raises(StreamEnded) as caught:
        stream.receive()
    assert type(caught.value.error) is PeerUnavailable
    assert type(call.get(timeout=WAIT_S)) is PeerUnavailable


@pytest.mark.parametrize("kind", [ConnectionRefused, NoAnswer])
def test_how_a_third_node_failed_is_not_how_the_peer_did(pair: Pair, kind: type[PeerUnavailable]) -> None:
    """A peer that could not reach somebody is there itself: that error comes as a plain PeerUnavailable."""
    pair.service.error = kind("c cannot be reached: Connection refused", address="c:1")
    with pytest.raises(PeerUnavailable) as caught:
        pair.connection.call("echo", {}, 5)
    assert type(caught.value) is PeerUnavailable


def test_too_many_calls(pair: Pair) -> None:
    """Above max_calls a call is refused at once, and streams still find a thread."""
    results = [in_thread(lambda: pair.connection.call("wait", {}, WAIT_S)) for _ in range(2)]
    for _ in results:
        assert pair.service.entered.acquire(timeout=WAIT_S)
    with pytest.raises(Overloaded):
        pair.connection.call("echo", {}, 5)
    stream, session = pair.stream()
    session.outbox.put(WELCOME)
    assert stream.receive() == WELCOME
    pair.service.release.set()
    assert [result.get(timeout=WAIT_S) for result in results] == [{"method": "wait"}] * 2


def test_closing_wakes_a_call(pair: Pair) -> None:
    """A call that waits raises ClosedError when its connection is closed."""
    result = in_thread(lambda: pair.connection.call("wait", {}, WAIT_S))
    assert pair.service.entered.acquire(timeout=WAIT_S)
    pair.connection.close()
    assert isinstance(result.get(timeout=WAIT_S), ClosedError)


def test_closed_connection_refuses(pair: Pair) -> None:
    """After close everything raises ClosedError, and close can be repeated."""
    pair.connection.close()
    pair.connection.close()
    request = SnapshotRequest(store_id=ID, name="b")
    for use in (
        lambda: pair.connection.call("echo", {}, 5),
        pair.connection.open_stream,
        lambda: pair.connection.scan({}, 5),
        lambda: pair.connection.snapshot(request, 5),
    ):
        with pytest.raises(ClosedError):
            use()


def test_message_limit(pair: Pair) -> None:
    """Requests and answers above the limit are refused with typed errors; those below pass."""
    with pytest.raises(ValueTooLarge):
        pair.connection.call("echo", {"value": bytes(8 << 20)}, 5)
    with pytest.raises(ReplicationError, match="above the limit"):
        pair.connection.call("big", {"size": 8 << 20}, 5)
    assert len(pair.connection.call("big", {"size": 7 << 20}, 5)["value"]) == 7 << 20


def test_stop_lets_calls_end(pair: Pair) -> None:
    """A call under way when the server is stopped is still answered."""
    result = in_thread(lambda: pair.connection.call("wait", {}, WAIT_S))
    assert pair.service.entered.acquire(timeout=WAIT_S)
    stopping = in_thread(lambda: pair.server.stop(WAIT_S))
    pair.service.release.set()
    assert result.get(timeout=WAIT_S) == {"method": "wait"}
    assert stopping.get(timeout=WAIT_S) is None


# --- scans and snapshots ---


def test_scan(pair: Pair) -> None:
    """A scan yields the chunks in order and then ends."""
    chunks = list(pair.connection.scan({"chunks": 200}, 5))
    assert chunks == [[(b"%d" % i, b"v"), (b"%d+" % i, b"")] for i in range(200)]
    assert pair.service.items_closed.wait(WAIT_S)


def test_scan_error_after_chunks(pair: Pair) -> None:
    """An error in the middle of a scan comes after the chunks before it."""
    pair.service.error = RolledBack("gone", position=Position(1, 2))
    scan = pair.connection.scan({"chunks": 1}, 5)
    assert next(scan) == [(b"0", b"v"), (b"0+", b"")]
    with pytest.raises(RolledBack) as caught:
        next(scan)
    assert caught.value.position == Position(1, 2)


def test_closing_a_scan_early(pair: Pair) -> None:
    """Closing an iterator ends the peer's generator, too, though it is not exhausted."""
    scan = pair.connection.scan({"chunks": 1_000_000}, 60)
    next(scan)
    scan.close()
    scan.close()
    assert pair.service.items_closed.wait(WAIT_S)
    with pytest.raises(ClosedError):
        for _ in scan:
            pass


def test_close_wakes_a_scan(pair: Pair) -> None:
    """Closing from another thread wakes an iterator that waits for its next chunk."""
    scan = pair.connection.scan({"chunks": 0, "hang": True}, WAIT_S)
    result = in_thread(lambda: next(scan))
    assert pair.service.entered.acquire(timeout=WAIT_S)
    scan.close()
    assert isinstance(result.get(timeout=WAIT_S), ClosedError)


def test_scan_deadline(pair: Pair) -> None:
    """A scan that takes longer than its time raises PeerUnavailable."""
    with pytest.raises(PeerUnavailable):
        list(pair.connection.scan({"chunks": 1, "hang": True}, 0.05))


def test_snapshot_whole_and_resumed(pair: Pair) -> None:
    """A snapshot comes whole, and from any byte when its id is given."""
    whole = list(pair.connection.snapshot(SnapshotRequest(store_id=ID, name="b"), 5))
    assert whole[0] == SnapshotInfo(snapshot_id="s1", bytes_total=2560, position=Position(1001, 9), meta=b"m")
    assert b"".join(chunk.data for chunk in whole[1:]) == pair.service.data
    request = SnapshotRequest(store_id=ID, name="b", snapshot_id="s1", offset=1000)
    rest = list(pair.connection.snapshot(request, 5))
    assert [chunk.offset for chunk in rest[1:]] == [1000, 2000]
    other = SnapshotRequest(store_id=ID, name="b", snapshot_id="s0", offset=1000)
    assert len(list(pair.connection.snapshot(other, 5))) == 4


def _chunk(offset: int, data: bytes, crc: int | None = None) -> SnapshotChunk:
    return SnapshotChunk(offset=offset, data=data, crc32=crc32(data) if crc is None else crc)


INFO = SnapshotInfo(snapshot_id="s1", bytes_total=4)


@pytest.mark.parametrize(
    ("items", "what"),
    [
        ([], "ended early"),
        ([INFO], "ended early"),
        ([INFO, _chunk(0, b"ab")], "ended early"),
        ([_chunk(0, b"abcd")], "without its description"),
        ([INFO, INFO], "twice"),
        ([INFO, _chunk(1, b"bcd")], "in place of 0"),
        ([INFO, _chunk(0, b"ab"), _chunk(0, b"ab")], "in place of 2"),
        ([INFO, _chunk(0, b"abcde")], "behind them"),
        ([INFO, _chunk(0, b"abcd", crc=1)], "damaged"),
    ],
)
def test_bad_snapshots(pair: Pair, items: list[SnapshotItem], what: str) -> None:
    """A snapshot with a gap, a damaged chunk or a missing end is a ProtocolError, never short data."""
    pair.service.snapshot_items = items
    with pytest.raises(ProtocolError, match=what):
        list(pair.connection.snapshot(SnapshotRequest(store_id=ID, name="b"), 5))


# --- servers ---


def test_port_taken(pair: Pair) -> None:
    """A second server on the same port raises OpenError that names address and reason."""
    second = pair.transport.serve(FakeService(), pair.server.address, name="c")
    with pytest.raises(OpenError, match="in use") as caught:
        second.start()
    assert pair.server.address in str(caught.value)
    second.stop()


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":1", "host:x", "host:65536", "::1:5", "[::1:5", "a b:1", "a/b:1"]
)
def test_bad_addresses(transport: Transport, address: str) -> None:
    """An address that is none is refused with a hint before anything is done."""
    with pytest.raises(ValueError, match="expected"):
        transport.connect(address, name="b")
    with pytest.raises(ValueError, match="expected"):
        transport.serve(FakeService(), address, name="a")


def test_port_zero_is_for_servers(transport: Transport) -> None:
    """Nobody can connect to port 0."""
    with pytest.raises(ValueError, match="port"):
        transport.connect("127.0.0.1:0", name="b")


def test_restart_on_the_same_port(pair: Pair) -> None:
    """After a stop another server can have the port, and a new connection reaches it."""
    address = pair.server.address
    pair.server.stop()
    pair.server = pair.transport.serve(pair.service, address, name="a2")
    assert pair.server.start() == address
    assert pair.connect().call("echo", {}, 5) == {"method": "echo"}
