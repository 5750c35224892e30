"""Agents into a warehouse: what stands in its tables, asked with DuckDB."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.codecs import JSON
from kvrep.sinks.agent import retry_dead_letters
from kvrep.sinks.interface import Place
from kvrep.sinks.tables import Table
from tests.agent_kit import agent_of, content, copy_of, wait_current, wait_until
from tests.warehouse_kit import EAGER, ask, current, files_of, need_warehouse, replayed

need_warehouse()

from kvrep.sinks import lastrows, warehouse  # noqa: E402
from kvrep.sinks.delta import Delta  # noqa: E402
from kvrep.sinks.warehouse import WarehouseSink  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "lake"


@pytest.fixture
def sink(folder: Path) -> Iterator[WarehouseSink]:
    """An open one with nothing in it, which does everything at once."""
    made = eager(folder)
    made.open()
    yield made
    made.close()


def eager(folder: Path, **options: Any) -> WarehouseSink:
    return WarehouseSink(f"delta:{folder}{EAGER}", **options)


def put(sink: WarehouseSink, **values: str) -> None:
    """Commit these to the default keyspace."""
    sink.apply([("default", key.encode(), value.encode()) for key, value in values.items()])
    sink.commit(Place(lineage="aa", whole=True))


def test_the_history_holds_every_change_and_the_current_state_the_last(
    store_path: Path, folder: Path
) -> None:
    """Every change stands in the history once, in order, with its position and time; deleted keys are not current."""
    with kvrep.open(store_path) as db:
        db.put(b"old", b"0")
        with agent_of(db, eager(folder)) as agent:
            wait_current(agent, db)
            began_us = time.time_ns() // 1000
            positions = [db.put(b"k%d" % (i % 3), b"%d" % i) for i in range(20)]
            positions.append(db.keyspace("users").put(b"\0\xff", b""))
            positions.append(db.delete(b"old") or db.position)
            agent.wait_for(db.position)
            wait_current(agent, db)
        expected = content(db)
    assert current(folder) == replayed(folder) == expected
    rows = ask(
        folder,
        "SELECT op, keyspace, key, value, epoch, log_offset, epoch_us(committed_at) FROM history"
        " WHERE NOT snapshot ORDER BY number",
    )
    assert [(epoch, offset) for *_, epoch, offset, _ in rows] == [tuple(p) for p in positions]
    assert rows[0][:4] == ("put", "default", b"k0", b"0")
    assert rows[-2][:4] == ("put", "users", b"\0\xff", b"")
    assert rows[-1][:4] == ("delete", "default", b"old", None)
    times = [row[-1] for row in rows]
    assert times == sorted(times)
    assert began_us <= times[0] <= times[-1] <= time.time_ns() // 1000
    assert ask(folder, "SELECT op, key, snapshot FROM history WHERE snapshot ORDER BY number") == [
        ("clear", None, True), ("put", b"old", True),
    ]  # fmt: skip
    same = "SELECT count(*) FROM history h JOIN current_default c ON h.number = c.kvrep_number AND h.value = c.value"
    assert ask(folder, same) == [(3,)]
    assert ask(folder, "SELECT DISTINCT typeof(key), typeof(committed_at) FROM history") == [
        ("BLOB", "TIMESTAMP WITH TIME ZONE")
    ]


def test_the_state_as_of_any_moment(sink: WarehouseSink, folder: Path) -> None:
    """The history gives the state after each of its rows, back to the last snapshot."""
    put(sink, a="1", b="1")
    put(sink, a="2")
    sink.apply([("default", b"b", None)])
    sink.commit(Place())
    as_of = (
        "SELECT key, value FROM history WHERE number <= {} QUALIFY row_number() OVER"
        " (PARTITION BY keyspace, key ORDER BY number DESC) = 1 AND op = 'put' ORDER BY key"
    )
    states = [ask(folder, as_of.format(number)) for number in range(1, 5)]
    assert states == [
        [(b"a", b"1")], [(b"a", b"1"), (b"b", b"1")], [(b"a", b"2"), (b"b", b"1")], [(b"a", b"2")],
    ]  # fmt: skip


def test_readers_see_the_old_state_until_a_snapshot_is_whole(sink: WarehouseSink, folder: Path) -> None:
    """While a new snapshot arrives, in several commits, neither table shows anything of it; then both show all."""
    sink.apply([("default", b"old", b"1"), ("default", b"both", b"1"), ("gone", b"x", b"1")])
    sink.commit(Place())
    sink.tend()
    before, rows = current(folder), ask(folder, "SELECT count(*) FROM history")
    sink.unstage()
    for i in range(3):
        sink.stage([("default", b"both", b"2"), ("default", b"new%d" % i, b"2")])
        sink.commit(Place(staging=True))
        sink.tend()
        assert current(folder) == before
        assert ask(folder, "SELECT count(*) FROM history") == rows
    sink.swap()
    sink.commit(Place(whole=True))
    assert replayed(folder)["default"].keys() == {b"both", b"new0", b"new1", b"new2"}
    assert current(folder) == before
    assert sink.behind
    sink.tend()
    assert not sink.behind
    assert current(folder) == replayed(folder)
    assert files_of(folder / "staged") == []


def test_a_crash_between_history_and_current_state_is_repaired(folder: Path) -> None:
    """What was committed shows in the current state after the next agent's start, without any new change."""
    for round_ in range(3):
        sink = eager(folder)
        sink.open()
        put(sink, a=str(round_), **{f"k{round_}": "1"})
        if round_ == 0:
            sink.tend()
        sink.close()
    assert current(folder) == {"default": {b"a": b"0", b"k0": b"1"}}
    sink = eager(folder)
    sink.open()
    assert dict(sink.scan("default")) == {b"a": b"2", b"k0": b"1", b"k1": b"1", b"k2": b"1"}
    sink.tend()
    sink.close()
    assert (
        current(folder)
        == replayed(folder)
        == {"default": {b"a": b"2", b"k0": b"1", b"k1": b"1", b"k2": b"1"}}
    )


