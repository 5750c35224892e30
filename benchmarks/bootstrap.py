"""How fast a follower gets a whole copy, against the bare parts that it is made of.

Run as ``python -m benchmarks.bootstrap [--mib 1024] [--value-bytes 1000] [--rounds 3] [--directory DIR]``.

The reference is what one would do by hand: LMDB's compacting copy into a file, then that file over a bare
gRPC stream of 1 MiB messages into another process, which writes and fsyncs it. kvrep does the same and
checks, spools, resumes, and makes the copy live; from the follower's ``open()`` until it streams. Both are
measured turn about in one run, each side in a process of its own. The goal is a ratio of at least 0.6.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import lmdb

import kvrep

CHUNK = 1 << 20
WAIT_S = 600.0
OPTIONS: dict[str, Any] = {"log_file_bytes": 4 << 20, "retention_bytes": 4 << 20}


def fill(path: Path, mib: int, value_bytes: int) -> None:
    """A store of about ``mib`` MiB of random pairs."""
    source = random.Random(1)
    with kvrep.open(path, name="a", durability="os", **OPTIONS) as db:
        left = mib << 20
        while left > 0:
            with db.batch() as batch:
                for _ in range(1000):
                    batch.put(b"%016x" % source.getrandbits(64), source.randbytes(value_bytes))
            left -= 1000 * (value_bytes + 16)
            if left // (1000 * (value_bytes + 16)) % 64 == 0:
                db.flush(WAIT_S)
        db.flush(WAIT_S)


# -- the reference ---------------------------------------------------------------------------------


def serve_bare(store: Path, spool: Path) -> None:
    """A process: copy with LMDB, stream the file."""

    def stream(request: bytes, context: Any) -> Iterator[bytes]:
        del request, context
        env = lmdb.open(str(next(store.glob("gen-*")) / "data"), readonly=True, lock=False, max_dbs=200)
        with open(spool, "wb") as file:
            env.copyfd(file.fileno(), compact=True)
        env.close()
        with open(spool, "rb") as file:
            while data := file.read(CHUNK):
                yield data

    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_send_message_length", -1)])
    handler = grpc.unary_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Get": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    server.stop(None).wait()


def fetch_bare(address: str, target: Path) -> float:
    """Seconds from the request to the fsynced file."""
    began = time.perf_counter()
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        with open(target, "wb", buffering=0) as file:
            for data in channel.unary_stream("/bare/Get")(b""):
                file.write(data)
            os.fsync(file.fileno())
    return time.perf_counter() - began


# -- kvrep -----------------------------------------------------------------------------------------


def serve_kvrep(store: Path) -> None:
    """A process: the primary."""
    with kvrep.open(store, listen="127.0.0.1:0", heartbeat_interval_s=0.2, **OPTIONS) as db:
        print(db.address, flush=True)
        sys.stdin.read()


def fetch_kvrep(address: str, target: Path) -> tuple[float, int]:
    """Seconds from ``open()`` until the follower streams, and the size of its copy."""
    began = time.perf_counter()
    with kvrep.open(target, name="b", voter=False, follow=address, **OPTIONS) as db:
        pause = threading.Event()
        while not ((source := db.status().source) and source.connected):
            if time.perf_counter() - began > WAIT_S:
                raise TimeoutError(f"no bootstrap within {WAIT_S} s: {source}")
            pause.wait(0.005)
        return time.perf_counter() - began, source.bootstrap_bytes_total


# -- the run ---------------------------------------------------------------------------------------


def other(role: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bootstrap", "--role", role, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def measured(role: str, store: Path, scratch: Path) -> dict[str, Any]:
    """One transfer by fresh processes."""
    os.sync()
    server = other(f"serve-{role}", store, scratch / "spool")
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        address = server.stdout.readline().strip()
        client = other(f"fetch-{role}", address, scratch / "target")
        assert client.stdin is not None
        answer, _ = client.communicate(timeout=WAIT_S)
        result: dict[str, Any] = json.loads(answer)
        return result
    finally:
        server.stdin.close()
        server.wait(WAIT_S)
        server.stdout.close()
        shutil.rmtree(scratch / "target", ignore_errors=True)
        for left in ("target", "spool"):
            (scratch / left).unlink(missing_ok=True)


def run(mib: int, value_bytes: int, rounds: int, directory: str | None) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        store = Path(scratch, "store")
        fill(store, mib, value_bytes)
        taken: dict[str, list[float]] = {"bare": [], "kvrep": []}
        size = 0
        for number in range(rounds):
            for role in ("bare", "kvrep") if number % 2 == 0 else ("kvrep", "bare"):
                result = measured(role, store, Path(scratch))
                size = result.get("bytes", size)
                print(f"  {role:6} {result['seconds']:.2f} s", flush=True)
                taken[role].append(result["seconds"])
        bare, ours = median(taken["bare"]), median(taken["kvrep"])
        print(f"copy of {size >> 20} MiB, medians: bare {bare:.2f} s, kvrep {ours:.2f} s,"
              f" ratio {bare / ours:.2f} (goal 0.6)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--value-bytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    match arguments.role:
        case None:
            run(arguments.mib, arguments.value_bytes, arguments.rounds, arguments.directory)
        case ["serve-bare", store, spool]:
            serve_bare(Path(store), Path(spool))
        case ["serve-kvrep", store, _]:
            serve_kvrep(Path(store))
        case ["fetch-bare", address, target]:
            print(json.dumps({"seconds": fetch_bare(address, Path(target))}))
        case ["fetch-kvrep", address, target]:
            seconds, size = fetch_kvrep(address, Path(target))
            print(json.dumps({"seconds": seconds, "bytes": size}))


if __name__ == "__main__":
    main()
