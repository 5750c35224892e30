"""The kvrep command on groups: members, promote, switchover, and what to do with rescue files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.cli.exits import Exit
from kvrep.storage.log_file import fsync_directory
from tests.cli_kit import pair, run_here, wait_until

FAST: dict[str, Any] = {
    "heartbeat_interval_s": 0.1,
    "heartbeat_timeout_s": 1.0,
    "reconnect_backoff_max_s": 0.1,
}


def test_members_and_switchover(tmp_path: Path, capfdbinary: Any) -> None:
    """Members shows who is what; a dry run names obstacles; a switchover hands over and says to whom."""
    with pair(tmp_path, **FAST) as (a, b):
        wait_until(lambda: a.switchover("b", dry_run=True) == (), "b can take over")
        shown = run_here(capfdbinary, "members", b.address)
        assert shown.code == Exit.OK
        assert "primary" in shown.text
        members = {
            m["name"]: m for m in run_here(capfdbinary, "members", a.address, "--json").json["members"]
        }
        assert {n: m["role"] for n, m in members.items()} == {"a": "primary", "b": "follower"}
        assert members["b"]["address"] == b.address
        blocked = run_here(capfdbinary, "switchover", a.address, "--to", "x", "--dry-run")
        assert (blocked.code, "not a voter" in blocked.text) == (Exit.REFUSED, True)
        free = run_here(capfdbinary, "switchover", a.address, "--to", "b", "--dry-run")
        assert (free.code, "nothing would block" in free.text) == (Exit.OK, True)
        done = run_here(capfdbinary, "switchover", a.address, "--to", "b")
        assert (done.code, b.address in done.text) == (Exit.OK, True)
        assert (a.status().role, b.status().role) == ("follower", "primary")
        refused = run_here(capfdbinary, "switchover", a.address, "--to", "b")
        assert refused.code == Exit.REFUSED
        assert "not the primary" in refused.err


def test_promote_and_force(tmp_path: Path, capfdbinary: Any) -> None:
    """A promotion that cannot be safe is refused with the names; --force takes voters and a rule."""
    with pair(tmp_path, acks=0, **FAST) as (a, b):
        b.wait_for(a.put(b"k", b"1"))
        a.close()
        refused = run_here(capfdbinary, "promote", b.address)
        assert refused.code == Exit.REFUSED
        assert "missing: a" in refused.err
        assert run_here(capfdbinary, "promote", b.address, "--acks", "0").code == Exit.USAGE
        assert run_here(capfdbinary, "promote", str(tmp_path / "b")).code == Exit.USAGE
        done = run_here(
            capfdbinary, "promote", b.address, "--force", "--voters", "b", "--acks", "0", "--json"
        )
        assert done.code == Exit.OK
        assert done.json["epoch"] == b.status().epoch
        assert b.status().voters == ("b",)
        members = run_here(capfdbinary, "members", b.address, "--json").json["members"]
        assert [(m["name"], m["role"]) for m in members] == [("b", "primary")]


@pytest.fixture
def parted(tmp_path: Path) -> Iterator[tuple[kvrep.Store, kvrep.Store, Path]]:
    """(the new primary ``b``, the old one ``a`` that follows it, the rescue file of ``a``)."""
    with pair(tmp_path, acks=0, **FAST) as (a, b):
        b.wait_for(a.put(b"kept", b"1"))
        a.put(b"taken", b"before")
        b.wait_for(a.put(b"gone", b"before"))
        address = b.address
        b.close()
        a.put(b"mine", b"old")
        a.put(b"mine", b"new")
        a.put(b"taken", b"a")
        a.keyspace("users").put(b"\xff\x00", b"binary")
        a.delete(b"gone")
        listen = a.address
        a.close()
    with kvrep.open(tmp_path / "b", listen=address, follow=listen, **FAST) as b:
        b.promote(force=True, timeout_s=5.0)
        b.put(b"taken", b"b")
        with kvrep.open(tmp_path / "a", listen=listen, **FAST) as a:
            a.wait_for(b.position, 10.0)
            (path,) = a.status().rescued
            yield b, a, Path(path)


def test_rescue_list_show_export(
    tmp_path: Path, parted: tuple[kvrep.Store, kvrep.Store, Path], capfdbinary: Any
) -> None:
    """The files of an open store are listed, their operations shown, their last state exported for load."""
    _, _, path = parted
    rows = [
        json.loads(line)
        for line in run_here(capfdbinary, "rescue", "list", tmp_path / "a", "--json").text.splitlines()
    ]
    assert [r["file"] for r in rows] == [str(path)]
    assert rows[0]["writes"] == 5
    assert path.name in run_here(capfdbinary, "rescue", "list", tmp_path / "a").text
    assert "nothing was ever dropped" in run_here(capfdbinary, "rescue", "list", tmp_path / "b").text
    shown = run_here(capfdbinary, "rescue", "show", path).text
    assert "mine\told" in shown
    assert "gone\tdeleted" in shown
    ops = [
        json.loads(line) for line in run_here(capfdbinary, "rescue", "show", path, "--json").text.splitlines()
    ]
    assert {"position", "keyspace", "key", "deleted"} == set(ops[-1])
    assert len(run_here(capfdbinary, "rescue", "show", path, "--json", "--limit", 2).text.splitlines()) == 2
    exported = run_here(capfdbinary, "rescue", "export", path)
    assert "1 deleted keys are left out" in exported.err
    lines = tmp_path / "lost.jsonl"
    lines.write_bytes(exported.out)
    assert run_here(capfdbinary, "load", tmp_path / "new", lines, "--create").code == Exit.OK
    with kvrep.open(tmp_path / "new") as new:
        assert dict(new) == {b"mine": b"new", b"taken": b"a"}
        assert new.keyspace("users")[b"\xff\x00"] == b"binary"


def test_reapply_leaves_alone_what_has_changed(
    parted: tuple[kvrep.Store, kvrep.Store, Path], capfdbinary: Any
) -> None:
    """Through a follower's address: only keys that nobody has touched since; with --force all of them."""
    b, a, path = parted
    dry = run_here(capfdbinary, "rescue", "reapply", path, a.address, "--dry-run", "--json")
    assert dry.json == {"written": 0, "would_write": 3, "changed": 1}
    assert b.get(b"mine") is None
    done = run_here(capfdbinary, "rescue", "reapply", path, a.address)
    assert done.code == Exit.OK
    assert "taken" in done.err
    assert (b[b"mine"], b[b"taken"], b.get(b"gone")) == (b"new", b"b", None)
    assert b.keyspace("users")[b"\xff\x00"] == b"binary"
    again = run_here(capfdbinary, "rescue", "reapply", path, b.address, "--json")
    assert again.json == {"written": 0, "would_write": 0, "changed": 4}
    assert run_here(capfdbinary, "rescue", "reapply", path, b.address, "--force").code == Exit.OK
    assert b[b"taken"] == b"a"


