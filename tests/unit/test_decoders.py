"""Whatever stands where something of ours should: it is read, or refused by name, and nothing else happens.

Checksums catch what a disk or a wire does to bytes. These tests are about the rest: what carries a right checksum
and is wrong inside, because another program, a newer version or a mistake of ours has written it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvrep
from kvrep.errors import CorruptionError, NotAStore, OpenError, ProtocolError, UpgradeRequired
from kvrep.feeds.serving import _packed, _unpacked
from kvrep.model.change import Change
from kvrep.model.codec import RecordEncoder
from kvrep.model.configuration import Configuration
from kvrep.model.feed_state import FeedState
from kvrep.model.position import EpochTable, Position
from kvrep.model.sessions import Origin, Sessions
from kvrep.replication.ballots import Answer, PrimarySeen, PromiseReply, PromiseRequest, Question
from kvrep.replication.envelope import Envelope, EnvelopeKind, History, decode_envelope, encode_envelope
from kvrep.replication.messages import Promise
from kvrep.runtime.bootstrapping import _Arrived
from kvrep.runtime.description import Description
from kvrep.runtime.relaying import Place
from kvrep.runtime.slots import Slots
from kvrep.storage.home import Home, _Identity
from kvrep.storage.log import Tail
from kvrep.storage.rescue import load_rescue
from kvrep.storage.tree import State

ID, OTHER = b"i" * 16, b"o" * 16
TABLE = EpochTable([(1001, 1), (2001, 5)])


class Decoder(NamedTuple):
    """One place where bytes become values."""

    tree: Any
    """What it reads, as plain values."""
    read: Callable[[Any, Path], object]
    """Writes a tree into bytes, as they should be but for what the tree says, and reads them."""
    refuses: tuple[type[Exception], ...]


# -- the decoders ----------------------------------------------------------------------------------


def sessions() -> Any:
    table = Sessions()
    table.note(Origin(ID, 7, 1, 1), Position(1001, 3))
    table.note(Origin(OTHER, 8, 2, 1), Position(1001, 4))
    return table.to_wire()


def configuration() -> Any:
    made = Configuration(acks=1, ack_timeout_s=2.5, degrade_after_s=1.5)
    made = made.with_voter(ID, "a", "host-a:7400").with_voter(OTHER, "b", "host-b:7400")
    return made.with_voter(b"w" * 16, "w", witness=True).without([OTHER], 4).to_wire()


def bounded() -> Any:
    return Configuration(lag_records_max=1000).with_voter(ID, "a", "host-a:7400").to_wire()


STATE = State(
    applied=Tail(7, 2001, 99), epochs=TABLE, configured_at=3, branches=[(1, ID)], digests={"default": 5},
    counts={"default": 2}, mark=4, mark_digests={"default": 3}, verified=4, logged_in="x/gen-000001",
)  # fmt: skip
FEED = FeedState(token="k1", needs=5, keyspaces=("a", "b"), topics=("t",))
CHANGE = Change(
    Position(1001, 5), 0, "put", "default", b"k", b"v", 5, True, (1001, 4, 0), False, b"before", False, "t",
    {"h": "x"}, origin=type("Given", (), {"token": lambda self, change: "k1"})(),
)  # fmt: skip
COPY = Description(
    lineage=ID, branch=OTHER, applied=Tail(7, 2001, 99), epoch=2001, last=9, store_id=ID, name="a",
    branches=(ID, OTHER), epochs=TABLE,
)  # fmt: skip
ENVELOPE = Envelope(
    kind=EnvelopeKind.RECORDS, first=7, last=7, source_last=9, data=b"data",
    history=History(lineage=ID, branch=OTHER, ancestors=(ID,), epoch=2001, epochs=TABLE, source_id=ID, source="a"),
)  # fmt: skip
SEEN = PrimarySeen(store_id=ID, name="a", address="host-a:7400", epoch=1001)
PROMISE = Promise(epoch=3001, last=Position(2001, 7), committed=5, epochs=TABLE)
PLACE = {
    "store_id": ID.hex(), "lineage": OTHER.hex(), "branches": [ID.hex()], "last": [2001, 7], "running": 5,
    "epochs": [[1001, 1], [2001, 5]], "promised": 2001,
}  # fmt: skip
RESCUE = {"lineage": ID.hex(), "first": 3, "last": 4, "reason": "why", "time": 1.5, "running_before": 77}
SLOTS = [{"store_id": ID.hex(), "name": "b", "address": "", "voter": True, "acked": 5, "seen_s": 1.5}]
IDENTITY = {
    "store_id": ID, "name": "a", "promised": 1001, "promised_to": ID, "vote_floor": 3, "lowered": [1001, 2],
}  # fmt: skip


def packed(read: Callable[[bytes], object]) -> Callable[[Any, Path], object]:
    return lambda tree, folder: read(msgpack.packb(tree))


def plain(read: Callable[[Any], object]) -> Callable[[Any, Path], object]:
    """What comes as values, through msgpack, as over the wire."""
    return lambda tree, folder: read(msgpack.unpackb(msgpack.packb(tree), strict_map_key=False))


def in_json(read: Callable[[Path], object]) -> Callable[[Any, Path], object]:
    def written(tree: Any, folder: Path) -> object:
        file = folder / "file"
        file.write_text(json.dumps(tree, default=bytes.hex))
        return read(file)

    return written


def read_envelope(tree: Any, folder: Path) -> object:
    del folder
    header = msgpack.packb(tree)
    body = b"kvr\x01" + len(header).to_bytes(4, "big") + header + b"data"
    return decode_envelope(body + crc32(body).to_bytes(4, "big"))


def read_identity(tree: Any, folder: Path) -> object:
    identity = _Identity(folder / "IDENTITY")
    identity.create(tree)
    identity.sequence = 0
    identity.load()
    return identity.data


def read_rescue(tree: Any, folder: Path) -> object:
    encode, running, records = RecordEncoder().encode, 77, b""
    for offset in (3, 4):
        frame, running = encode(offset, 1001, 0, 0, ["default", [b"k", b"v"]], running)
        records += frame
    header = json.dumps(tree, default=bytes.hex).encode()
    file = folder / "x.kvrescue"
    file.write_bytes(b"kvresc01" + len(header).to_bytes(4, "big") + header + records)
    return load_rescue(file)


def read_slots(file: Path) -> object:
    """Never refused: followers are learned anew."""
    slots = Slots(file)
    slots.expire(set())
    return slots.keep_from(), slots.slowest()


def read_note(tree: Any, folder: Path) -> object:
    """Never refused: the copy begins anew."""
    (folder / "data").write_bytes(b"0123456789")
    body = msgpack.packb(tree)
    (folder / "COPY").write_bytes(crc32(body).to_bytes(4, "big") + body)
    return _Arrived.load(folder / "COPY", folder / "data").encode()


def read_home(part: str) -> Callable[[Any, Path], object]:
    """One of the small files of a store's directory, whose other files are whole."""

    def read(tree: Any, folder: Path) -> object:
        path = folder / "home"
        if not path.exists():
            home = Home.open(path, create=True, name="a", lineage=ID)
            home.finish_creation()
            home.close()
        before = (path / part).read_bytes()
        store_id = json.loads((path / "STORE").read_bytes())["store_id"]
        (path / part).write_text(json.dumps(tree, default=bytes.hex).replace(OTHER.hex(), store_id))
        try:
            home = Home.open(path, create=False, name=None, lineage=b"")
            home.close()
        finally:
            (path / part).write_bytes(before)
        return None

    return read


