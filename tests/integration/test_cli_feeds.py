"""The kvrep command on feeds: watching changes, and managing named feeds."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.cli.exits import Exit
from kvrep.model.event import Event
from tests.cli_kit import WAIT_S, command, pair, run_here, wait_until

FAST: dict[str, Any] = {
    "heartbeat_interval_s": 0.1,
    "heartbeat_timeout_s": 1.0,
    "reconnect_backoff_max_s": 0.1,
}


def fill(db: kvrep.Store) -> kvrep.Position:
    db.put(b"a", b"1")
    db.keyspace("users").put(b"\xff", b"2")
    with db.transaction() as txn:
        txn.delete(b"a")
        txn.emit("orders", b"m", headers={"x": "y"})
        txn.put(b"b", b"3")
    return db.position


def test_changes_of_a_store_on_disk(tmp_path: Path, capfdbinary: Any) -> None:
    """All forms of the log of a store that nobody has open, selected, from a place, or as a snapshot."""
    with kvrep.open(tmp_path / "s") as db:
        last = fill(db)
        middle = db.put(b"c", b"4")
    target = str(tmp_path / "s")
    shown = run_here(capfdbinary, "changes", target)
    assert shown.code == Exit.OK
    assert [line.split("\t")[1:] for line in shown.text.splitlines()] == [
        ["put", "default", "a", "1"],
        ["put", "users", "\\xff", "2"],
        ["delete", "default", "a", ""],
        ["put", "default", "b", "3"],
        ["emit", "", "orders", "m"],
        ["put", "default", "c", "4"],
    ]
    lines = run_here(capfdbinary, "changes", target, "--json", "--limit", "5").text.splitlines()
    fields = [json.loads(line) for line in lines]
    assert [f["kind"] for f in fields] == ["put", "put", "delete", "put", "emit"]
    assert fields[1]["key_base64"] == "/w=="
    assert (fields[4]["topic"], fields[4]["headers"], fields[4]["value"]) == ("orders", {"x": "y"}, "m")
    assert fields[4]["position"] == str(last)
    rest = run_here(capfdbinary, "changes", target, "--from", fields[4]["resume"], "--keys-as-they-are")
    assert rest.code == Exit.USAGE
    for place in (fields[4]["resume"], str(last)):
        rest = run_here(capfdbinary, "changes", target, "--from", place, "--hex")
        assert rest.text == f"{middle}.0\tput\tdefault\t63\t34\n"
    users = run_here(capfdbinary, "changes", target, "--keyspace", "users", "--events")
    assert Event.from_json(users.out).key == b"\xff"
    envelope = run_here(capfdbinary, "changes", target, "--topic", "orders", "--debezium").json
    assert envelope["op"] == "m"
    rows = run_here(capfdbinary, "changes", target, "--snapshot", "--prefix", "b")
    assert [line.split("\t")[1] for line in rows.text.splitlines()] == ["begin", "put", "end"]
    assert run_here(capfdbinary, "changes", target, "--limit", "0").out == b""


def test_former_values(tmp_path: Path, capfdbinary: Any) -> None:
    """With --before, of a running node as of a store on disk, what a key held is told; without, it is not."""
    with kvrep.open(tmp_path / "s", listen="127.0.0.1:0") as db:
        kept = db.keyspace("kept", keep_before=True)
        kept.put(b"k", b"1")
        kept.put(b"k", b"2")
        for target in (db.address, None):
            if target is None:
                db.close()
                target = str(tmp_path / "s")
            asked = ("changes", target, "--from", "oldest", "--no-wait", "--json")
            told = [json.loads(line) for line in run_here(capfdbinary, *asked, "--before").text.splitlines()]
            assert [(t.get("before"), t.get("created")) for t in told] == [(None, True), ("1", False)]
            plain = [json.loads(line) for line in run_here(capfdbinary, *asked).text.splitlines()]
            assert [(t.get("before"), t.get("created")) for t in plain] == [(None, None), (None, None)]


def test_a_request_that_is_not_understood(tmp_path: Path) -> None:
    """A node refuses a request for changes with something that it does not know, by its name."""
    with kvrep.open(tmp_path / "s") as db, pytest.raises(kvrep.ProtocolError, match="colour"):
        db._node.calls["feed-read"]({"token": "oldest", "timeout_s": 0, "colour": "red"})


def test_what_makes_no_sense(tmp_path: Path, capfdbinary: Any) -> None:
    """Wrong usage ends with 2, a place that is not there with what it is."""
    with kvrep.open(tmp_path / "s") as db:
        fill(db)
    target = str(tmp_path / "s")
    for bad in (
        ("changes", target, "--snapshot", "--from", "now"),
        ("changes", target, "--from", "nonsense"),
        ("changes", target, "--from", "1:x"),
        ("changes", tmp_path / "nowhere"),
        ("feed", "show", target),
        ("feed", "list", target, "name"),
        ("feed", "seek", target, "f"),
        ("feed", "pause", target, "f", "--to", "now"),
        ("feed", "fly", target),
    ):
        assert run_here(capfdbinary, *bad).code in (Exit.USAGE, Exit.FAILED), bad
    gone = run_here(capfdbinary, "changes", target, "--from", "1:1")
    assert (gone.code, "not part of this history" in gone.err) == (Exit.REFUSED, True)
    assert run_here(capfdbinary, "changes", "127.0.0.1:1", "--timeout", "0.3").code == Exit.UNAVAILABLE


def test_feeds_of_running_nodes(tmp_path: Path, capfdbinary: Any) -> None:
    """List and show on any node; pause, resume, seek and drop, sent on to the primary by a follower."""
    with pair(tmp_path, **FAST) as (a, b):
        feed = a.feed("billing", keyspace="default")
        last = fill(a)
        assert len(feed.poll()) == 3
        feed.ack()
        b.wait_for(a.position)
        for node in (a, b):
            (listed,) = run_here(capfdbinary, "feed", "list", node.address, "--json").json
            assert (listed["name"], listed["position"], listed["paused"]) == ("billing", str(last), False)
        shown = run_here(capfdbinary, "feed", "show", b.address, "billing")
        assert (shown.code, "ready" in shown.text, feed.token in shown.text) == (Exit.OK, True, True)
        assert run_here(capfdbinary, "feed", "pause", b.address, "billing").code == Exit.OK
        assert feed.info().paused
        assert run_here(capfdbinary, "feed", "resume", a.address, "billing").code == Exit.OK
        sought = run_here(capfdbinary, "feed", "seek", b.address, "billing", "--to", "oldest", "--json").json
        assert (sought["position"], sought["paused"]) == ("0:0", False)
        assert len(feed.poll()) == 3
        missing = run_here(capfdbinary, "feed", "pause", b.address, "nobody")
        assert (missing.code, "no feed" in missing.err) == (Exit.MISSING, True)
        assert run_here(capfdbinary, "feed", "show", b.address, "nobody").code == Exit.MISSING
        assert run_here(capfdbinary, "feed", "drop", b.address, "billing").code == Exit.OK
        assert a.feeds() == []


def test_feeds_of_a_store_on_disk(tmp_path: Path, capfdbinary: Any) -> None:
    """The same for a store that nobody has open."""
    with kvrep.open(tmp_path / "s") as db:
        db.feed("f").close()
        fill(db)
    target = str(tmp_path / "s")
    assert run_here(capfdbinary, "feed", "list", target, "--json").json[0]["lag_records"] > 0
    assert run_here(capfdbinary, "feed", "seek", target, "f", "--to", "now").code == Exit.OK
    assert run_here(capfdbinary, "feed", "show", target, "f", "--json").json["position"] != "0:0"
    assert run_here(capfdbinary, "feed", "drop", target, "f").code == Exit.OK
    assert run_here(capfdbinary, "feed", "list", target, "--json").json == []


@pytest.mark.parametrize("end", ["limit", "ctrl-c", "closed"])
def test_watching_a_running_node(tmp_path: Path, end: str) -> None:
    """Changes appear as they are written, on a follower, too; Ctrl-C and a node that goes end it with the token
    to go on with."""
    with pair(tmp_path, **FAST) as (a, b):
        arguments = ["--limit", "3"] if end == "limit" else []
        process = subprocess.Popen(
            command("changes", b.address, "--timeout", "2", *arguments),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            number, lines = 0, 0
            while not lines:  # it begins with what is written after its first question
                a.put(b"k%d" % number, b"v")
                number += 1
                if select.select([process.stdout], [], [], 0.2)[0]:
                    assert process.stdout.readline().split(b"\t")[1] == b"put"
                    lines += 1
            if end == "limit":
                a.put(b"x", b"v")
                a.put(b"x", b"v")
            elif end == "ctrl-c":
                process.send_signal(signal.SIGINT)
            else:
                b.close()
            _, errors = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
            process.wait()
        wanted = {"limit": Exit.OK, "ctrl-c": Exit.INTERRUPTED, "closed": Exit.UNAVAILABLE}[end]
        assert process.returncode == wanted, errors
        assert (b"--from k1" in errors) == (end != "limit")


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """A closed pipe ends the command quietly."""
    with kvrep.open(tmp_path / "s") as db:
        for _ in range(50):
            with db.batch() as batch:
                for i in range(1000):
                    batch.put(b"%d" % i, bytes(100))
    line = f"{sys.executable} -m kvrep changes {tmp_path}/s | head -n 2"
    done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=WAIT_S, check=False)
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == b""
    wait_until(lambda: not list((tmp_path / "s").glob("*.tmp")), "nothing is left")
