"""A real RabbitMQ for tests: its own node name, folder, epmd and loopback ports. Import the fixtures."""

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

SERVER = next(
    (path for path in ("/usr/lib/rabbitmq/bin/rabbitmq-server",) if os.access(path, os.X_OK)),
    shutil.which("rabbitmq-server"),
)
CTL = "/usr/lib/rabbitmq/bin/rabbitmqctl"
START_S = 60.0
CTL_S = 60.0
FREEZE_S = 10.0


def need_rabbitmq() -> None:
    """Skip the test where there is nothing to test with."""
    pytest.importorskip("pika", reason='pika is not installed (pip install "kvrep[rabbitmq]")')
    if SERVER is None:
        pytest.skip("rabbitmq-server is not installed (Debian: apt-get install rabbitmq-server)")


class RabbitServer:
    """One RabbitMQ. Stopping and starting keeps its data and its port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self._lifeline: Lifeline | None = None
        self._epmd_lifeline: Lifeline | None = None
        self.port = 0

    def url(self, topic: str, *, stream: bool = False, user: str = "guest:guest", vhost: str = "") -> str:
        scheme = "amqp+stream" if stream else "amqp"
        return f"{scheme}://{user}@127.0.0.1:{self.port}/{vhost}?topic={topic}"

    def start(self) -> None:
        """Start, or start again. Ports found free may be taken before they are used: try again."""
        if self.port:
            assert self._start(), self._log()
            return
        for _ in range(3):
            self.port, self._distribution, epmd = (free_port() for _ in range(3))
            self._environment = self._make_environment(epmd)
            self._epmd = subprocess.Popen(
                ["epmd", "-port", str(epmd), "-address", "127.0.0.1"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._epmd_lifeline = Lifeline(self._epmd.pid)
            if self._start():
                return
            self._end_epmd()
        raise AssertionError(f"RabbitMQ does not start: {self._log()}")

    def _make_environment(self, epmd: int) -> dict[str, str]:
        folder = self._folder
        (folder / "plugins").write_text("[].\n")
        (folder / "rabbitmq.conf").write_text("log.console = false\nloopback_users.guest = true\n")
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP_SECONDS": "0",
            "RABBITMQ_NODENAME": f"kvrep-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none",
        }

    def _start(self) -> bool:
        assert SERVER is not None
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [SERVER],
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # the script starts the node as its child: both are this group
            )
        self._lifeline = Lifeline(self._process.pid)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if _answers(self.port):
                return True
            time.sleep(0.05)
        self.kill()
        return False

    def _log(self) -> str:
        path = self._folder / "output"
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""

    def signal(self, number: int) -> None:
        """To the node and what belongs to it."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def freeze(self) -> None:
        """The signal is on its way when it is sent: return once every thread stands still."""
        assert self._process is not None
        self.signal(signal.SIGSTOP)
        deadline = time.monotonic() + FREEZE_S
        while not _stands_still(self._process.pid):
            assert time.monotonic() < deadline, "RabbitMQ does not stand still"
            time.sleep(0.001)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """As a power cut."""
        process, self._process = self._process, None
        if process is None:
            return
        self._let_go()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(10)

    def terminate(self) -> None:
        """As an operator."""
        process, self._process = self._process, None
        assert process is not None
        self._let_go()
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(START_S)

    def _let_go(self) -> None:
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            lifeline.close()

    def control(self, *words: str) -> None:
        """``rabbitmqctl`` of this node."""
        subprocess.run(
            [CTL, "-n", f"kvrep-{self.port}@localhost", *words],
            env=self._environment,
            cwd=self._folder,
            check=True,
            capture_output=True,
            timeout=CTL_S,
        )

    def stop(self) -> None:
        self.kill()
        self._end_epmd()

    def _end_epmd(self) -> None:
        lifeline, self._epmd_lifeline = self._epmd_lifeline, None
        if lifeline is not None:
            lifeline.close()
        epmd, self._epmd = self._epmd, None
        if epmd is not None:
            epmd.kill()
            epmd.wait(10)


def _stands_still(group: int) -> bool:
    """Whether no thread of a process group can run."""
    for stat in Path("/proc").glob("[0-9]*/task/*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(its_group) == group and state not in "TZX":
            return False
    return True


def _answers(port: int) -> bool:
    """Whether an AMQP server greets."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as s:
            s.settimeout(5.0)
            s.sendall(b"AMQP\x00\x00\x09\x01")
            return s.recv(1) == b"\x01"
    except OSError:
        return False


@pytest.fixture(scope="session")
def shared_rabbitmq() -> Iterator[RabbitServer]:
    """One RabbitMQ for all tests; each takes topics of its own and leaves it running."""
    need_rabbitmq()
    with tempfile.TemporaryDirectory(prefix="kvrep-rabbitmq-") as folder:
        server = RabbitServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()
