"""The kvrep command against running nodes."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.cli.exits import Exit
from tests.cli_kit import Result, Served, pair, run_here, wait_until

Kvrep = Callable[..., Result]
NOBODY = "127.0.0.1:1"
"""An address where nothing listens."""


@pytest.fixture
def run(capfdbinary: Any) -> Kvrep:
    """Run the command in this process."""
    return lambda *arguments: run_here(capfdbinary, *arguments)


@pytest.fixture
def nodes(memory_path: Path) -> Iterator[tuple[kvrep.Store, kvrep.Store]]:
    """A primary whose writes wait for its follower, and that follower."""
    with pair(memory_path) as both:
        yield both


# -- reading and writing ---------------------------------------------------------------------------


def test_read_your_writes_on_the_follower(run: Kvrep, nodes: tuple[kvrep.Store, kvrep.Store]) -> None:
    """The position that put prints makes get and scan on a follower wait for that write."""
    a, b = nodes
    for i in range(20):
        position = run("put", a.address, "k", i).text.strip()
        assert run("get", b.address, "k", "--at-least", position).out == b"%d" % i
    position = run("delete", a.address, "k").text.strip()
    assert run("scan", b.address, "--at-least", position).text == ""
    assert run("get", b.address, "k").code == Exit.MISSING


def test_a_write_finds_the_primary(run: Kvrep, nodes: tuple[kvrep.Store, kvrep.Store]) -> None:
    """Given a follower's address, put and delete write to the primary and say so; unless told not to."""
    a, b = nodes
    written = run("put", b.address, "k", "v")
    assert written.code == 0
    assert f"writing to the primary at {a.address}" in written.err
    assert a.get(b"k") == b"v"
    refused = run("delete", b.address, "k", "--no-follow-primary")
    assert refused.code == Exit.REFUSED
    assert a.address in refused.err
    assert a.get(b"k") == b"v"
    assert run("delete", b.address, "k").code == 0
    assert a.get(b"k") is None


def test_scan_is_that_of_the_store(run: Kvrep, nodes: tuple[kvrep.Store, kvrep.Store]) -> None:
    """Over the network every way to scan gives what Store.scan gives."""
    a, _ = nodes
    chance = random.Random(4)
    with a.batch() as batch:
        for _ in range(300):
            batch.put(b"k%03d" % chance.randrange(500), chance.randbytes(20))
    for _ in range(25):
        start, stop = sorted(b"k%03d" % chance.randrange(500) for _ in range(2))
        wanted: dict[str, Any] = {
            "prefix": chance.choice([b"", b"k", b"k1", b"k49", b"x"]),
            "start": chance.choice([None, start]),
            "stop": chance.choice([None, stop]),
            "limit": chance.choice([None, 0, 1, 7]),
            "reverse": chance.random() < 0.5,
        }
        flags: list[object] = ["--reverse"] if wanted["reverse"] else []
        for name in ("prefix", "start", "stop", "limit"):
            value = wanted[name]
            if value is not None:
                flags += [f"--{name}", value.hex() if isinstance(value, bytes) else value]
        expected = [f"{key.hex()}\t{value.hex()}" for key, value in a.scan(**wanted)]
        assert run("scan", a.address, "--hex", *flags).text.splitlines() == expected


def test_load_through_a_follower_and_dump_from_it(
    run: Kvrep, nodes: tuple[kvrep.Store, kvrep.Store], tmp_path: Path
) -> None:
    """A load finds the primary by itself; a dump of the follower has every pair, large ones included."""
    a, b = nodes
    chance = random.Random(5)
    expected = {b"k%d" % i: chance.randbytes(chance.choice([0, 10, 3000])) for i in range(400)}
    expected[b"large"] = chance.randbytes(9 << 20)  # above the transport's default limit of a message
    source = tmp_path / "source"
    source.mkdir()
    for key, value in expected.items():
        (source / key.decode()).write_bytes(value)
    loaded = run("load", b.address, source, "--keyspace", "files", "--batch-pairs", "20")
    assert loaded.code == 0
    assert a.address in loaded.err
    b.wait_for(a.position)
    assert run("dump", b.address, tmp_path / "out.jsonl.gz", "--keyspace", "files").code == 0
    assert run("load", tmp_path / "copy", tmp_path / "out.jsonl.gz", "--create").code == 0
    with kvrep.open(tmp_path / "copy") as copy:
        assert dict(copy.scan()) == expected


