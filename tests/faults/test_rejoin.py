"""The way back of a killed asynchronous primary: what moves is the divergence, not the store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.storage.rescue import load_rescue
from kvrep.testing.proxy import Proxy
from tests.replication_kit import processes, same, until

VALUE = bytes(range(256)) * 40
BATCH = 500
DIVERGENT = 100
FAST: dict[str, Any] = {
    "heartbeat_interval_s": 0.2,
    "heartbeat_timeout_s": 2.0,
    "reconnect_backoff_max_s": 0.2,
    "flush_interval_s": 1.0,
}


@pytest.fixture
def counted() -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy


@pytest.mark.parametrize(
    "megabytes",
    [40, pytest.param(5120, marks=[pytest.mark.prove, pytest.mark.timeout(1800)])],
)
def test_rejoin_moves_the_divergence_only(tmp_path: Path, counted: Proxy, megabytes: int) -> None:
    """acks=0, kill -9 of the primary with 100 records that nobody else has: they go to a rescue file, the log
    is cut, less than 5 MB pass, and nothing is copied, however large the store is."""
    rejoin(tmp_path, counted, megabytes)


def rejoin(folder: Path, counted: Proxy, megabytes: int) -> dict[str, float]:
    front = counted.link(name="b")
    with processes() as start:
        p = start(folder / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST).ready(60.0)
        p.run(f"value, size = {VALUE!r}, {megabytes} << 20")
        p.run(
            "for i in range(0, size // len(value), 500):\n"
            "    with db.batch() as batch:\n"
            "        for j in range(500): batch.put(b'%010d' % (i + j), value)\n",
            1200.0,
        )
        p.run("db.flush(600.0)", 600.0)
        b = kvrep.open(folder / "b", name="b", listen="127.0.0.1:0", advertise=front.address,
                       follow=p.address, **FAST)  # fmt: skip
        front.target = b._node._server.address  # type: ignore[union-attr]
        until(lambda: b.status().source.state == "streaming" and len(b.status().voters) == 2, 600.0)
        until(lambda: p.run("not [f for f in db.status().followers if f.lag_records]"), 600.0)
        b.flush(600.0)
        b.close()
        p.run(f"[db.put(b'alone-%d' % i, value) for i in range({DIVERGENT})]")
        # A flush was due, and what nobody has confirmed stayed out of it.
        until(lambda: p.run("db._node.engine.flusher._held_back()"))
        p.kill()
        b = kvrep.open(folder / "b", listen="127.0.0.1:0", advertise=front.address, follow=p.address, **FAST)
        front.target = b._node._server.address  # type: ignore[union-attr]
        with b:
            b.promote(force=True, timeout_s=10.0)
            b.put(b"new", b"history")
            before = front.bytes_up + front.bytes_down
            began = time.monotonic()
            with kvrep.open(folder / "a", listen=p.address, **FAST) as a:
                opened = time.monotonic()
                a.wait_for(b.position, 120.0)
                took = time.monotonic() - opened
                moved = front.bytes_up + front.bytes_down - before
                status = a.status()
                assert status.source is not None
                assert status.source.bootstrap_bytes == 0
                (path,) = status.rescued
                saved = load_rescue(Path(path))
                assert sum(len(r.ops()) for r in saved.records) == DIVERGENT
                assert a.get(b"alone-0") is None
                assert a[b"new"] == b"history"
                assert moved < 5_000_000, f"{moved} bytes moved"
                if megabytes < 100:
                    same(b, a)
                return {"moved": moved, "open_s": opened - began, "rejoin_s": took,
                        "store": float(status.lmdb_bytes)}  # fmt: skip
