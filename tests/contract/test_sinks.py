"""Every secondary keeps what the interface promises: the one in memory, SQLite, PostgreSQL, a store, a warehouse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.codecs import JSON, Codec
from kvrep.sinks.interface import DeadLetter, Place, Sink
from kvrep.sinks.memory import MemorySink
from kvrep.sinks.sqlite import SqliteSink
from kvrep.sinks.store import LocalStore, RemoteStore, StoreSink
from kvrep.sinks.tables import Table
from tests.warehouse_kit import EAGER, need_warehouse

Make = Callable[..., Sink]
KINDS = ["memory", "sqlite", "postgres", "store", "remote", "warehouse"]
MAPPED = ["sqlite", "postgres", "warehouse"]
"""Those that can show values as columns."""
PLACE = Place(lineage="aa", sequence=(1001, 7, 2), time_us=5, token="k1x", whole=True)


@pytest.fixture(params=KINDS)
def make(request: Any, tmp_path: Path) -> Iterator[Make]:
    """``make()`` gives a sink on the same secondary each time; ``make(tables=…)`` maps keyspaces (:data:`MAPPED`)."""
    kind = request.param
    made: list[Sink] = []
    primary: kvrep.Store | None = None
    if kind == "memory":
        shared = MemorySink()
        build: Make = lambda **_: shared  # noqa: E731
    elif kind == "sqlite":
        build = lambda **o: SqliteSink(str(tmp_path / "copy.db"), busy_timeout_s=0.05, **o)  # noqa: E731
    elif kind == "postgres":
        from kvrep.sinks.postgres import PostgresSink

        url = request.getfixturevalue("shared_postgres").new_url()
        build = lambda **o: PostgresSink(url, **o)  # noqa: E731
    elif kind == "store":
        build = lambda **_: StoreSink("kvrep:x", lambda **o: LocalStore(str(tmp_path / "copy"), **o))  # noqa: E731
    elif kind == "warehouse":
        need_warehouse()
        from kvrep.sinks.warehouse import WarehouseSink

        build = lambda **o: WarehouseSink(f"delta:{tmp_path / 'lake'}{EAGER}", **o)  # noqa: E731
    else:
        primary = kvrep.open(tmp_path / "far", name="far", listen="127.0.0.1:0", acks=0)
        address = primary.address
        build = lambda **_: StoreSink(address, lambda **_: RemoteStore(address))  # noqa: E731

    def make(**options: Any) -> Sink:
        sink = build(**options)
        made.append(sink)
        return sink

    make.kind = kind  # type: ignore[attr-defined]
    yield make
    for sink in made:
        sink.close()
    if primary is not None:
        primary.close()


def rows(sink: Sink, keyspace: str = "default") -> dict[bytes, object]:
    return dict(sink.scan(keyspace)) if keyspace in sink.keyspaces() else {}


def test_rows_and_place_take_effect_together(make: Make) -> None:
    """What was applied is there with its place after the commit, seen from a new connection, too."""
    sink = make()
    assert sink.open() == Place()
    sink.apply([("default", b"a", b"1"), ("users", b"u", b""), ("default", b"b", b"2")])
    sink.apply([("default", b"a", None), ("default", b"b", b"3"), ("default", b"none", None)])
    sink.commit(PLACE)
    sink.close()

    again = make()

    assert again.open() == PLACE
    assert rows(again) == {b"b": b"3"}
    assert rows(again, "users") == {b"u": b""}
    assert again.keyspaces() == ["default", "users"]


def test_looking_makes_nothing(make: Make) -> None:
    """Where no agent has been, a look says so; afterwards it finds the place, and can settle dead letters."""
    if make.kind != "memory":  # type: ignore[attr-defined]
        for _ in range(2):
            with pytest.raises(kvrep.NotAStore, match="there is no secondary"):
                make().look()
    sink = make()
    assert sink.open() == Place()
    sink.apply([("default", b"a", b"1")])
    sink.bury(DeadLetter(keyspace="default", key=b"b", value=b"2", reason="no"))
    sink.commit(PLACE)
    sink.close()

    again = make()

    assert again.look() == PLACE
    (letter,) = again.dead_letters()
    again.apply([("default", b"b", b"2")])
    again.forget([letter.number])
    again.commit(PLACE)
    assert again.hold() == PLACE
    assert rows(again) == {b"a": b"1", b"b": b"2"}


def test_what_was_not_committed_is_not_there(make: Make) -> None:
    """A rollback, and a connection that ends, leave rows and place as the last commit left them."""
    sink = make()
    sink.open()
    sink.apply([("default", b"a", b"1")])
    sink.commit(PLACE)
    sink.apply([("default", b"a", b"2"), ("new", b"x", b"y")])
    sink.rollback()
    assert rows(sink) == {b"a": b"1"}
    sink.apply([("default", b"b", b"2")])
    sink.close()

    assert sink.open() == PLACE
    assert rows(sink) == {b"a": b"1"}
    assert rows(sink, "new") == {}
    sink.apply([("new", b"x", b"y")])
    sink.commit(PLACE)
    assert rows(sink, "new") == {b"x": b"y"}


def test_the_last_of_several_changes_of_a_key_counts(make: Make) -> None:
    """Within one call, operations take effect in their order, also across a delete."""
    sink = make()
    sink.open()
    sink.apply([
        ("default", b"a", b"1"), ("default", b"a", None), ("default", b"a", b"2"),
        ("default", b"b", b"1"), ("default", b"b", None),
    ])  # fmt: skip
    sink.commit(PLACE)
    assert rows(sink) == {b"a": b"2"}


def test_bytes_of_every_kind_arrive_as_they_are(make: Make) -> None:
    """Keys and values are bytes: NUL, invalid UTF-8, quotes, the longest key and keyspace, an empty value."""
    sink = make()
    sink.open()
    content = {b"\0": b"\0\xff", b"\xff\xfe": b"'\";--", b"k" * 511: b"", b"\\x41": b"\\N\t\n"}
    sink.apply([("default", key, value) for key, value in content.items()])
    longest = "k" * 64
    sink.apply([(longest, b"x", b"1"), ("k" * 63 + "j", b"x", b"2"), ("0-_", b"x", b"3")])
    sink.commit(PLACE)
    assert rows(sink) == content
    found = [rows(sink, name) for name in sink.keyspaces() if name != "default"]
    assert sorted(next(iter(r.values())) for r in found) == [b"1", b"2", b"3"]


def test_a_snapshot_replaces_the_copy_at_the_swap(make: Make) -> None:
    """Staged rows arrive in several commits; afterwards what the snapshot does not hold is gone."""
    sink = make()
    sink.open()
    sink.apply([("default", b"old", b"1"), ("default", b"both", b"1"), ("gone", b"x", b"1")])
    sink.commit(PLACE)
    sink.unstage()
    sink.stage([("default", b"both", b"2"), ("default", b"new", b"2")])
    sink.commit(Place(lineage="aa", sequence=(1001, 9, 1 << 32), staging=True))
    sink.close()
    assert sink.open().staging
    if make.kind in ("memory", *MAPPED):  # type: ignore[attr-defined]
        assert rows(sink) == {b"old": b"1", b"both": b"1"}, "the old copy stands until the swap"
    sink.stage([("default", b"new", None), ("default", b"newer", b"3"), ("fresh", b"f", b"4")])
    sink.swap()
    sink.commit(PLACE)

    assert rows(sink) == {b"both": b"2", b"newer": b"3"}
    assert rows(sink, "gone") == {}
    assert rows(sink, "fresh") == {b"f": b"4"}
    sink.apply([("default", b"both", b"5"), ("gone", b"x", b"6"), ("fresh", b"f", None)])
    sink.commit(PLACE)
    assert rows(sink) == {b"both": b"5", b"newer": b"3"}
    assert rows(sink, "gone") == {b"x": b"6"}
    assert rows(sink, "fresh") == {}


def test_a_snapshot_that_begins_again_forgets_the_first(make: Make) -> None:
    """After unstage() only what was staged since then becomes the copy."""
    sink = make()
    sink.open()
    sink.unstage()
    sink.stage([("default", b"first", b"1"), ("other", b"x", b"1")])
    sink.commit(Place(staging=True))
    sink.unstage()
    sink.stage([("default", b"second", b"2"), ("default", b"second", b"3")])
    sink.swap()
    sink.commit(PLACE)
    assert rows(sink) == {b"second": b"3"}
    assert rows(sink, "other") == {}


def test_an_empty_snapshot_empties_the_copy(make: Make) -> None:
    """A swap without anything staged removes every row."""
    sink = make()
    sink.open()
    sink.apply([("default", b"a", b"1")])
    sink.commit(PLACE)
    sink.unstage()
    sink.swap()
    sink.commit(PLACE)
    assert rows(sink) == {}


def test_dead_letters_are_kept_in_order_until_they_are_forgotten(make: Make) -> None:
    """A letter appears with the commit, under a number of its own, with all it was given."""
    sink = make()
    sink.open()
    first = DeadLetter(
        position="1:2:3", keyspace="default", key=b"\0k", value=b"\xff", reason="no", time_us=9
    )
    sink.bury(first)
    sink.bury(DeadLetter(raw=b"\0\xff", reason="what\0ever", time_us=10))
    sink.rollback()
    assert sink.dead_letters() == []
    sink.bury(first)
    sink.bury(DeadLetter(keyspace="default", key=b"d", value=None, reason="a delete", time_us=10))
    sink.bury(DeadLetter(raw=b"\0\xff", reason="unreadable", time_us=11))
    sink.commit(PLACE)
    sink.close()
    sink.open()

    letters = sink.dead_letters()

    assert [(x.position, x.keyspace, x.key, x.value, x.raw, x.reason, x.time_us) for x in letters] == [
        ("1:2:3", "default", b"\0k", b"\xff", b"", "no", 9),
        ("", "default", b"d", None, b"", "a delete", 10),
        ("", "", b"", None, b"\0\xff", "unreadable", 11),
    ]
    assert [x.readable for x in letters] == [True, True, False]
    assert len({x.number for x in letters}) == 3
    sink.forget([letters[0].number, letters[2].number])
    sink.commit(PLACE)
    assert [x.reason for x in sink.dead_letters()] == ["a delete"]


def test_a_change_that_cannot_be_stored_is_named(make: Make) -> None:
    """RejectedChange says which one; nothing of the call is stored, and the rest of the transaction is."""
    if make.kind in MAPPED:  # type: ignore[attr-defined]
        sink = make(tables={"docs": Table(JSON, {"n": "integer"})})
        good, bad = b'{"n": 1}', b"{"
    elif make.kind == "memory":  # type: ignore[attr-defined]
        sink = make()
        good, bad = b"good", b"bad"
        assert isinstance(sink, MemorySink)
        sink.poison = {bad}
    else:
        sink = make()
        good, bad = b"good", b"bad"
    sink.open()
    sink.apply([("docs", b"before", good)])
    ops = [("docs", b"%d" % i, good) for i in range(20)]
    if good == b"good" and make.kind in ("store", "remote"):  # type: ignore[attr-defined]
        ops[13] = ("docs", b"k" * 600, good)
    else:
        ops[13] = ("docs", b"13", bad)

    with pytest.raises(kvrep.RejectedChange) as caught:
        sink.apply(ops)

    assert caught.value.index == 13
    assert caught.value.keyspace == "docs"
    sink.apply(ops[:13] + ops[14:15])
    sink.commit(PLACE)
    assert sorted(rows(sink, "docs")) == sorted([b"before", *(b"%d" % i for i in range(13)), b"14"])


@pytest.mark.parametrize("make", [*MAPPED, "remote"], indirect=True)
def test_a_commit_after_another_agent_moved_the_place_is_refused(make: Make) -> None:
    """Two agents on one secondary do not apply the same changes twice: the slower one is told."""
    one, two = make(), make()
    one.open()
    two.open()
    one.apply([("default", b"a", b"one")])
    one.commit(PLACE)
    two.apply([("default", b"a", b"two")])
    with pytest.raises(kvrep.StoreInUse, match="another agent"):
        two.commit(PLACE)
    two.rollback()
    assert rows(one) == {b"a": b"one"}
    assert two.open() == PLACE


def test_columns_out_of_values() -> None:
    """The rows of a mapped table are fields of the decoded values (checked against the databases below)."""
    table = Table(JSON, {"customer": "text", "total": "numeric", "tags": "jsonb", "paid": "boolean"})
    op = ("orders", b"1", b'{"customer": "Ada", "total": 12.5, "tags": ["x"], "paid": true}')
    assert table.row(0, op) == (b"1", "Ada", "12.5", '["x"]', "true")
    assert table.row(0, ("orders", b"1", b"{}")) == (b"1", None, None, "null", None)


@pytest.mark.parametrize("make", MAPPED, indirect=True)
def test_mapped_tables_have_columns(make: Make) -> None:
    """Text keys and typed columns arrive through changes and through snapshots alike."""
    tables = {
        "orders": Table(JSON, {"customer": "text", "n": "integer"}, text_keys=True),
        "notes": Table(JSON),
    }
    sink = make(tables=tables)
    sink.open()
    sink.apply([("orders", b"a/1", b'{"customer": "Ada", "n": 1}'), ("notes", b"n", b'{"x": [1]}')])
    sink.commit(PLACE)
    assert rows(sink, "orders") == {"a/1": ("Ada", 1)}
    sink.unstage()
    sink.stage([("orders", b"a/2", b'{"customer": "Bo\\t\\n", "n": 2}'), ("orders", b"a/1", b'{"n": null}')])
    sink.stage([("orders", b"a/1", b'{"customer": "Cy", "n": 3}')])
    sink.swap()
    sink.commit(PLACE)
    assert rows(sink, "orders") == {"a/1": ("Cy", 3), "a/2": ("Bo\t\n", 2)}
    sink.apply([("orders", b"a/1", None)])
    sink.commit(PLACE)
    assert rows(sink, "orders") == {"a/2": ("Bo\t\n", 2)}
    with pytest.raises(kvrep.RejectedChange):
        sink.apply([("orders", b"\xff", b"{}")])
    with pytest.raises(kvrep.RejectedChange):
        sink.apply([("orders", b"\xff", None)])
    with pytest.raises(kvrep.RejectedChange):
        sink.stage([("orders", b"x", b'{"customer": "\\u0000"}')])


@pytest.mark.parametrize("make", ["sqlite", "postgres"], indirect=True)
def test_the_mapping_stays_with_the_data(make: Make) -> None:
    """Who opens the copy without mappings goes on with those of its agent, in changes, snapshots and looks."""
    sink = make(tables={"docs": Table(JSON, {"n": "integer"}, text_keys=True)})
    sink.open()
    sink.apply([("docs", b"a", b'{"n": 1}')])
    sink.commit(PLACE)
    sink.close()
    for step in ("open", "look"):
        plain = make()
        getattr(plain, step)()
        plain.apply([("docs", b"b", b'{"n": 2}'), ("docs", b"a", None)])
        plain.commit(PLACE)
        assert rows(plain, "docs") == {"b": 2}
        plain.unstage()
        plain.stage([("docs", b"b", b'{"n": 3}'), ("docs", b"a", b'{"n": 1}')])
        plain.swap()
        plain.commit(PLACE)
        assert rows(plain, "docs") == {"a": 1, "b": 3}
        with pytest.raises(kvrep.RejectedChange):
            plain.apply([("docs", b"c", b"no json")])
        plain.close()


@pytest.mark.parametrize("make", ["sqlite", "postgres"], indirect=True)
def test_the_mapping_of_a_first_snapshot(make: Make) -> None:
    """An agent that was killed in its first snapshot goes on with it under the same mapping."""
    sink = make(tables={"docs": Table(JSON, {"n": "integer"})})
    sink.open()
    sink.unstage()
    sink.stage([("docs", b"a", b'{"n": 1}')])
    sink.commit(Place(staging=True))
    sink.close()
    plain = make()
    assert plain.open().staging
    plain.stage([("docs", b"b", b'{"n": 2}')])
    plain.swap()
    plain.commit(PLACE)
    assert rows(plain, "docs") == {b"a": 1, b"b": 2}


@pytest.mark.parametrize("make", ["sqlite", "postgres"], indirect=True)
def test_a_mapping_that_only_the_application_knows(make: Make) -> None:
    """A codec of the application's own cannot be had from the data: who needs it is told, and rows stay."""
    own = Codec("rot", lambda v: v, lambda data: {"n": data[0]})
    tables = {"docs": Table(own, {"n": "integer"})}
    sink = make(tables=tables)
    sink.open()
    sink.apply([("docs", b"a", b"\x01")])
    sink.commit(PLACE)
    sink.close()
    plain = make()
    plain.look()
    with pytest.raises(kvrep.ConfigurationMismatch, match="the codec 'rot'"):
        plain.apply([("docs", b"b", b"\x02")])
    plain.close()
    sink.open()
    sink.unstage()
    sink.stage([("docs", b"b", b"\x02")])
    sink.swap()
    sink.commit(PLACE)
    assert rows(sink, "docs") == {b"b": 2}