def test_dump_of_all_keyspaces(run: Kvrep, nodes: tuple[kvrep.Store, kvrep.Store]) -> None:
    """--all asks the node which keyspaces it has."""
    a, _ = nodes
    a.put(b"k", b"1")
    a.keyspace("other").put(b"k", b"2")
    lines = [json.loads(line) for line in run("dump", a.address, "--all").text.splitlines()]
    assert lines == [
        {"keyspace": "default", "key": "k", "value": "1"},
        {"keyspace": "other", "key": "k", "value": "2"},
    ]


# -- the three outcomes ----------------------------------------------------------------------------


def test_nobody_there(run: Kvrep, tmp_path: Path) -> None:
    """Where nothing listens every command is unavailable, in one line; a write is not called unknown."""
    (tmp_path / "lines").write_text('{"key": "k", "value": "v"}\n')
    for arguments in (
        ("get", NOBODY, "k"), ("put", NOBODY, "k", "v"), ("delete", NOBODY, "k"), ("scan", NOBODY),
        ("status", NOBODY), ("dump", NOBODY), ("load", NOBODY, tmp_path / "lines"),
    ):  # fmt: skip
        result = run(*arguments, "--timeout", "2")
        assert result.code == Exit.UNAVAILABLE, arguments
        assert len(result.err.splitlines()) == 1
        assert NOBODY in result.err
    assert run("get", "127.0.0.1:99999", "k").code == Exit.USAGE


def test_refused_without_followers(run: Kvrep, memory_path: Path) -> None:
    """A write that the ack rule refuses ends with 3, and status says why."""
    with pair(memory_path) as (a, b):
        b.close()
        wait_until(lambda: bool(a.status().not_writable), "the follower is gone")
        refused = run("put", a.address, "k", "v")
        assert refused.code == Exit.REFUSED
        assert a.get(b"k") is None
        text = run("status", a.address).text
        assert "no: " in text
        assert "gone" in text


def test_unknown_outcome(run: Kvrep, memory_path: Path) -> None:
    """A write that gets no ack in time ends with 4; it is there once the follower is."""
    with kvrep.open(memory_path / "a", name="a", listen="127.0.0.1:0", acks=1) as a:
        with Served(memory_path / "b", "--name", "b", "--follow", a.address) as b:
            wait_until(
                lambda: a.status().voters == ("a", "b") and not a.status().not_writable, "b is a voter"
            )
            os.kill(b.process.pid, signal.SIGSTOP)
            unknown = run("put", a.address, "k", "v", "--timeout", "0.5")
            assert unknown.code == Exit.UNKNOWN
            assert "1 of 2 copies" in unknown.err
            assert a.get(b"k") is None
            os.kill(b.process.pid, signal.SIGCONT)
            wait_until(lambda: a.get(b"k") == b"v", "the write is committed after all")


def test_a_bounded_primary(run: Kvrep, memory_path: Path) -> None:
    """serve --lag-records-max: shown in status, held by put, and left behind by promote --force."""
    with Served(memory_path / "a", "--name", "a", "--acks", "0", "--lag-records-max", "2") as a:

        def followers() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = run("status", a.address, "--json").json["followers"]
            return found

        with kvrep.open(memory_path / "b", name="b", listen="127.0.0.1:0", follow=a.address) as b:
            wait_until(lambda: len(b.status().voters) == 2, "b is a voter")
            b.wait_for(kvrep.Position.parse(run("put", a.address, "k", "v").text.strip()))
            wait_until(lambda: [f["lag_records"] for f in followers()] == [0], "b holds all")
        wait_until(lambda: not any(f["connected"] for f in followers()), "b is gone")
        status = run("status", a.address)
        assert (
            "acks=0: 1 copies within 5 s, 2 records ahead of the furthest other voter at the most"
            in status.text
        )
        assert run("status", a.address, "--json").json["lag_records_max"] == 2
        assert [run("put", a.address, "k", f"{i}").code for i in range(3)] == [0, 0, Exit.REFUSED]
        refused = run("put", a.address, "k", "v")
        assert "none is connected" in refused.err
        assert "promote(force=True)" in refused.err
        assert "lag_records_max is 2" in run("status", a.address).text
        assert run("promote", a.address, "--force").code == 0
        assert run("put", a.address, "k", "v").code == 0


def test_stale_and_unknown_positions(run: Kvrep, nodes: tuple[kvrep.Store, kvrep.Store]) -> None:
    """A position that does not come in time, or is of no known history, is unavailable."""
    a, b = nodes
    epoch, offset = a.put(b"k", b"v")
    for node in (a, b):
        late = run("get", node.address, "k", "--at-least", f"{epoch}:{offset + 5}", "--timeout", "0.3")
        assert late.code == Exit.UNAVAILABLE
        b.wait_for(a.position)
        other = run("get", node.address, "k", "--at-least", f"{epoch + 1000}:{offset}", "--timeout", "0.3")
        assert other.code == Exit.UNAVAILABLE