def test_a_current_state_that_was_removed_comes_back(sink: WarehouseSink, folder: Path) -> None:
    """The current state is made anew from the history, also with other columns than before."""
    import shutil

    sink.unstage()
    sink.stage([("docs", b"x", b'{"n": 1}'), ("docs", b"y", b'{"n": 2}')])
    sink.swap()
    sink.commit(Place())
    sink.apply([("docs", b"x", b'{"n": 3}')])
    sink.commit(Place())
    sink.tend()
    sink.close()
    other = eager(folder, tables={"docs": Table(JSON, {"n": "integer"}, text_keys=True)})
    with pytest.raises(kvrep.ConfigurationMismatch, match="remove that folder"):
        other.open()
    shutil.rmtree(folder / "current" / "docs")
    other.open()
    other.tend()
    other.close()
    assert sorted(ask(folder, "SELECT key, n FROM current_docs")) == [("x", 3), ("y", 2)]


def test_columns_have_their_types(folder: Path) -> None:
    """Mapped values stand in columns of their own types; a sink that is told nothing knows the mapping."""
    columns = {
        "customer": "text", "n": "bigint", "total": "numeric(10, 2)", "paid": "boolean", "day": "date",
        "seen": "timestamptz", "tags": "jsonb", "share": "double precision",
    }  # fmt: skip
    sink = eager(folder, tables={"orders": Table(JSON, columns, text_keys=True)})
    sink.open()
    value = (
        b'{"customer": "Ada", "n": 5, "total": 12.345, "paid": true, "day": "2026-11-21",'
        b' "seen": "2026-11-21T06:00:00+02:00", "tags": ["x"], "share": 0.5}'
    )
    sink.apply([("orders", b"1", value), ("orders", b"2", b"{}")])
    for bad in (
        b'{"n": "x"}',
        b'{"n": 9223372036854775808}',
        b'{"total": 1e9}',
        b'{"day": "soon"}',
        b"[]",
        b"{",
    ):
        with pytest.raises(kvrep.RejectedChange) as caught:
            sink.apply([("orders", b"good", b"{}"), ("orders", b"bad", bad)])
        assert (caught.value.index, caught.value.key) == (1, b"bad")
    sink.commit(Place())
    sink.tend()
    sink.close()
    assert ask(folder, "SELECT * EXCLUDE (kvrep_number, kvrep_epoch, kvrep_offset, kvrep_time)"
 " REPLACE (epoch_us(seen) AS seen) FROM current_orders"
               " WHERE key = '1'") == [(
        "1", "Ada", 5, Decimal("12.35"), True, date(2026, 11, 21),
        int(datetime(2026, 11, 21, 4, tzinfo=UTC).timestamp() * 1e6), '["x"]', 0.5,
    )]  # fmt: skip
    told_nothing = eager(folder)
    told_nothing.open()
    assert dict(told_nothing.scan("orders"))["2"] == (None,) * 6 + ("null", None)
    told_nothing.apply([("orders", b"2", None)])
    told_nothing.commit(Place())
    told_nothing.tend()
    told_nothing.close()
    assert ask(folder, "SELECT key FROM current_orders") == [("1",)]


