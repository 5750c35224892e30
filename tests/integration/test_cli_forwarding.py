"""The kvrep command and forwarded writes, linearizable reads, and a rule that goes on with fewer copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kvrep
from kvrep.cli.exits import Exit
from tests.cli_kit import Served, pair, run_here, wait_until


def test_linearizable_reads(memory_path: Path, capfdbinary: Any) -> None:
    """get and scan show what was just written elsewhere, on any node; of a path, or with acks=0, they refuse."""
    with pair(memory_path) as (a, b):
        for i in range(10):
            a.put(b"k", b"%d" % i)
            assert run_here(capfdbinary, "get", b.address, "k", "--linearizable").out == b"%d" % i
            assert run_here(capfdbinary, "scan", b.address, "--linearizable").text == f"k\t{i}\n"
        assert run_here(capfdbinary, "get", a.address, "k", "--linearizable").out == b"9"
        a.close()
        late = run_here(capfdbinary, "get", b.address, "k", "--linearizable", "--timeout-s", "0.5")
        assert late.code not in (0, Exit.MISSING)
        assert late.out == b""
    wrong = run_here(capfdbinary, "get", memory_path / "a", "k", "--linearizable")
    assert wrong.code == Exit.USAGE
    with pair(memory_path / "async", acks=0) as (_, b):
        refused = run_here(capfdbinary, "scan", b.address, "--linearizable")
        assert "acks=0" in refused.err


def test_a_served_follower_forwards(memory_path: Path, capfdbinary: Any) -> None:
    """serve --forward-writes: put at the follower is done at the primary, and readable there at once."""
    with (
        kvrep.open(memory_path / "a", name="a", listen="127.0.0.1:0", acks=1) as a,
        Served(memory_path / "b", "--name", "b", "--follow", a.address, "--forward-writes") as b,
    ):
        wait_until(lambda: not a.status().not_writable, "a takes writes")
        done = run_here(capfdbinary, "put", b.address, "k", "v", "--no-follow-primary")
        assert (done.code, done.err) == (0, "")
        assert run_here(capfdbinary, "get", b.address, "k").out == b"v"
        assert a[b"k"] == b"v"
        assert b.end()[0] == 0


def test_a_write_goes_on_to_the_newest_primary(memory_path: Path, capfdbinary: Any) -> None:
    """A follower that still names the old primary is not the end: the old one knows the new one."""
    with pair(memory_path) as (a, b):
        position = a.put(b"k", b"v")
        b.wait_for(position)
        a.switchover("b")
        with kvrep.open(
            memory_path / "c", name="c", listen="127.0.0.1:0", follow=b.address, voter=False
        ) as c:

            def refuse() -> None:
                raise kvrep.NotPrimary("this node is a follower", primary_address=a.address, epoch=None)

            c._node.engine.writable = refuse
            written = run_here(capfdbinary, "put", c.address, "k", "w")
            assert written.code == 0, written.err
            assert written.err.count("writing to the primary") == 2
            assert b[b"k"] == b"w"


def test_the_status_tells_of_missing_copies(memory_path: Path, capfdbinary: Any) -> None:
    """While b is away and afterwards: which records were acknowledged with fewer copies, and who counts."""
    options: dict[str, Any] = {
        "degrade_after_s": 0.2,
        "heartbeat_interval_s": 0.1,
        "heartbeat_timeout_s": 1.0,
    }
    with (
        kvrep.open(memory_path / "a", name="a", listen="127.0.0.1:0", acks="all", **options) as a,
        kvrep.open(memory_path / "b", name="b", listen="127.0.0.1:0", follow=a.address) as b,
    ):
        c = kvrep.open(memory_path / "c", name="c", listen="127.0.0.1:0", follow=a.address)
        try:
            wait_until(lambda: len(b.status().voters) == 3 and not a.status().not_writable, "three voters")
            assert "protection" not in run_here(capfdbinary, "status", a.address).text
        finally:
            c.close()
        wait_until(lambda: a.status().away == ("c",), "the rule to go on without c")
        shown = run_here(capfdbinary, "status", a.address).text
        assert "WITHOUT COPIES AT c" in shown
        assert "to now" in shown
        assert "no answer, not counted" in run_here(capfdbinary, "members", a.address).text
        again = kvrep.open(memory_path / "c", name="c", listen="127.0.0.1:0", follow=a.address)
        try:
            wait_until(lambda: not a.status().away, "c to count again", 20.0)
        finally:
            again.close()
        shown = run_here(capfdbinary, "status", a.address).text
        assert "acknowledged with fewer copies: records" in shown
        assert "WITHOUT" not in shown
