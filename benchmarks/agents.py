"""Figures 31 to 33: agents into a real PostgreSQL, against psycopg alone. 34 and 35: into a warehouse.

The first are there where PostgreSQL is installed. Its disk writes are the same on both sides. The others are there
with pyarrow and deltalake.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count as numbers
from pathlib import Path
from typing import Any

import kvrep
from benchmarks.measure import Bench, Bound, Outcome, figure
from benchmarks.peer import peak_mb
from benchmarks.stores import LARGE_VALUE, VALUE, key, keys, put_singly

try:
    import psycopg

    from tests.postgres_kit import BINARIES, PostgresServer
except ImportError:
    AVAILABLE = False
else:
    AVAILABLE = BINARIES is not None

try:
    import pyarrow as pa
    from deltalake import write_deltalake

    from kvrep.sinks.warehouse import WarehouseSink
except (ImportError, kvrep.OpenError):
    WAREHOUSE = False
else:
    WAREHOUSE = True

__all__ = ["AVAILABLE"]

BATCH, BATCH_BYTES = 1000, 4 << 20
LARGE_BATCH = 10_000
"""Changes in a commit of a warehouse."""
MEMORY_MB = 200
TABLE = "CREATE TABLE bare.t (key bytea PRIMARY KEY, value bytea)"
UPSERT = "INSERT INTO bare.t VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value"


@contextmanager
def _server(bench: Bench) -> Iterator[PostgresServer]:
    with bench.path("postgres") as wanted, tempfile.TemporaryDirectory(prefix="kvrep-bench-") as instead:
        bench.folder.chmod(0o755)
        # The server runs as a user of its own, who must be able to come to its folder.
        reachable = all(parent.stat().st_mode & 0o001 for parent in wanted.parents)
        folder = wanted if reachable else Path(instead)
        folder.chmod(0o755)
        server = PostgresServer(folder, fsync=True)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def _bare(server: PostgresServer) -> Iterator[psycopg.Connection[Any]]:
    """A connection, and a new table ``bare.t`` like the agent's."""
    with psycopg.connect(server.url().partition("?")[0]) as connection:
        connection.execute("DROP SCHEMA IF EXISTS bare CASCADE")
        connection.execute("CREATE SCHEMA bare")
        connection.execute(TABLE)
        connection.commit()
        yield connection


