"""``kvrep agent`` on the command line: running, status, dead letters, metrics, and mistakes."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.codecs import JSON
from kvrep.sinks.agent import Agent
from kvrep.sinks.feed import FeedSource
from kvrep.sinks.sqlite import SqliteSink
from kvrep.sinks.tables import Table
from kvrep.sinks.upstream import Local
from tests.agent_kit import content, copy_of, wait_until
from tests.cli_kit import command, run_here
from tests.replication_kit import FAST, voters
from tests.warehouse_kit import ask, need_warehouse


class Running:
    """A ``kvrep agent`` process that has said that it is ready."""

    def __init__(self, *flags: object) -> None:
        self.process = subprocess.Popen(
            command("agent", *flags, "--json", "--until-stdin-closes", "--http", "127.0.0.1:0"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 30)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self.process.kill()
            raise AssertionError(self.process.communicate()[1].decode())
        self.ready = json.loads(line)

    def get(self, page: str) -> bytes:
        with urllib.request.urlopen(f"http://{self.ready['http']}{page}", timeout=5) as answer:
            found: bytes = answer.read()
        return found

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get("/status"))
        return found

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=30)
        return self.process.returncode

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def test_an_agent_process_from_a_node_into_sqlite(tmp_path: Path, capfdbinary: Any) -> None:
    """It copies, says over HTTP how it goes in JSON and in Prometheus form, and ends in order at SIGTERM."""
    path = tmp_path / "copy.db"
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0") as db:
        db.put(b"a", b"1")
        with Running("--from", db.address, "--to", f"sqlite:{path}", "--name", "far") as agent:
            wait_until(lambda: agent.status()["state"] == "current", "its snapshot is there")
            db.keyspace("users").put(b"u", b"2")
            wait_until(lambda: agent.status()["position"] == str(db.position), "it has arrived")
            wait_until(lambda: agent.status()["state"] == "current", "it is current")
            status = agent.status()
            metrics = agent.get("/metrics").decode()
            assert agent.end() == 0
        assert copy_of(SqliteSink(str(path))) == content(db)
        assert status["consistent"] is True
        assert status["lineage"] == db.status().lineage
        assert 'kvrep_agent_consistent{name="far"} 1.0' in metrics
        assert 'kvrep_agent_applied_total{name="far"} 2.0' in metrics
        assert 'kvrep_agent_delay_seconds_bucket{le="+Inf",name="far"} 1' in metrics
        assert 'kvrep_agent_state{name="far",state="current"} 1.0' in metrics
        assert 'kvrep_agent_backlog{name="far"} 0.0' in metrics

    shown = run_here(capfdbinary, "agent", "status", "--to", f"sqlite:{path}", "--json")
    assert shown.code == 0
    assert shown.json["consistent"] is True
    assert shown.json["position"] == status["position"]
    assert shown.json["keyspaces"] == ["default", "users"]
    assert "consistent" in run_here(capfdbinary, "agent", "status", "--to", f"sqlite:{path}").text


def test_ctrl_c_ends_it_in_order(tmp_path: Path) -> None:
    """SIGINT closes both sides and gives 130; the copy stays consistent."""
    path = tmp_path / "copy.db"
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0") as db:
        db.put(b"a", b"1")
        with Running("--from", db.address, "--to", f"sqlite:{path}") as agent:
            wait_until(lambda: agent.status()["state"] == "current", "it is current")
            agent.process.send_signal(signal.SIGINT)
            agent.process.communicate(timeout=30)
            assert agent.process.returncode == 130
        assert copy_of(SqliteSink(str(path))) == content(db)


def test_from_a_path_until_current(tmp_path: Path, capfdbinary: Any) -> None:
    """A store that nobody has open is read by its path; --until-current ends when all is there; columns by codec."""
    with kvrep.open(tmp_path / "a") as db:
        db.keyspace("orders", codec=JSON).put(b"o1", {"customer": "Ada", "total": 12})
        db.put(b"left out", b"1")
    path = tmp_path / "copy.db"
    done = run_here(
        capfdbinary, "agent", "--from", tmp_path / "a", "--to", f"sqlite:{path}", "--until-current",
        "--keyspace", "orders", "--table", "orders=json(key text, customer text, total integer)",
        "--log-level", "error",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert copy_of(SqliteSink(str(path))) == {"orders": {"o1": ("Ada", 12)}}


def test_dead_letters_are_listed_retried_and_discarded(tmp_path: Path, capfdbinary: Any) -> None:
    """What could not be applied is shown with its reason; a retry with a fitting table heals; the rest can go."""
    to = f"sqlite:{tmp_path / 'copy.db'}"
    with kvrep.open(tmp_path / "a") as db:
        db.keyspace("docs").put(b"good", b'{"n": 1}')
        db.keyspace("docs").put(b"bad", b"no json")
        last = db.keyspace("docs").put(b"worse", b"\xff")
        sink = SqliteSink(str(tmp_path / "copy.db"), tables={"docs": Table(JSON)})
        with Agent(FeedSource(Local(db)), sink) as agent:
            agent.wait_for(last)
    listed = run_here(capfdbinary, "agent", "dead-letters", "--to", to)
    assert listed.code == 0
    assert "bad" in listed.text
    assert "JSONDecodeError" in listed.text
    numbers = [
        json.loads(line)["number"]
        for line in run_here(capfdbinary, "agent", "dead-letters", "--to", to, "--json").text.splitlines()
    ]
    assert len(numbers) == 2

    failed = run_here(capfdbinary, "agent", "retry", "all", "--to", to, "--json")
    assert failed.code == 6
    assert sorted(map(int, failed.json["failed"])) == numbers
    failed = run_here(capfdbinary, "agent", "retry", numbers[0], "--to", to, "--json")
    assert (failed.code, list(failed.json["failed"])) == (6, [str(numbers[0])]), "the agent's mapping holds"
    healed = run_here(
        capfdbinary, "agent", "retry", numbers[0], "--to", to, "--table", "docs=bytes", "--json"
    )
    assert (healed.code, healed.json["done"]) == (0, [numbers[0]])
    assert run_here(capfdbinary, "agent", "discard", numbers[1], "--to", to).code == 0
    assert "no dead letters" in run_here(capfdbinary, "agent", "dead-letters", "--to", to).text
    assert run_here(capfdbinary, "agent", "discard", 77, "--to", to).code == 2


def test_a_copy_of_another_store(tmp_path: Path, capfdbinary: Any) -> None:
    """An agent pointed at the copy of another store is refused, and says what to check."""
    to = f"sqlite:{tmp_path / 'copy.db'}"
    for name in ("a", "b"):
        with kvrep.open(tmp_path / name) as db:
            db.put(b"k", b"v")
    flags = ["--to", to, "--until-current", "--log-level", "error"]
    assert run_here(capfdbinary, "agent", "--from", tmp_path / "a", *flags).code == 0
    done = run_here(capfdbinary, "agent", "--from", tmp_path / "b", *flags)
    assert (done.code, "copy of another store" in done.err) == (3, True), done.err
    assert "check both addresses" in done.err


def test_a_store_into_itself(tmp_path: Path, capfdbinary: Any) -> None:
    """A store that is to be copied into itself, or into its own group, is refused and not written."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as a:
        with kvrep.open(tmp_path / "b", name="b", listen="127.0.0.1:0", follow=a.address, **FAST) as b:
            voters(a, "a", "b")
            before = a.status().last_offset
            done = run_here(
                capfdbinary, "agent", "--from", b.address, "--to", a.address, "--log-level", "error"
            )
            assert (done.code, "is the source itself" in done.err) == (2, True), done.err
            assert a.status().last_offset == before
    done = run_here(capfdbinary, "agent", "--from", tmp_path / "a", "--to", f"kvrep:{tmp_path / 'copy'}")
    assert (done.code, "belongs to a group" in done.err) == (3, True), done.err
    with kvrep.open(tmp_path / "c") as c:
        c.put(b"k", b"v")
    done = run_here(capfdbinary, "agent", "--from", tmp_path / "c", "--to", f"kvrep:{tmp_path / 'b'}")
    assert (done.code, "belongs to a group" in done.err) == (3, True), done.err