def test_small_files_are_joined(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many commits there were, a few files hold the same rows, and files that were replaced are deleted."""
    monkeypatch.setattr(warehouse, "SMALL_MAX", 4)
    monkeypatch.setattr(warehouse, "VACUUM_S", 0.0)
    sink = WarehouseSink(f"delta:{folder}{EAGER}&retention_h=0")
    sink.open()
    expected = {}
    for i in range(30):
        expected[f"k{i}".encode()] = b"%d" % i
        put(sink, **{f"k{i}": str(i)})
        sink.tend()
        for table in (folder / "history", folder / "current" / "default"):
            assert len(files_of(table)) <= 5
    assert sink.open() == Place(lineage="aa", whole=True)
    sink.close()
    assert current(folder) == replayed(folder) == {"default": expected}
    assert ask(folder, "SELECT count(*), count(DISTINCT number), max(number) FROM history") == [(30, 30, 30)]
    on_disk = list((folder / "history").glob("*.parquet"))
    assert len(on_disk) <= 10


def test_files_that_readers_may_still_want_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was replaced less than ``retention_h`` ago is still there: a query that began before can finish."""
    monkeypatch.setattr(warehouse, "SMALL_MAX", 2)
    monkeypatch.setattr(warehouse, "VACUUM_S", 0.0)
    sink = eager(folder)
    sink.open()
    seen: set[str] = set()
    for i in range(8):
        put(sink, a=str(i))
        seen |= set(files_of(folder / "history")) | set(files_of(folder / "current" / "default") if i else [])
        sink.tend()
    sink.close()
    assert len(files_of(folder / "history")) < 8
    assert all(Path(file).exists() for file in seen)


def test_rows_that_do_not_change_stay_in_their_files(sink: WarehouseSink, folder: Path) -> None:
    """New keys are added to the current state; only files with rows that change or go are written anew."""
    put(sink, a="1")
    sink.tend()
    first = files_of(folder / "current" / "default")
    put(sink, b="1")
    sink.tend()
    assert set(first) < set(files_of(folder / "current" / "default"))
    both = files_of(folder / "current" / "default")
    put(sink, a="2", c="1")
    sink.tend()
    now = files_of(folder / "current" / "default")
    assert set(now) & set(both) == set(both) - set(first)
    assert len(now) == 2
    assert current(folder) == {"default": {b"a": b"2", b"b": b"1", b"c": b"1"}}


def test_a_refresh_of_more_keys_than_fit_in_memory(
    sink: WarehouseSink, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row of each key is found through a temporary file as well."""
    monkeypatch.setattr(lastrows, "KEYS_MAX", 10)
    expected = {}
    for round_ in range(3):
        for i in range(0, 100, round_ + 1):
            sink.apply([("default", b"%d" % i, b"%d" % round_)])
            expected[b"%d" % i] = b"%d" % round_
        sink.apply([("default", b"%d" % round_, None)])
        expected.pop(b"%d" % round_)
        sink.commit(Place())
        if round_ != 1:
            sink.tend()
            assert current(folder) == {"default": expected}
    assert dict(sink.scan("default")) == expected


def test_a_refresh_that_is_given_up(sink: WarehouseSink, folder: Path) -> None:
    """An agent that is told to end leaves a refresh half way; nothing of it shows, and the next one does it."""
    put(sink, a="1")
    sink.tend()
    put(sink, a="2")
    answers = iter([False])
    sink.tend(lambda: next(answers, True))
    assert sink.behind
    assert current(folder) == {"default": {b"a": b"1"}}
    sink.tend()
    assert not sink.behind
    assert current(folder) == {"default": {b"a": b"2"}}


def test_changes_are_gathered(store_path: Path, folder: Path) -> None:
    """With ``commit_s`` there are few commits, however many changes come one by one; the delay is that long."""
    with kvrep.open(store_path) as db:
        sink = WarehouseSink(f"delta:{folder}?commit_s=0.5&refresh_s=0")
        with agent_of(db, sink) as agent:
            wait_current(agent, db)
            began = time.monotonic()
            before = agent.status().commits
            for i in range(200):
                db.put(b"%d" % (i % 7), b"%d" % i)
                if i % 20 == 0:
                    applied = agent.status().applied
                    wait_until(lambda: agent.status().backlog or agent.status().applied > applied, "it comes")
            agent.wait_for(db.position)
            commits, took_s = agent.status().commits - before, time.monotonic() - began
            wait_current(agent, db)
        assert commits <= took_s / 0.5 + 2
        assert current(folder) == content(db)


def test_dead_letters(store_path: Path, folder: Path) -> None:
    """What does not fit is put aside and shown; a later change of the key settles it; a retry takes effect."""
    tables = {"docs": Table(JSON, {"n": "integer"})}
    with kvrep.open(store_path) as db:
        docs = db.keyspace("docs")
        docs.put(b"good", b'{"n": 1}')
        docs.put(b"bad", b"no json")
        with agent_of(db, eager(folder, tables=tables)) as agent:
            wait_until(lambda: agent.status().dead_letters == 1, "one is put aside")
            docs.put(b"worse", b'{"n": "x"}')
            wait_until(lambda: agent.status().dead_letters == 2, "two are")
            agent.wait_for(docs.put(b"bad", b'{"n": 2}'))
            assert agent.status().dead_letters == 1, "it is settled"
            assert not agent.status().consistent
            assert copy_of(eager(folder)) == {"docs": {b"good": 1, b"bad": 2}}
    sink = eager(folder)
    sink.open()
    (letter,) = sink.dead_letters()
    assert (letter.key, letter.value, letter.keyspace) == (b"worse", b'{"n": "x"}', "docs")
    done, failed = retry_dead_letters(sink)
    assert (done, [x.number for x in failed]) == ([], [letter.number])
    sink.close()
    import shutil

    shutil.rmtree(folder / "current" / "docs")
    sink = eager(folder, tables={"docs": Table(JSON)})
    assert retry_dead_letters(sink) == ([letter.number], [])
    sink.close()
    assert copy_of(eager(folder)) == {
        "docs": {b"good": '{"n": 1}', b"bad": '{"n": 2}', b"worse": '{"n": "x"}'}
    }
    assert ask(folder, "SELECT count(*) FROM current_docs") == [(3,)]


def test_a_second_agent_ends(store_path: Path, folder: Path) -> None:
    """Two agents on one folder: the changes are there once, and one of the two has been told."""
    with kvrep.open(store_path) as db:
        one, two = agent_of(db, eager(folder)), agent_of(db, eager(folder))
        with one, two:
            for i in range(30):
                db.put(b"%d" % (i % 4), b"%d" % i)
            for agent in (one, two):
                agent.wait_for(db.position)
            wait_until(lambda: one.status().reconnects + two.status().reconnects > 0, "one of them is told")
            wait_until(lambda: current(folder) == content(db), "the current state has followed")
    rows = ask(folder, "SELECT log_offset, log_index FROM history WHERE NOT snapshot")
    assert len(set(rows)) == len(rows)
    assert replayed(folder) == current(folder)


def test_places_that_are_something_else(tmp_path: Path) -> None:
    """A file, a folder with other things, a Delta table of others, no parent: refused at once, and left as it is."""
    import pyarrow as pa
    from deltalake import write_deltalake

    (tmp_path / "file").write_text("x")
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "a.txt").write_text("x")
    (tmp_path / "half" / "history").mkdir(parents=True)
    (tmp_path / "half" / "history" / "book.txt").write_text("x")
    others = pa.table({"x": [1]})
    write_deltalake(str(tmp_path / "table"), others)
    write_deltalake(str(tmp_path / "lake" / "history"), others)
    before = sorted(tmp_path.rglob("*"))
    for name, kind, words in [
        ("file", kvrep.NotAStore, "is a file"),
        ("things", kvrep.NotAStore, "something else: a.txt"),
        ("half", kvrep.NotAStore, "something else: book.txt"),
        ("table", kvrep.NotAStore, "empty folder"),
        ("lake", kvrep.NotAStore, "table of something else"),
        ("no/such", kvrep.ConfigurationMismatch, "folder exists"),
    ]:
        with pytest.raises(kind, match=words):
            eager(tmp_path / name).open()
    assert sorted(tmp_path.rglob("*")) == before
    for address in ("delta:", "delta://", "delta:x?commit_s=soon", "delta:x?commit_s=-1", "delta:x?speed=1"):
        with pytest.raises(kvrep.ConfigurationMismatch):
            WarehouseSink(address)


def test_maintenance_by_others_does_no_harm(sink: WarehouseSink, folder: Path) -> None:
    """Commits of other programs, which carry no notes, hide nothing: the place is found, and the agent goes on."""
    from deltalake import DeltaTable

    for i in range(4):
        put(sink, a=str(i))
    DeltaTable(str(folder / "history")).optimize.compact()
    sink.apply([("default", b"b", b"1")])
    with pytest.raises(kvrep.PeerUnavailable, match="another program"):
        sink.commit(Place())
    assert sink.open() == Place(lineage="aa", whole=True)
    put(sink, b="1")
    sink.tend()
    assert current(folder) == replayed(folder) == {"default": {b"a": b"3", b"b": b"1"}}


def test_rows_of_a_snapshot_that_others_removed(sink: WarehouseSink, folder: Path) -> None:
    """A snapshot of which rows are missing never becomes the copy."""
    from deltalake import DeltaTable

    sink.unstage()
    sink.stage([("default", b"a", b"1"), ("default", b"b", b"1")])
    sink.commit(Place(staging=True))
    DeltaTable(str(folder / "staged")).delete("number = 1")
    sink.swap()
    with pytest.raises(kvrep.NotAStore, match="1 of 2 rows"):
        sink.commit(Place(whole=True))
    assert sink.open().staging


def test_what_a_commit_wrote_ahead_does_not_count_without_it(
    sink: WarehouseSink, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Staged rows and dead letters of a commit that failed are never seen, also not by the commits after it."""
    from kvrep.sinks.interface import DeadLetter

    write = Delta.write

    def failing(table: Delta, batches: Any, **options: Any) -> None:
        if table.uri.endswith("/history"):
            raise kvrep.PeerUnavailable("no answer", address="x")
        write(table, batches, **options)

    sink.unstage()
    sink.stage([("default", b"a", b"1")])
    sink.commit(Place(staging=True))
    for _ in range(2):
        sink.stage([("default", b"lost", b"1")])
        sink.bury(DeadLetter(reason="lost"))
        with monkeypatch.context() as patch:
            patch.setattr(Delta, "write", failing)
            with pytest.raises(kvrep.PeerUnavailable):
                sink.commit(Place(staging=True))
        assert sink.open().staging
    sink.stage([("default", b"b", b"1")])
    sink.bury(DeadLetter(reason="kept"))
    sink.commit(Place(staging=True))
    sink.swap()
    sink.commit(Place(whole=True))
    sink.tend()
    assert current(folder) == replayed(folder) == {"default": {b"a": b"1", b"b": b"1"}}
    assert [letter.reason for letter in sink.dead_letters()] == ["kept"]


def test_a_slower_agent_does_not_take_the_current_state_back(
    sink: WarehouseSink, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that knows an older history leaves a table alone that another one has made meanwhile."""
    put(sink, a="1")
    slower = eager(folder)
    slower.open()
    create = Delta.create

    def overtaken(table: Delta, description: str) -> None:
        monkeypatch.setattr(Delta, "create", create)
        put(sink, a="2")
        sink.tend()
        table.create(description)

    monkeypatch.setattr(Delta, "create", overtaken)
    slower.tend()
    slower.close()
    assert current(folder) == {"default": {b"a": b"2"}}