CURRENT: dict[str, Any] = {"generation": "gen-000001", "lineage": ID.hex()}
MARKER: dict[str, Any] = {"format": 1, "store_id": OTHER.hex()}
"""The id stands for the one that the store has."""
DAMAGED, REFUSED = (CorruptionError,), (ProtocolError,)
DECODERS: dict[str, Decoder] = {
    "a feed's state": Decoder(
        msgpack.unpackb(FEED.pack()), packed(FeedState.unpack), (CorruptionError, UpgradeRequired),
    ),
    "sessions": Decoder(sessions(), plain(Sessions.from_wire), REFUSED),
    "a configuration": Decoder(configuration(), plain(Configuration.from_wire), REFUSED),
    "a bounded configuration": Decoder(bounded(), plain(Configuration.from_wire), REFUSED),
    "LMDB's state record": Decoder(msgpack.unpackb(STATE.pack()), packed(lambda b: State.unpack(b).pack()), DAMAGED),
    "IDENTITY": Decoder(IDENTITY, read_identity, DAMAGED),
    "CURRENT": Decoder(CURRENT, read_home("CURRENT"), (CorruptionError, NotAStore)),
    "STORE": Decoder(MARKER, read_home("STORE"), (CorruptionError, UpgradeRequired)),
    "a rescue file": Decoder(RESCUE, read_rescue, DAMAGED),
    "SLOTS": Decoder(SLOTS, in_json(read_slots), ()),
    "COPY": Decoder(["id", 10, b"\0\0\0\3" + crc32(b"012").to_bytes(4, "big")], read_note, ()),
    "a relay's place": Decoder(PLACE, in_json(Place.load), (OpenError,)),
    "a snapshot's description": Decoder(
        msgpack.unpackb(COPY.encode()), packed(lambda b: Description.decode(b).encode()), REFUSED,
    ),
    "an envelope": Decoder(msgpack.unpackb(encode_envelope(ENVELOPE)[8:-8]), read_envelope, REFUSED),
    "a change": Decoder(_packed(CHANGE), plain(lambda v: _packed(_unpacked(v))), REFUSED),
    "a question": Decoder(
        Question(purpose="stand", store_id=ID, name="a", address="x", lineage=OTHER, peers=(("a", "x"),)).to_wire(),
        plain(lambda v: Question.from_wire(v).to_wire()), REFUSED,
    ),
    "an answer": Decoder(
        Answer(store_id=ID, name="a", address="x", lineage=OTHER, promised_epoch=5, alive=SEEN).to_wire(),
        plain(lambda v: Answer.from_wire(v).to_wire()), REFUSED,
    ),
    "a request for a promise": Decoder(
        PromiseRequest(epoch=3001, store_id=ID, name="a", address="x", lineage=OTHER).to_wire(),
        plain(lambda v: PromiseRequest.from_wire(v).to_wire()), REFUSED,
    ),
    "a promise": Decoder(
        PromiseReply(store_id=ID, promised_epoch=3001, promise=PROMISE, alive=SEEN).to_wire(),
        plain(lambda v: PromiseReply.from_wire(v).to_wire()), REFUSED,
    ),
}  # fmt: skip