def test_load_goes_on_after_a_restart(run: Kvrep, memory_path: Path, tmp_path: Path) -> None:
    """While the node restarts a load tries again, and ends with every pair there."""
    lines = [json.dumps({"key": f"k{i:05}", "value": "x" * 200}) for i in range(20_000)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    db = kvrep.open(memory_path / "store", listen="127.0.0.1:0")
    address = db.address
    results: list[Result] = []

    def load() -> None:
        results.append(run("load", address, tmp_path / "lines.jsonl", "--batch-pairs", "50"))

    loading = threading.Thread(target=load)
    loading.start()
    try:
        wait_until(lambda: len(db) > 1000, "the load has begun")
        db.close()
        db = kvrep.open(memory_path / "store", listen=address)
        loading.join(60)
        assert not loading.is_alive()
        assert results[0].code == 0
        assert results[0].text.startswith("loaded 20 000 pairs")
        assert len(db) == 20_000
    finally:
        loading.join()
        db.close()


def test_load_gives_up(run: Kvrep, memory_path: Path, tmp_path: Path) -> None:
    """A load ends with the reason when a node refuses for longer than --retry-s."""
    (tmp_path / "lines").write_text('{"key": "k", "value": "v"}\n')
    with pair(memory_path) as (a, b):
        b.close()
        wait_until(lambda: bool(a.status().not_writable), "the follower is gone")
        result = run("load", a.address, tmp_path / "lines", "--retry-s", "0.5")
        assert result.code == Exit.REFUSED
        assert "copies" in result.err
        bad = run("load", a.address, tmp_path / "lines", "--keyspace", "NOT ALLOWED")
        assert bad.code == Exit.REFUSED


# -- status ----------------------------------------------------------------------------------------


def test_status_of_running_nodes(run: Kvrep, nodes: tuple[kvrep.Store, kvrep.Store]) -> None:
    """Status shows both ends; its JSON has every field of Status."""
    a, b = nodes
    a.put(b"k", b"v")
    primary, follower = run("status", a.address, "--json").json, run("status", b.address, "--json").json
    for status in (primary, follower):
        assert status.keys() == {f.name for f in fields(kvrep.Status)}
    assert (primary["role"], follower["role"]) == ("primary", "follower")
    assert [f["name"] for f in primary["followers"]] == ["b"]
    assert follower["source"]["address"] == a.address
    text = run("status", a.address).text
    for words in ("a: primary", "acks=1: 2 copies", "streaming", b.address, "writable     yes"):
        assert words in text
    text = run("status", b.address).text
    for words in ("b: follower", "source", a.address, "not yet compared", "this node is a follower"):
        assert words in text


def test_verified_digests_are_shown(run: Kvrep, nodes: tuple[kvrep.Store, kvrep.Store]) -> None:
    """Once digests were compared, status says through which record."""
    a, b = nodes
    for i in range(3):
        a.put(b"k%d" % i, b"v")
        a.flush()
        b.wait_for(a.position)
        b.flush()
    wait_until(lambda: b.status().verified_through > 0, "the digests are compared")
    assert "verified through record" in run("status", b.address).text


# -- who may ask -----------------------------------------------------------------------------------


def test_token(run: Kvrep, memory_path: Path) -> None:
    """Without the token, or with another one, a node refuses with 3; with it all works, serve included."""
    right, wrong, empty = (memory_path / name for name in ("right", "wrong", "empty"))
    right.write_text("secret\n")
    wrong.write_text("guess\n")
    empty.write_text("\n")
    with Served(memory_path / "store", "--token-file", right) as served:
        assert run("put", served.address, "k", "v", "--token-file", right).code == 0
        assert run("get", served.address, "k", "--token-file", right).out == b"v"
        for flags in ((), ("--token-file", wrong)):
            refused = run("get", served.address, "k", *flags)
            assert refused.code == Exit.REFUSED
            assert "token" in refused.err
        assert run("get", served.address, "k", "--token-file", empty).code == Exit.USAGE
        assert run("get", served.address, "k", "--token-file", memory_path / "none").code == Exit.USAGE
        assert run("status", served.address, "--watch", "1").code == Exit.REFUSED


def test_tls_files_that_are_wrong(run: Kvrep, tmp_path: Path) -> None:
    """TLS files that do not exist, or half a pair of them, are wrong usage."""
    (tmp_path / "cert.pem").write_text("x")
    assert run("get", NOBODY, "k", "--tls-ca", tmp_path / "none.pem").code == Exit.USAGE
    half = run("get", NOBODY, "k", "--tls-cert", tmp_path / "cert.pem")
    assert half.code == Exit.USAGE
    assert "--tls-key" in half.err
