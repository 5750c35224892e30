"""``kvrep publish``: a log into a broker, and what happens when it, or the way, breaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.cli.exits import Exit
from tests.broker_kit import Site
from tests.cli_kit import command, run_here
from tests.kafka_kit import KafkaCluster
from tests.rabbit_kit import RabbitServer
from tests.relay_kit import far
from tests.replication_kit import FAST, same, until


@contextmanager
def published(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a process, until the block ends."""
    process = subprocess.Popen(
        [*command("publish", *arguments), "--until-stdin-closes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)
        assert process.stdin is not None
        process.stdin.close()


def test_killed_and_started_again(shared_rabbitmq: RabbitServer, memory_path: Path) -> None:
    """The publisher is killed at several moments: with its state file it goes on, and nothing is missing."""
    url, state = shared_rabbitmq.url(Site.topic()), memory_path / "state"
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with far(memory_path / "f", url, **FAST) as f:
            for round_ in range(3):
                arguments = (primary.address, "--to", url, "--name", "far", "--state", state)
                with published(*arguments) as process:
                    for i in range(200):
                        position = primary.put(b"key-%d-%d" % (round_, i), os.urandom(2000))
                    f.wait_for(primary.put(b"round", b"%d" % round_), 40)
                    for i in range(100):
                        position = primary.put(b"tail-%d-%d" % (round_, i), os.urandom(2000))
                    process.send_signal(signal.SIGKILL)
                    process.wait(20)
            assert state.exists()
            with published(primary.address, "--to", url, "--name", "far", "--state", state):
                f.wait_for(position, 40)
                same(primary, f)


def test_a_store_on_disk(shared_kafka: KafkaCluster, memory_path: Path, capfdbinary: Any) -> None:
    """A path is published as it is, and the command ends when the broker has everything."""
    url = shared_kafka.url(Site.topic())
    with kvrep.open(memory_path / "p") as store:
        for i in range(50):
            store.put(b"key-%d" % i, b"v")
    result = run_here(capfdbinary, "publish", memory_path / "p", "--to", url, "--until-caught-up", "--json")
    assert result.code == Exit.OK, result.err
    last = json.loads(result.text.splitlines()[-1])
    assert last["lag_records"] == 0
    with far(memory_path / "f", url, **FAST) as f:
        until(lambda: f.get(b"key-49") == b"v")
        assert str(f.position) >= last["published"] or f.position.offset <= last["source_last"]
        assert len(f) == 50


@pytest.mark.parametrize(
    ("target", "to", "text"),
    [
        ("127.0.0.1:1", "amqp://guest:guest@127.0.0.1:1/", "cannot be reached"),
        ("127.0.0.1:1", "pigeon://loft/", "no broker is known"),
        ("/nowhere", "memory://x/", "brokers="),
    ],
)
def test_wrong_arguments(target: str, to: str, text: str, capfdbinary: Any) -> None:
    """What cannot work ends the command with one line that says why."""
    result = run_here(capfdbinary, "publish", target, "--to", to)
    assert result.code not in (Exit.OK, Exit.FAILED)
    assert text in result.err
    assert "Traceback" not in result.err


def test_a_path_where_no_store_is(shared_kafka: KafkaCluster, capfdbinary: Any, tmp_path: Path) -> None:
    """A path without a store is refused by name."""
    result = run_here(capfdbinary, "publish", tmp_path, "--to", shared_kafka.url(Site.topic()))
    assert result.code == Exit.USAGE
    assert "there is no store" in result.err


def test_a_source_that_is_not_there(shared_rabbitmq: RabbitServer) -> None:
    """It waits for one of the nodes, and says which one does not answer and why; nothing else is printed."""
    to = shared_rabbitmq.url(Site.topic())
    process = subprocess.Popen(
        [*command("publish", "127.0.0.1:1", "--to", to, "--json"), "--until-stdin-closes"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["problem"].startswith("127.0.0.1:1 cannot be reached: Connection refused"), said
    finally:
        process.send_signal(signal.SIGINT)  # standard input stays open: it may be watched until the very end
        assert process.wait(30) == Exit.INTERRUPTED
        _, err = process.communicate(timeout=30)
    assert not err, err


def test_where_the_place_is_kept(shared_rabbitmq: RabbitServer, tmp_path: Path, capfdbinary: Any) -> None:
    """The folder of the file is made; where none can be, the command ends before anything is published."""
    to = shared_rabbitmq.url(Site.topic())
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0") as db:
        db.put(b"k", b"v")
        flags = ["publish", db.address, "--to", to, "--until-caught-up", "--state"]
        done = run_here(capfdbinary, *flags, tmp_path / "new" / "place.json")
        assert (done.code, done.err) == (Exit.OK, "")
        assert json.loads((tmp_path / "new" / "place.json").read_text())["last"] == list(db.position)
        done = run_here(capfdbinary, *flags, tmp_path / "new" / "place.json" / "below")
        assert (done.code, "place.json" in done.err) == (Exit.USAGE, True), done.err
        assert "Traceback" not in done.err
        assert len(done.err.splitlines()) == 1
