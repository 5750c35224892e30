"""Agents into a real PostgreSQL: kill -9 at any point, a server that goes away, and what is said of mistakes."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import kvrep
from tests.agent_kit import agent_of, content, copy_of, wait_current, wait_until
from tests.postgres_kit import PostgresServer, guarded, need_postgres

need_postgres()

from kvrep.sinks.postgres import PostgresSink  # noqa: E402


class Writer(threading.Thread):
    """Writes growing values to a few keys, two in each transaction, as many as it is told to."""

    def __init__(self, db: kvrep.Store) -> None:
        super().__init__(name="writer")
        self._db = db
        self._room = threading.Semaphore(0)
        self._ending = False

    def allow(self, transactions: int) -> None:
        self._room.release(transactions)

    def run(self) -> None:
        count = 0
        while self._room.acquire() and not self._ending:
            count += 1
            with self._db.batch() as batch:
                batch.put(b"%d" % (count % 50), b"%010d" % count)
                batch.put(b"total", b"%010d" % count)

    def __enter__(self) -> Writer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending = True
        self._room.release()
        self.join(10)


def run_until_killed(source: str, secondary: str, commits: int, writer: Writer) -> None:
    """Run an agent in a process of its own, and kill it after so many commits."""
    writer.allow(100)
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.agent_child", source, secondary], stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        for _ in range(commits):
            writer.allow(20)  # more than one commit takes
            assert child.stdout.readline() == b"committed\n"
        child.kill()
        child.wait(10)


def test_an_agent_killed_at_any_point_applies_everything_once(
    tmp_path: Path,
    shared_postgres: PostgresServer,
) -> None:
    """SIGKILL after so many commits, five times: nothing is missing, nothing goes backwards, transactions are whole."""
    chance = random.Random(5)
    url = shared_postgres.new_url()
    guarded(url)
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0") as db:
        with Writer(db) as writer:
            for commits in (0, *(chance.randrange(1, 60) for _ in range(4))):
                run_until_killed(db.address, url, commits, writer)
                found = copy_of(PostgresSink(url)).get("default", {})
                if found:
                    assert max(v for k, v in found.items() if k != b"total") == found[b"total"]
        with agent_of(db, PostgresSink(url)) as agent:
            wait_current(agent, db)
            assert agent.status().snapshots == 0
            assert agent.status().consistent
        assert copy_of(PostgresSink(url)) == content(db)


def test_a_server_that_goes_away_and_comes_back(
    tmp_path: Path,
    postgres_server: PostgresServer,
) -> None:
    """PostgreSQL ends at once in mid-stream, twice: the agent waits, says so, and goes on without a snapshot."""
    url = postgres_server.url("copy")
    guarded(url)
    with kvrep.open(tmp_path / "a") as db, Writer(db) as writer:
        with agent_of(db, PostgresSink(url), batch_changes=10) as agent:
            writer.allow(2000)
            wait_until(lambda: agent.status().commits > 3, "it applies")
            for _ in range(2):
                postgres_server.stop()
                writer.allow(1000)
                wait_until(lambda: agent.status().state == "waiting", "it waits")
                assert "postgresql://kvrep@127.0.0.1" in agent.status().problem
                assert "secret" not in agent.status().problem
                before = agent.status().commits
                postgres_server.start()
                wait_until(lambda: agent.status().commits > before + 3, "it goes on", 60)
            wait_until(lambda: int(db.get(b"total", b"0")) == 4000, "all is written")
            wait_current(agent, db)
            assert agent.status().snapshots == 1
            assert agent.status().reconnects >= 2
        assert copy_of(PostgresSink(url)) == content(db)


def test_mistakes_are_named_at_once(shared_postgres: PostgresServer) -> None:
    """A wrong password, user, database, host, port and schema each raise an error that says what to fix."""
    url = shared_postgres.url("x")
    cases: list[tuple[str, type[kvrep.Error], str]] = [
        (shared_postgres.url("x", password="wrong"), kvrep.AuthenticationFailed, "password"),
        (url.replace("kvrep:", "nobody:"), kvrep.AuthenticationFailed, "user and password"),
        (shared_postgres.url("x", database="none"), kvrep.ConfigurationMismatch, "create the database"),
        (url.replace(str(shared_postgres.port), "1"), kvrep.PeerUnavailable, "host and port"),
        (url.replace("127.0.0.1", "no-such-host.invalid"), kvrep.PeerUnavailable, "host name"),
        (url + "&nonsense=1", kvrep.ConfigurationMismatch, "nonsense"),
    ]
    for address, kind, words in cases:
        began = time.monotonic()
        with pytest.raises(kind) as caught:
            PostgresSink(address).open()
        assert words in str(caught.value)
        assert "secret" not in str(caught.value)
        assert "wrong" not in str(caught.value)
        assert time.monotonic() - began < 8
    for schema in ("", "pg_own", "a%b"):
        with pytest.raises(kvrep.ConfigurationMismatch):
            PostgresSink(shared_postgres.url(schema.replace("%", "%25")))


def test_a_user_without_rights_and_a_table_that_does_not_fit(shared_postgres: PostgresServer) -> None:
    """Missing rights and foreign tables end in errors that name them; the foreign table stays as it is."""
    import psycopg

    plain = shared_postgres.url().partition("?")[0]
    schema = shared_postgres.new_url().rpartition("=")[2]
    with psycopg.connect(plain) as connection:
        connection.execute("DROP ROLE IF EXISTS guest")
        connection.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
        connection.execute(f"CREATE SCHEMA {schema}".encode())
        connection.execute(f"CREATE TABLE {schema}.users (id int, name text)".encode())
        connection.execute(f"INSERT INTO {schema}.users VALUES (1, 'Ada')".encode())
    guest = shared_postgres.url("guests").replace("kvrep:secret", "guest:guest")
    with pytest.raises(kvrep.PermissionDenied, match="grant CREATE"):
        PostgresSink(guest).open()
    sink = PostgresSink(shared_postgres.url(schema))
    sink.open()
    with pytest.raises(kvrep.ConfigurationMismatch, match="columns"):
        sink.apply([("users", b"k", b"v")])
    sink.close()
    with psycopg.connect(plain) as connection:
        assert connection.execute(f"SELECT * FROM {schema}.users".encode()).fetchall() == [(1, "Ada")]


def test_no_transaction_stays_open_while_the_agent_is_idle(
    tmp_path: Path,
    shared_postgres: PostgresServer,
) -> None:
    """An idle agent holds no transaction, which would keep the database from cleaning up."""
    import psycopg

    url = shared_postgres.new_url()
    with kvrep.open(tmp_path / "a") as db, agent_of(db, PostgresSink(url)) as agent:
        agent.wait_for(db.put(b"a", b"1"))
        wait_current(agent, db)
        with psycopg.connect(url.partition("?")[0]) as connection:

            def idle() -> bool:
                states = connection.execute(
                    "SELECT state FROM pg_stat_activity WHERE application_name = 'kvrep agent'"
                ).fetchall()
                connection.rollback()
                return bool(states) and all(state == ("idle",) for state in states)

            wait_until(idle, "no transaction is open")


def test_a_snapshot_keeps_what_people_built_on_a_table(shared_postgres: PostgresServer) -> None:
    """A new snapshot changes rows, not tables: a view and an index of the users stay, and readers see no gap."""
    import psycopg

    from kvrep.sinks.interface import Place

    url = shared_postgres.new_url()
    schema = url.rpartition("=")[2]
    sink = PostgresSink(url)
    sink.open()
    sink.apply([("default", b"a", b"1"), ("default", b"b", b"1")])
    sink.commit(Place())
    with psycopg.connect(url.partition("?")[0], autocommit=True) as connection:
        connection.execute(f"CREATE VIEW {schema}.seen AS SELECT value FROM {schema}.default".encode())
        sink.unstage()
        sink.stage([("default", b"b", b"2"), ("default", b"c", b"3")])
        assert connection.execute(f"SELECT count(*) FROM {schema}.seen".encode()).fetchone() == (2,)
        sink.swap()
        assert connection.execute(f"SELECT count(*) FROM {schema}.seen".encode()).fetchone() == (2,)
        sink.commit(Place())
        rows = connection.execute(f"SELECT value FROM {schema}.seen ORDER BY value".encode()).fetchall()
    sink.close()
    assert rows == [(b"2",), (b"3",)]