@pytest.mark.parametrize("make", ["store", "remote"], indirect=True)
def test_a_store_with_data_of_others_is_not_replaced(make: Make) -> None:
    """An agent that is pointed at a store that somebody else fills is refused; nothing there changes."""
    sink = make()
    sink.open()
    sink._need().write([("default", b"a", b"theirs")], None)  # type: ignore[attr-defined]
    sink.close()
    with pytest.raises(kvrep.ConfigurationMismatch, match="holds data that no agent put there"):
        make().open()


@pytest.mark.parametrize("make", ["sqlite", "postgres"], indirect=True)
def test_a_table_that_people_made_first_is_used(make: Make) -> None:
    """A table that stands there already, with the right columns, takes part in snapshots and changes."""
    sink = make()
    sink.open()
    sink._begin()  # type: ignore[attr-defined]
    sink._create("default", Table())  # type: ignore[attr-defined]
    sink.commit(Place())
    sink.unstage()
    sink.stage([("default", b"a", b"1")])
    sink.swap()
    sink.apply([("default", b"b", b"2")])
    sink.commit(PLACE)
    assert rows(sink) == {b"a": b"1", b"b": b"2"}


def test_what_follows_from_commits_changes_nothing_that_they_say(make: Make) -> None:
    """tend() may be called between commits, at any time, and leaves place and rows as they are."""
    sink = make()
    sink.open()
    for value in (b"1", b"2"):
        sink.apply([("default", b"a", value), ("default", value, b"x")])
        sink.commit(PLACE)
        sink.tend()
        assert not sink.behind
        assert rows(sink)[b"a"] == value
    sink.apply([("default", b"2", None)])
    sink.tend()
    sink.rollback()
    assert rows(sink) == {b"a": b"2", b"1": b"x", b"2": b"x"}
    assert sink.hold() == PLACE
    assert rows(sink) == {b"a": b"2", b"1": b"x", b"2": b"x"}
    sink.rollback()
    assert sink.open() == PLACE