# -- changing what they read -----------------------------------------------------------------------

JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 1.5, float("inf"), float("nan"), "", "text",
    "\ud7ff", "x" * 2000, [], [[]], [1], [1, 2], [2, 1], [[1, 2]], [None], {}, {"a": 1},
]  # fmt: skip
MORE_JUNK: list[Any] = [*JUNK, b"", b"short", ID, [b""], {1: 2}, {b"k": None}]
"""What JSON has not."""


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every node of a tree, by the way to it."""
    yield at
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        yield from places(value, (*at, key))


def changed(tree: Any, place: tuple[Any, ...], how: str, junk: Any) -> Any:
    """The tree with one node replaced, removed, or followed by another."""
    if not place:
        return junk
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    key, rest = place[0], place[1:]
    if rest or how == "replace":
        copy[key] = changed(copy[key], rest, how, junk)
    elif how == "remove":
        del copy[key]
    elif isinstance(copy, dict):
        copy["more"] = junk
    else:
        copy.insert(key, junk)
    return copy


def as_lists(tree: Any) -> Any:
    """Tuples become lists, as msgpack and JSON make them."""
    if isinstance(tree, dict):
        return {key: as_lists(value) for key, value in tree.items()}
    return [as_lists(value) for value in tree] if isinstance(tree, list | tuple) else tree


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoders")


@pytest.fixture(autouse=True)
def quick_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power loss."""
    monkeypatch.setattr("os.fsync", lambda fd: None)


JSON_ONLY = ("CURRENT", "STORE", "a rescue file", "SLOTS", "a relay's place")


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_whole_is_read(scratch: Path, name: str) -> None:
    """The unchanged value of each decoder is accepted, so that what follows tests the changes."""
    decoder = DECODERS[name]
    decoder.read(as_lists(decoder.tree), scratch)


@pytest.mark.parametrize("name", DECODERS)
@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(data=st.data())
def test_what_is_wrong_inside_is_refused_by_name(scratch: Path, name: str, data: st.DataObject) -> None:
    """With any node of it replaced, removed or added, a value is read, or refused with the error that says so."""
    decoder = DECODERS[name]
    tree = as_lists(decoder.tree)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(list(places(tree))))
        how = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        junk = data.draw(st.sampled_from(JUNK if name in JSON_ONLY else MORE_JUNK))
        tree = changed(tree, place, how, junk)
    try:
        decoder.read(tree, scratch)
    except decoder.refuses:
        pass


@pytest.mark.parametrize("name", [n for n in DECODERS if DECODERS[n].refuses])
def test_another_shape_is_refused(scratch: Path, name: str) -> None:
    """A number, a text, an empty list or map in place of the whole is never taken for it."""
    decoder = DECODERS[name]
    for junk in (5, "text", [], [1, 2], {"other": 1}):
        with pytest.raises(decoder.refuses):
            decoder.read(junk, scratch)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01", b"\x81\xa7version", b"\xff" * 9])
def test_bytes_that_are_no_msgpack_are_refused(data: bytes) -> None:
    """Bytes that are cut off, or no msgpack at all, are refused by name as well."""
    for read, error in (
        (FeedState.unpack, CorruptionError), (State.unpack, CorruptionError), (Description.decode, ProtocolError),
    ):  # fmt: skip
        with pytest.raises(error):
            read(data)


def test_a_feed_of_a_newer_version_asks_for_an_upgrade() -> None:
    """A feed's state of version 2 is neither guessed at nor called damaged, whatever else it holds."""
    with pytest.raises(kvrep.UpgradeRequired) as caught:
        FeedState.unpack(msgpack.packb({"version": 2, "anything": "else"}))
    assert (caught.value.found, caught.value.supported) == (2, 1)
