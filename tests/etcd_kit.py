"""A real etcd for tests, on free loopback ports. Import the fixtures that a module uses."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lifeline import Lifeline
from tests.ports import free_port

ETCD = shutil.which("etcd")
START_S = 30.0


class EtcdServer:
    """One etcd on free loopback ports, with a data folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: Lifeline | None = None
        self.endpoint = ""

    def start(self) -> None:
        """Start, or start again with the same data and ports. Ports found free may be taken: try again."""
        if self.endpoint:
            self._start(self.endpoint)
            return
        for _ in range(5):
            if self._start(f"127.0.0.1:{free_port()}"):
                return
        raise AssertionError("etcd does not start")

    def _start(self, endpoint: str) -> bool:
        assert ETCD is not None
        peer = f"http://127.0.0.1:{free_port()}"
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    ETCD,
                    "--data-dir", str(self._folder / "data"),
                    "--listen-client-urls", f"http://{endpoint}",
                    "--advertise-client-urls", f"http://{endpoint}",
                    "--listen-peer-urls", peer,
                    "--initial-advertise-peer-urls", peer,
                    "--initial-cluster", f"default={peer}",
                    "--unsafe-no-fsync",
                    "--logger", "zap",
                    "--log-level", "error",
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._lifeline = Lifeline(self._process.pid)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if _answers(endpoint):
                self.endpoint = endpoint
                return True
            time.sleep(0.02)
        self.stop()
        return False

    def freeze(self) -> None:
        assert self._process is not None
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


def _answers(endpoint: str) -> bool:
    """Whether etcd serves and has a leader: its health page says so."""
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=0.5) as s:
            s.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            s.settimeout(2.0)
            answer = b""
            while piece := s.recv(4096):
                answer += piece
            return b'"health":"true"' in answer
    except OSError:
        return False


@pytest.fixture
def etcd_server() -> Iterator[EtcdServer]:
    """A fresh etcd, to be stopped and frozen at will."""
    if ETCD is None:
        pytest.skip("etcd is not installed (Debian: apt-get install etcd-server)")
    with tempfile.TemporaryDirectory() as folder:
        server = EtcdServer(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def shared_etcd() -> Iterator[EtcdServer]:
    """One etcd for all tests that only use it; each takes keys of its own."""
    if ETCD is None:
        pytest.skip("etcd is not installed (Debian: apt-get install etcd-server)")
    with tempfile.TemporaryDirectory() as folder:
        server = EtcdServer(Path(folder))
        server.start()
        yield server
        server.stop()
