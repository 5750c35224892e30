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

from kvrep.sinks.interface import Place  # noqa: E402
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


TABLE = """
CREATE SCHEMA {schema};
CREATE TABLE {schema}.default (key bytea PRIMARY KEY, value bytea);
CREATE FUNCTION {schema}.look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$;
CREATE {kind} TRIGGER look {when} INSERT OR UPDATE ON {schema}.default {deferred}
  FOR EACH ROW EXECUTE FUNCTION {schema}.look();
"""
REFUSE = "IF NEW.value = 'bad' THEN RAISE EXCEPTION 'no room for %', NEW.key; END IF;"


def with_trigger(server: PostgresServer, body: str, *, deferred: bool = False) -> str:
    """The address of a schema whose table ``default`` has a trigger that does this."""
    import psycopg

    url = server.new_url()
    made = TABLE.format(
        schema=url.rpartition("=")[2], body=body, kind="CONSTRAINT" if deferred else "",
        when="AFTER" if deferred else "BEFORE", deferred="INITIALLY DEFERRED" if deferred else "",
    )  # fmt: skip
    with psycopg.connect(url.partition("?")[0]) as connection:
        connection.execute(made.encode())
    return url


def test_what_a_trigger_refuses_is_put_aside(tmp_path: Path, shared_postgres: PostgresServer) -> None:
    """A row that a trigger raises at is a dead letter with what the trigger said; the rest of the batch goes on."""
    url = with_trigger(shared_postgres, REFUSE)
    with kvrep.open(tmp_path / "a") as db, agent_of(db, PostgresSink(url)) as agent:
        agent.wait_for(db.put(b"k0", b"good"))
        with db.batch() as batch:
            for i in range(1, 9):
                batch.put(b"k%d" % i, b"bad" if i == 5 else b"good")
        assert batch.position is not None
        agent.wait_for(batch.position)
        assert agent.status().dead_letters == 1
        expected = {key: value for key, value in db.scan() if value == b"good"}
    sink = PostgresSink(url)
    assert copy_of(sink) == {"default": expected}
    sink.open()
    [letter] = sink.dead_letters()
    sink.close()
    assert letter.key == b"k5"
    assert "no room for" in letter.reason


def test_what_forbids_tables_is_named(shared_postgres: PostgresServer) -> None:
    """An event trigger that raises at new or dropped tables is a typed error with its words, whenever it comes."""
    import psycopg

    with psycopg.connect(shared_postgres.url().partition("?")[0], autocommit=True) as connection:
        connection.execute("CREATE DATABASE frozen")
    url = shared_postgres.url("copy", database="frozen")
    sink = PostgresSink(url)
    sink.open()
    sink.stage([("staged", b"k", b"v")])
    sink.commit(Place(staging=True))
    with psycopg.connect(url.partition("?")[0]) as connection:
        connection.execute(
            "CREATE FUNCTION public.no() RETURNS event_trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'tables are frozen'; END $$"
        )
        connection.execute("CREATE EVENT TRIGGER no ON ddl_command_start EXECUTE FUNCTION public.no()")
    ops = [("default", b"%d" % i, b"v") for i in range(3)]
    other = PostgresSink(shared_postgres.url("other", database="frozen"))
    for act in (lambda: sink.apply(ops), lambda: sink.stage(ops), sink.unstage, other.open):
        with pytest.raises(kvrep.ConfigurationMismatch, match="tables are frozen"):
            act()
        sink.rollback()
    sink.close()


def test_a_trigger_that_fails_itself_is_named(shared_postgres: PostgresServer) -> None:
    """What is wrong in a trigger's function ends in an error that says where, and does not blame the columns."""
    import psycopg

    plain = shared_postgres.url().partition("?")[0]
    with psycopg.connect(plain) as connection:
        connection.execute("CREATE ROLE clerk LOGIN PASSWORD 'clerk'")
        connection.execute("GRANT CREATE ON DATABASE postgres TO clerk")
        connection.execute("CREATE TABLE public.audit (key bytea)")
    broken = with_trigger(shared_postgres, "INSERT INTO nowhere VALUES (NEW.key);")
    custom = with_trigger(shared_postgres, "RAISE EXCEPTION 'not now' USING ERRCODE = 'KV001';")
    denied = with_trigger(shared_postgres, "INSERT INTO public.audit VALUES (NEW.key);")
    schema = denied.rpartition("=")[2]
    with psycopg.connect(plain) as connection:
        connection.execute(f"GRANT ALL ON SCHEMA {schema} TO clerk".encode())
        connection.execute(f"GRANT ALL ON {schema}.default TO clerk".encode())
    cases: list[tuple[str, type[kvrep.Error], str]] = [
        (broken, kvrep.ConfigurationMismatch, "nowhere"),
        (custom, kvrep.ConfigurationMismatch, "not now"),
        (denied.replace("kvrep:secret", "clerk:clerk"), kvrep.PermissionDenied, "audit"),
    ]
    for url, kind, words in cases:
        sink = PostgresSink(url)
        sink.open()
        with pytest.raises(kind, match=words) as caught:
            sink.apply([("default", b"k", b"v")])
        sink.close()
        assert f"{url.rpartition('=')[2]}.look()" in caught.value.message
        assert "trigger" in caught.value.hint
        assert "columns" not in caught.value.hint


@pytest.mark.parametrize("deferred", [False, True], ids=["at the swap", "at the commit"])
def test_a_snapshot_that_a_trigger_refuses(
    shared_postgres: PostgresServer,
    deferred: bool,
) -> None:
    """Where no single change can be put aside, the error says what refuses the rows, and the old copy stays."""
    from kvrep.sinks.interface import Place

    url = with_trigger(shared_postgres, REFUSE, deferred=deferred)
    sink = PostgresSink(url)
    sink.open()
    sink.apply([("default", b"k", b"old")])
    sink.commit(Place())
    sink.unstage()
    sink.stage([("default", b"k", b"bad")])
    with pytest.raises(kvrep.ConfigurationMismatch, match="no room for") as caught:
        sink.swap()
        sink.commit(Place())
    assert "trigger" in caught.value.hint
    sink.close()
    assert copy_of(PostgresSink(url)) == {"default": {b"k": b"old"}}


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