def test_reapply_into_a_closed_store_and_refusals(
    tmp_path: Path, parted: tuple[kvrep.Store, kvrep.Store, Path], capfdbinary: Any
) -> None:
    """A path that belongs to a group, another store, a damaged file: each is refused by name."""
    b, a, path = parted
    b.close()
    a.close()
    group = run_here(capfdbinary, "rescue", "reapply", path, tmp_path / "a")
    assert (group.code, "belongs to a group" in group.err) == (Exit.REFUSED, True)
    with kvrep.open(tmp_path / "other") as other:
        other.put(b"k", b"v")
    stranger = run_here(capfdbinary, "rescue", "reapply", path, tmp_path / "other", "--force")
    assert (stranger.code, "another store" in stranger.err) == (Exit.REFUSED, True)
    assert run_here(capfdbinary, "rescue", "reapply", path).code == Exit.USAGE
    path.write_bytes(path.read_bytes()[:-3])
    damaged = run_here(capfdbinary, "rescue", "show", path)
    assert (damaged.code, "damaged" in damaged.err or "ends before" in damaged.err) == (Exit.DAMAGED, True)
    listed = run_here(capfdbinary, "rescue", "list", tmp_path / "a")
    assert (listed.code, "DAMAGED" in listed.text) == (Exit.DAMAGED, True)


def test_reapply_into_a_lone_store(tmp_path: Path, capfdbinary: Any) -> None:
    """A store of its own whose log was cut takes its records back from the file, on disk."""
    from kvrep.storage.rescue import save_records

    with kvrep.open(tmp_path / "s") as store:
        store.put(b"kept", b"1")
        lost = store.put(b"lost", b"2")
        store.put(b"again", b"3")
        last = store.put(b"again", b"4")
        engine = store._node.engine
        path = save_records(engine.home.rescue, engine.committer.log, lost.offset, last.offset,
                            lineage=engine.home.lineage, reason="a test")  # fmt: skip
        fsync_directory(path.parent)
    done = run_here(capfdbinary, "rescue", "reapply", path, tmp_path / "s", "--json")
    assert done.json == {"written": 0, "would_write": 0, "changed": 2}
    forced = run_here(capfdbinary, "rescue", "reapply", path, tmp_path / "s", "--json", "--force")
    assert forced.json["written"] == 2
    with kvrep.open(tmp_path / "s") as store:
        assert store[b"again"] == b"4"


def test_what_feeds_left_in_a_rescue_file(tmp_path: Path, capfdbinary: Any) -> None:
    """Messages are shown and counted, and not sent again; the place of a feed is never written back."""
    from kvrep.storage.rescue import save_records

    with kvrep.open(tmp_path / "s") as store:
        store.put(b"kept", b"1")
        with store.transaction() as txn:
            txn.put(b"lost", b"2")
            txn.emit("orders", b"message")
        lost = txn.position
        assert lost is not None
        with store.feed("f") as feed:
            feed.poll()
            last = feed.ack()
        assert last is not None
        engine = store._node.engine
        path = save_records(engine.home.rescue, engine.committer.log, lost.offset, last.offset,
                            lineage=engine.home.lineage, reason="a test")  # fmt: skip
        fsync_directory(path.parent)
    with kvrep.open(tmp_path / "s") as store:
        place = store.feeds()[0].position
    shown = run_here(capfdbinary, "rescue", "show", path)
    assert [line.split("\t")[1:] for line in shown.text.splitlines()[1:]] == [
        ["default", "lost", "2"],
        ["(message)", "orders", "message"],
    ]
    lines = run_here(capfdbinary, "rescue", "show", path, "--json").text.splitlines()
    listed = [json.loads(line) for line in lines]
    assert listed[1] == {"position": str(lost), "topic": "orders", "value": "message"}
    listing = run_here(capfdbinary, "rescue", "list", tmp_path / "s", "--json").json
    assert listing["writes"] == 3
    done = run_here(capfdbinary, "rescue", "reapply", path, tmp_path / "s", "--force")
    assert done.code == Exit.OK, done.err
    assert "1 messages are not sent again" in done.err
    with kvrep.open(tmp_path / "s") as store:
        assert store[b"lost"] == b"2"
        assert store.feeds()[0].position == place
