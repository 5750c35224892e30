"""A Kafka for tests: librdkafka's mock cluster in a process of its own, or the real one that
``KVREP_TEST_KAFKA=host:port`` names. Import the fixtures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lifeline import Lifeline

REAL = os.environ.get("KVREP_TEST_KAFKA", "")


class KafkaCluster:
    """Three brokers in one process. What they hold ends with it, so an outage is a freeze."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: Lifeline | None = None
        self.address = REAL

    def url(self, topic: str) -> str:
        return f"kafka://{self.address}/{topic}"

    def start(self) -> None:
        if REAL:
            return
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("kafka_cluster.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._lifeline = Lifeline(self._process.pid)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().decode().strip()
        assert self.address, "the mock cluster does not start"

    def freeze(self) -> None:
        if self._process is None:
            pytest.skip("a cluster that is not ours is not frozen")
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)  # the signal is only on its way

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        process, self._process = self._process, None
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            lifeline.close()
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(10)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()


@pytest.fixture(scope="session")
def shared_kafka() -> Iterator[KafkaCluster]:
    """One cluster for all tests; each takes topics of its own and leaves it running."""
    pytest.importorskip(
        "confluent_kafka", reason='confluent-kafka is not installed (pip install "kvrep[kafka]")'
    )
    cluster = KafkaCluster()
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()
