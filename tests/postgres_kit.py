"""A real PostgreSQL for tests, on a free loopback port. Import the fixtures that a module uses."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lifeline import Lifeline
from tests.ports import free_port

START_S = 60.0
USER, PASSWORD = "kvrep", "secret"
_schemas = itertools.count(1)


def _binaries() -> Path | None:
    """The folder with initdb and postgres: Debian keeps them out of the path."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    return versions[-1].parent if versions else None


BINARIES = _binaries()


def _account() -> int | None:
    """The user to run as where we are root, which PostgreSQL refuses."""
    if os.getuid():
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            continue
    return None


class PostgresServer:
    """One PostgreSQL with a data folder of its own, to be stopped, started and frozen at will."""

    def __init__(self, folder: Path, *, fsync: bool = False) -> None:
        assert BINARIES is not None
        self._binaries = BINARIES
        self._folder = folder
        self._fsync = "on" if fsync else "off"
        self._data = folder / "data"
        self._user = _account()
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: Lifeline | None = None
        self.port = 0
        if self._user is not None:
            os.chown(folder, self._user, -1)
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        subprocess.run(
            [
                self._binaries / "initdb", "-D", str(self._data), "-U", USER, "--pwfile", str(password),
                "-A", "scram-sha-256", "--no-sync", "-E", "UTF8", "--locale=C",
            ],
            check=True, capture_output=True, timeout=START_S, user=self._user, cwd="/",
        )  # fmt: skip

    def url(self, schema: str = "kvrep", *, password: str = PASSWORD, database: str = "postgres") -> str:
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}?schema={schema}"

    def new_url(self) -> str:
        """The address of a schema that nobody has used."""
        return self.url(f"s{next(_schemas)}")

    def start(self) -> None:
        """Start, or start again on the same port. A port found free may be taken: try again."""
        if self.port:
            assert self._start(self.port), "PostgreSQL does not start again"
            return
        for _ in range(5):
            if self._start(free_port()):
                return
        raise AssertionError("PostgreSQL does not start")

    def _start(self, port: int) -> bool:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._binaries / "postgres", "-D", str(self._data), "-p", str(port),
                    "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self._folder}",
                    "-c", f"fsync={self._fsync}", "-c", "max_wal_size=4GB",
                ],
                stdout=log, stderr=log, user=self._user, cwd="/",
                start_new_session=True,  # Ctrl-C in a terminal is for the tests, which end it in order
            )  # fmt: skip
        self._lifeline = Lifeline(self._process.pid)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if _answers(port):
                self.port = port
                return True
            time.sleep(0.02)
        self.stop()
        return False

    def stop(self, number: int = signal.SIGQUIT) -> None:
        """End it; SIGQUIT is at once, without care: connections break."""
        process, self._process = self._process, None
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            lifeline.close()
        if process is not None and process.poll() is None:
            process.send_signal(number)
            process.wait(30)


def _answers(port: int) -> bool:
    """Whether it takes connections: an SSL request is answered, and a query for the user is not "starting up"."""
    import psycopg

    try:
        with psycopg.connect(f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres", connect_timeout=2):
            return True
    except psycopg.OperationalError:
        return False


GUARD = """
CREATE TABLE {schema}.default (key bytea PRIMARY KEY, value bytea);
CREATE FUNCTION {schema}.forward() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.value <= OLD.value THEN
    RAISE EXCEPTION '% does not follow %', NEW.value, OLD.value USING ERRCODE = 'KV001';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER forward BEFORE UPDATE ON {schema}.default FOR EACH ROW EXECUTE FUNCTION {schema}.forward();
"""
"""For tests whose values only grow: one that does not was applied out of order, or twice. The code of the error is one
that ends the agent; it would put aside what a plain RAISE refuses, and forget it with the next value."""


def guarded(url: str) -> None:
    """Make the schema, and in it a table of the keyspace ``default`` that refuses values that do not grow."""
    import psycopg

    schema = url.rpartition("=")[2]
    with psycopg.connect(url.partition("?")[0]) as connection:
        connection.execute(f"CREATE SCHEMA {schema}".encode())
        connection.execute(GUARD.format(schema=schema).encode())


def need_postgres() -> None:
    """Skip, with the reason, where there is no server to test with."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    if BINARIES is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    if not os.getuid() and _account() is None:
        pytest.skip("PostgreSQL refuses root, and there is no other user to run it as")


@pytest.fixture(scope="session")
def shared_postgres() -> Iterator[PostgresServer]:
    """One server for all tests that only use it; each takes a schema of its own."""
    need_postgres()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        server = PostgresServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()


@pytest.fixture
def postgres_server() -> Iterator[PostgresServer]:
    """A server of one's own, to be stopped and started."""
    need_postgres()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        server = PostgresServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()