def _drop(server: PostgresServer, schema: str) -> None:
    with psycopg.connect(server.url().partition("?")[0], autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE".encode())
        connection.execute("CHECKPOINT")


def _agent(db: kvrep.Store, url: str) -> kvrep.Agent:
    from kvrep.sinks.feed import FeedSource
    from kvrep.sinks.postgres import PostgresSink
    from kvrep.sinks.upstream import Local

    return kvrep.Agent(FeedSource(Local(db)), PostgresSink(url), batch_changes=BATCH)


def upserts(bench: Bench) -> Outcome:
    """Changes that wait in the log, applied in batches, against the same rows from a list."""
    count = bench.size(100_000, 2000)
    drawn = keys(bench.chance(31), count, count // 2)
    with _server(bench) as server, bench.path("store") as path, kvrep.open(path) as db:

        def agent() -> float:
            _drop(server, "agent")
            with _agent(db, server.url("agent")) as first:
                first.wait_for(db.put(b"begin", b""), 600)
            futures = [db.submit_put(k, VALUE) for k in drawn]
            last = futures[-1].result(60)
            began = time.perf_counter()
            with _agent(db, server.url("agent")) as second:
                second.wait_for(last, 600)
                return count / (time.perf_counter() - began)

        def bare() -> float:
            with _bare(server) as connection:
                began = time.perf_counter()
                for start in range(0, count, BATCH):
                    with connection.cursor() as cursor:
                        cursor.executemany(UPSERT, [(k, VALUE) for k in drawn[start : start + BATCH]])
                    connection.commit()
                return count / (time.perf_counter() - began)

        return bench.alternate(agent, bare, pairs=min(3, bench.pairs))


def snapshot(bench: Bench) -> Outcome:
    """All rows of a store, against COPY of the same rows from a list, in the binary format that the agent uses."""
    count = bench.size(300_000, 2000)
    with _server(bench) as server, bench.path("store") as path, kvrep.open(path) as db:
        rows = [(key(number), VALUE) for number in range(count)]
        for start in range(0, count, BATCH):
            with db.batch() as batch:
                for row in rows[start : start + BATCH]:
                    batch.put(*row)
        db.flush()

        def agent() -> float:
            _drop(server, "agent")
            began = time.perf_counter()
            with _agent(db, server.url("agent")) as one:
                one.wait_for(db.position, 600)
                return count / (time.perf_counter() - began)

        def bare() -> float:
            with _bare(server) as connection:
                began = time.perf_counter()
                with connection.cursor() as cursor:
                    with cursor.copy("COPY bare.t (key, value) FROM STDIN (FORMAT BINARY)") as copy:
                        copy.set_types(("bytea", "bytea"))
                        for row in rows:
                            copy.write_row(row)
                connection.commit()
                return count / (time.perf_counter() - began)

        return bench.alternate(agent, bare, pairs=min(3, bench.pairs))


def memory(bench: Bench) -> Outcome:
    """The agent process while it works off a snapshot and a backlog, of small values and of large ones."""
    with _server(bench) as server:
        names = numbers(1)
        return _memory(bench, bench.size(300_000, 2000), lambda: server.url(f"agent{next(names)}"))


def _memory(bench: Bench, rows: int, secondary: Callable[[], str]) -> Outcome:
    outcome = Outcome("MB")
    for count, value, kind in (
        (rows, VALUE, "agent process"),
        (bench.size(3000, 30), LARGE_VALUE, "same with values of 100 KB"),
    ):
        peak = _peak_of_agent(bench, count, value, secondary())
        outcome.bounds.append(Bound(f"memory of the {kind}", peak, MEMORY_MB, "MB"))
        outcome.notes.append(f"{count:,} rows and {count // 3:,} changes of {len(value):,} bytes")
    return outcome


def _peak_of_agent(bench: Bench, count: int, value: bytes, secondary: str) -> float:
    """The largest resident set of the command, in MB, until it has all rows and what is written meanwhile."""
    batch_rows = min(BATCH, max(1, BATCH_BYTES // len(value)))
    with bench.path("store") as path, kvrep.open(path, name="a", listen="127.0.0.1:0") as db:
        for start in range(0, count, batch_rows):
            with db.batch(timeout_s=60) as batch:
                for number in range(start, min(count, start + batch_rows)):
                    batch.put(key(number), value)
        writer = threading.Thread(target=put_singly, args=(db, count // 3, value))
        writer.start()
        try:
            return peak_mb(
                "VmHWM", "agent", "--from", db.address, "--to", secondary, "--until-current", "--log-level", "error"
            )  # fmt: skip
        finally:
            writer.join()


def _warehouse_agent(db: kvrep.Store, folder: Path) -> kvrep.Agent:
    from kvrep.sinks.feed import FeedSource
    from kvrep.sinks.upstream import Local

    sink = WarehouseSink(f"delta:{folder}?commit_s=0&refresh_s=3600")
    return kvrep.Agent(FeedSource(Local(db)), sink, batch_changes=LARGE_BATCH)


def history(bench: Bench) -> Outcome:
    """Changes that wait in the log, into the history, against Delta commits of the same columns from a list."""
    count = bench.size(400_000, LARGE_BATCH)
    drawn = keys(bench.chance(34), count, count // 2)
    with bench.path("store") as path, kvrep.open(path) as db:

        def agent() -> float:
            with bench.path("warehouse") as folder:
                with _warehouse_agent(db, folder) as first:
                    first.wait_for(db.put(b"begin", b""), 600)
                futures = [db.submit_put(k, VALUE) for k in drawn]
                last = futures[-1].result(60)
                began = time.perf_counter()
                with _warehouse_agent(db, folder) as second:
                    second.wait_for(last, 600)
                    return count / (time.perf_counter() - began)

        def bare() -> float:
            with bench.path("bare") as folder:
                began = time.perf_counter()
                for start in range(0, count, LARGE_BATCH):
                    rows = range(start, min(count, start + LARGE_BATCH))
                    columns = {
                        "number": pa.array(rows, pa.int64()),
                        "key": pa.array([drawn[i] for i in rows], pa.binary()),
                        "value": pa.array([VALUE for _ in rows], pa.binary()),
                    }
                    write_deltalake(str(folder), pa.table(columns), mode="append")
                return count / (time.perf_counter() - began)

        return bench.alternate(agent, bare, pairs=min(3, bench.pairs))


def warehouse_memory(bench: Bench) -> Outcome:
    """The agent process into a warehouse, the current state included."""
    with bench.path("warehouse") as folder:
        names = numbers(1)
        return _memory(
            bench, bench.size(1_000_000, 2000), lambda: f"delta:{folder}/{next(names)}?refresh_s=1"
        )


if WAREHOUSE:
    figure(34, "warehouse-changes", f"agent: changes from a feed into a history, {LARGE_BATCH} a commit",
           "deltalake: appends of key and value")(history)  # fmt: skip
    figure(35, "warehouse-memory", "memory of an agent process into a warehouse")(warehouse_memory)
if AVAILABLE:
    figure(31, "agent-changes", f"agent: changes from a feed into PostgreSQL, {BATCH} a commit",
           "psycopg: upserts by executemany", 0.6)(upserts)  # fmt: skip
    figure(32, "agent-snapshot", "agent: a snapshot into PostgreSQL", "psycopg: COPY", 0.6)(snapshot)
    figure(33, "agent-memory", "memory of an agent process at a large backlog")(memory)