def test_a_warehouse_on_the_command_line(tmp_path: Path, capfdbinary: Any) -> None:
    """Run until current, status, dead letters and a retry, with nothing but its address."""
    need_warehouse()
    folder = tmp_path / "lake"
    to = f"delta:{folder}"
    with kvrep.open(tmp_path / "a") as db:
        db.put(b"a", b"1")
        db.keyspace("docs").put(b"good", b'{"n": 1}')
        db.keyspace("docs").put(b"bad", b"no json")
        expected = content(db)
    done = run_here(
        capfdbinary, "agent", "--from", tmp_path / "a", "--to", to, "--until-current",
        "--table", "docs=json(n integer)", "--log-level", "error",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert dict(ask(folder, "SELECT key, value FROM current_default")) == expected["default"]
    assert ask(folder, "SELECT key, n FROM current_docs") == [(b"good", 1)]
    shown = run_here(capfdbinary, "agent", "status", "--to", to, "--json")
    assert shown.code == 0
    assert shown.json["keyspaces"] == ["default", "docs"]
    assert (shown.json["consistent"], shown.json["dead_letters"]) == (False, 1)
    assert "JSONDecodeError" in run_here(capfdbinary, "agent", "dead-letters", "--to", to).text
    assert run_here(capfdbinary, "agent", "retry", "all", "--to", to).code == 6
    other = run_here(capfdbinary, "agent", "retry", "all", "--to", to, "--table", "docs=json")
    assert (other.code, "made for other columns" in other.err) == (2, True), other.err
    assert run_here(capfdbinary, "agent", "discard", "all", "--to", to).code == 0
    shown = run_here(capfdbinary, "agent", "status", "--to", to, "--json")
    assert shown.json["consistent"] is True


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--to", "sqlite:x.db"], 2, "--from is missing"),
        (["--from", "127.0.0.1:1", "--to", "sqlite:x.db"], 5, "127.0.0.1:1"),
        (["--from", "nowhere", "--to", "sqlite:x.db"], 2, "nowhere"),
        (["--from", "nowhere", "--to", "gopher://x"], 2, "no secondary is known for gopher"),
        (["--from", "nowhere", "--to", "sqlite:"], 2, "needs a path"),
        (["--from", "nowhere", "--to", "sqlite:x", "--table", "orders=xml"], 2, "orders=xml"),
        (["--from", "memory://a/b", "--to", "sqlite:x", "--prefix", "k"], 2, "where the stream is published"),
        (["--from", "127.0.0.1:1", "--to", "sqlite:x", "--before"], 2, "publishing to a broker"),
        (["--from", "127.0.0.1:1", "--to", "sqlite:x", "--format", "debezium"], 2, "publishing to a broker"),
        (["status", "--to", "memory://a/b"], 2, "keeps no dead letters"),
        (["status", "--from", "x", "--to", "sqlite:x"], 2, "--from is for running"),
        (["retry", "--to", "sqlite:x"], 2, "which dead letters"),
        (["status", "5", "--to", "sqlite:x"], 2, "not understood: 5"),
        (["status", "--to", "sqlite:/no/such/folder/x.db"], 2, "folder exists"),
    ],
)
def test_mistakes_are_named(
    flags: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    """Every mistake ends at once with its exit code and one line that names what to fix."""
    monkeypatch.chdir(tmp_path)
    done = run_here(capfdbinary, "agent", *flags, "--log-level", "error")
    assert done.code == code, done.err
    assert words in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("action", ["status", "dead-letters", "retry", "discard"])
@pytest.mark.parametrize("scheme", ["sqlite", "kvrep", "delta"])
def test_looking_at_a_secondary_that_is_not_there_does_not_make_it(
    action: str, scheme: str, tmp_path: Path, capfdbinary: Any
) -> None:
    """A mistyped path is named as such and leaves nothing behind that looks like a secondary."""
    path = tmp_path / "typo"
    numbers = ["all"] if action in ("retry", "discard") else []
    done = run_here(capfdbinary, "agent", action, *numbers, "--to", f"{scheme}:{path}")
    assert done.code == 2
    assert "there is no secondary at" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["retry", "discard"])