def test_a_snapshot_row_that_comes_twice(make: Make) -> None:
    """A row that is staged again, in the same call or a later one, before or after a commit, counts once."""
    sink = make()
    sink.open()
    sink.unstage()
    sink.stage([("default", b"%d" % i, b"1") for i in range(10)])
    sink.stage([("other", b"x", b"1")])
    sink.stage([("default", b"3", b"2"), ("default", b"new", b"1")])
    sink.stage([("default", b"7", b"y" * 5000), ("default", b"new", b"2"), ("default", b"empty", b"")])
    sink.commit(Place(staging=True))
    sink.stage([("default", b"4", b"3"), ("default", b"4", b"4"), ("more", b"x", b"1")])
    sink.stage([("default", b"5", None)])
    sink.stage([("default", b"6", b"x" * 5000)])
    sink.bury(DeadLetter(reason="in between"))
    sink.swap()
    sink.commit(PLACE)
    expected = {b"%d" % i: b"1" for i in range(10)} | {
        b"3": b"2",
        b"new": b"2",
        b"empty": b"",
        b"7": b"y" * 5000,
        b"4": b"4",
        b"6": b"x" * 5000,
    }
    del expected[b"5"]
    assert rows(sink) == expected
    assert rows(sink, "other") == rows(sink, "more") == {b"x": b"1"}


def test_a_rollback_in_the_middle_of_a_snapshot(make: Make) -> None:
    """What was staged since the last commit is forgotten by a rollback, by close() and by an error of the caller."""
    sink = make()
    sink.open()
    sink.unstage()
    sink.stage([("default", b"a", b"1")])
    sink.commit(Place(staging=True))
    sink.stage([("default", b"b", b"1")])
    sink.rollback()
    sink.stage([("default", b"c", b"1")])
    sink.close()
    sink.open()
    sink.stage([("default", b"d", b"1")])
    sink.swap()
    sink.commit(PLACE)
    assert rows(sink) == {b"a": b"1", b"d": b"1"}