def test_a_dead_letter_that_does_not_exist(action: str, tmp_path: Path, capfdbinary: Any) -> None:
    """A wrong number is wrong usage, for both ways of settling a dead letter."""
    with SqliteSink(tmp_path / "copy.db") as sink:
        sink.open()
    done = run_here(capfdbinary, "agent", action, "77", "--to", f"sqlite:{tmp_path / 'copy.db'}")
    assert (done.code, "no dead letter 77" in done.err) == (2, True), done.err


def test_the_log_is_ours_alone(tmp_path: Path) -> None:
    """A broker that is not there gives one line, without the log of the library that talks to it."""
    pytest.importorskip("pika", reason="pika is not installed")
    to = f"sqlite:{tmp_path / 'copy.db'}"
    done = subprocess.run(
        [*command("agent"), "--from", "amqp://guest:guest@127.0.0.1:1/?topic=t", "--to", to],
        capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 5
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_publication_waits_for_its_broker_too(tmp_path: Path) -> None:
    """With ``--wait`` a broker that does not answer at the start is awaited, in both directions."""
    pytest.importorskip("pika", reason="pika is not installed")
    with kvrep.open(tmp_path / "a", listen="127.0.0.1:0") as db:
        flags = ["--wait", "--state", tmp_path / "place.json"]
        with Running("--from", db.address, "--to", "amqp://127.0.0.1:1/?topic=t", *flags) as running:
            wait_until(lambda: running.status()["state"] == "waiting", "it waits")
            assert "cannot be reached" in running.status()["problem"]
            assert running.end() == 0


def test_a_keyspace_that_cannot_be_one(tmp_path: Path, capfdbinary: Any) -> None:
    """A mistyped name ends every command that reads changes at once, before it says that it is ready."""
    with kvrep.open(tmp_path / "a", listen="127.0.0.1:0") as db:
        flags = ["--keyspace", "No Such"]
        for command_line in (
            ["agent", "--from", db.address, "--to", f"sqlite:{tmp_path / 'x.db'}", *flags],
            ["changes", db.address, "--no-wait", *flags],
        ):
            done = run_here(capfdbinary, *command_line)
            assert (done.code, done.text, "'No Such'" in done.err) == (3, "", True), done.err
            assert len(done.err.splitlines()) == 1
