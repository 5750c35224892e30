"""The demo from beginning to end. Read :meth:`Demo.play` first."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

from kvrep.cli.console import Live, bar, duration, key_values, megabytes, number, style, table
from kvrep.cli.demo.checking import Check, compare_with_files, equal_digests, resolve, wait_writable
from kvrep.cli.demo.loading import Batch, Load, batches_of, find_files
from kvrep.cli.demo.nodes import DemoFailed, Node
from kvrep.cli.exits import Exit
from kvrep.cli.target import RemoteTarget
from kvrep.errors import Error

__all__ = ["Demo", "tell"]

DISK_FACTOR = 8
"""Three nodes keep log and LMDB each, and files are allocated ahead."""


class Demo:
    """One run: a primary ``a``, the followers ``b`` and ``c``, and everything measured on the way."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.files = find_files(Path(args.data) if args.data else None, args.files)
        self.size = sum(file.size for file in self.files)
        self.batches = deque(batches_of(self.files, args.batch_files))
        self.primary = Node("a", folder, "--acks", str(args.acks))
        self.followers = [Node(name, folder) for name in ("b", "c")]
        self.loads: list[Load] = []
        self.written: list[Batch] = []
        """Batches that are known to be committed: acknowledged, or found after the crash."""
        self.checks: list[Check] = []
        self.measured: dict[str, Any] = {}
        self.killed_s = 0.0
        self.load_s = 0.0
        self.began_s = time.monotonic()
        self.lag = Lag(self.primary)
        self.step = "starting"
        quiet = Path(os.devnull).open("w") if args.json else None  # noqa: SIM115 - closed by play()
        self.screen = Live(self._screen, self._line, stream=quiet or sys.stdout)
        self._quiet = quiet

    # -- the story ---------------------------------------------------------------------------------

    def play(self) -> bool:
        """All of it; whether everything was true."""
        try:
            with self.screen, self.lag:
                self.start_nodes()
                self.load_and_kill()
                self.restart_and_go_on()
                self.verify()
                self.total_s = time.monotonic() - self.began_s
        finally:
            self._end()
        return all(check.ok for check in self.checks)

    def start_nodes(self) -> None:
        if not self.files:
            raise DemoFailed("there are no files to load")
        self.primary.launch()
        self.primary.wait_ready()
        for follower in self.followers:
            follower._flags += ("--follow", self.primary.address)
            follower.launch()
        for follower in self.followers:
            follower.wait_ready()
        wait_writable(self.primary.address, self.screen.tick)
        self.lag.start()
        where = ", ".join(f"{node.name} {node.address}" for node in self.nodes)
        self.say(f"three nodes: {where}")
        self.say(f"a write returns with acks={self.args.acks}: {_rule(self.args.acks)}")

    def load_and_kill(self) -> None:
        """Load until half of the bytes are acknowledged; the writer that sees it kills the primary."""
        self.step = "loading"
        self.say(
            f"loading {number(len(self.files))} files, {megabytes(self.size)}, over {self.args.connections} connections"
        )

        def kill_at_half(load: Load) -> None:
            if not self.killed_s and load.size >= self.size / 2:
                self.killed_s = time.monotonic()
                self.primary.kill()

        began_s = time.monotonic()
        load = self._load(kill_at_half)
        self.load_s += time.monotonic() - began_s
        self.lag.stop()
        self.primary.reap()
        self.say(
            style("primary killed", "red", stream=self.screen.stream)
            + f" (SIGKILL) after {number(load.files)} acknowledged files;"
            f" {len(load.unknown)} writes were under way, {len(load.waiting)} had not begun"
        )
        self.check(
            "killed in mid-load", bool(load.waiting), f"{len(load.waiting)} batches were still to come"
        )

    def restart_and_go_on(self) -> None:
        """Start the primary again, look for every acknowledged write, settle the unknown ones, and load the rest."""
        self.step = "restarting the primary"
        before = self.loads[-1]
        self.primary.launch()
        self.primary.wait_ready()
        wait_writable(self.primary.address, self.screen.tick)
        self.lag.start()
        with RemoteTarget(self.primary.address, timeout_s=30.0) as primary:
            first = self.batches.popleft() if self.batches else before.acknowledged[-1]
            position = primary.write(first.ops())
            self.measured["recovery_s"] = time.monotonic() - self.killed_s
            self.written.append(first)
            self.say(
                f"primary is back on its port; first acknowledged write {duration(self.measured['recovery_s'])} after the kill"
            )
            self._check_acknowledged(primary, before)
            resolved = resolve(primary, before.unknown, position, self.screen.tick)
        self.written += before.acknowledged + resolved.committed
        self.batches.extend(resolved.absent + resolved.torn)
        self.measured["unknown_writes"] = len(before.unknown)
        self.measured["unknown_committed"] = len(resolved.committed)
        self.measured["unknown_absent"] = len(resolved.absent)
        self.check(
            "writes of unknown outcome",
            not resolved.torn,
            f"{len(before.unknown)} writes: {len(resolved.committed)} were committed,"
            f" {len(resolved.absent)} were not and are written again, {len(resolved.torn)} in part",
        )
        self.step = "loading the rest"
        began_s = time.monotonic()
        rest = self._load()
        self.load_s += time.monotonic() - began_s
        self._settle(rest)

    def verify(self) -> None:
        """Compare all three nodes with each other and with the files."""
        self.step = "verifying"
        self.say("verifying: digests on all nodes, then every pair of every node against its file")
        files = {file.key: file.path for file in self.files}
        with ExitStack() as stack:
            nodes = {
                node.name: stack.enter_context(RemoteTarget(node.address, timeout_s=30.0))
                for node in self.nodes
            }
            self.add(equal_digests(nodes, self.screen.tick))
            for name, node in nodes.items():
                equal, wrong = compare_with_files(node, files, exact=True, tick=self.screen.tick)
                detail = (
                    "; ".join(wrong[:3])
                    or f"{number(equal)} of {number(len(files))} files equal, byte for byte"
                )
                self.check(f"node {name} against the files", not wrong, detail)
        self.lag.stop()

    # -- steps -------------------------------------------------------------------------------------

    def _load(self, on_acknowledged: Any = lambda load: None) -> Load:
        """Write what waits until the queue is empty or the primary is gone, showing progress meanwhile."""
        load = Load(self.batches, on_acknowledged)
        self.loads.append(load)
        load.start(self.primary.address, self.args.connections)
        try:
            while load.running:
                self.screen.tick()
                time.sleep(0.02)
        finally:
            load.stop()
        if load.problem is not None:
            raise load.problem
        return load

    def _check_acknowledged(self, primary: RemoteTarget, before: Load) -> None:
        files = {file.key: file.path for batch in before.acknowledged for file in batch.files}
        found, wrong = compare_with_files(primary, files, exact=False, tick=self.screen.tick)
        detail = f"{number(found)} of {number(len(files))} acknowledged files are there after the crash"
        self.check("acknowledged writes survived", not wrong, "; ".join([detail, *wrong[:3]]))

    def _settle(self, load: Load) -> None:
        """The second half is not interrupted; a slow follower may still have left a write unknown."""
        self.written += load.acknowledged
        if load.unknown:
            with RemoteTarget(self.primary.address, timeout_s=30.0) as primary:
                position = primary.write(load.unknown[0].batch.ops())
                resolved = resolve(primary, load.unknown, position, self.screen.tick)
            self.written += resolved.committed
            self.batches.extend(resolved.absent + resolved.torn)
            self.measured["unknown_writes"] += len(load.unknown)
            self.measured["unknown_committed"] += len(resolved.committed)
            self.measured["unknown_absent"] += len(resolved.absent)
        files = {file.key for batch in self.written for file in batch.files}
        self.check("everything was written", len(files) == len(self.files),
                   f"{number(len(files))} of {number(len(self.files))} files")  # fmt: skip

    @property
    def nodes(self) -> list[Node]:
        return [self.primary, *self.followers]

    def _end(self) -> None:
        for load in self.loads:
            load.stop()
        for node in self.nodes:
            node.ask_to_stop()
        for node in self.nodes:
            node.reap()
        if self._quiet is not None:
            self._quiet.close()

    # -- what is shown -----------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self.screen.say(f"{time.monotonic() - self.began_s:5.1f} s  {text}")

    def add(self, check: Check) -> None:
        self.checks.append(check)
        stream = self.screen.stream
        mark = (
            style("ok", "green", stream=stream) if check.ok else style("FAILED", "red", "bold", stream=stream)
        )
        self.say(f"{mark}: {check.name}: {check.detail}")

    def check(self, name: str, ok: bool, detail: str) -> None:
        self.add(Check(name, ok, detail))

    @property
    def _done(self) -> tuple[int, int]:
        """(files, bytes) acknowledged so far."""
        return sum(load.files for load in self.loads), sum(load.size for load in self.loads)

    def _screen(self) -> list[str]:
        files, size = self._done
        share = size / self.size if self.size else 1.0
        return [
            "",
            f"{self.step}  {time.monotonic() - self.began_s:.0f} s",
            f"{bar(share)} {share:4.0%}  {number(files)} of {number(len(self.files))} files  {megabytes(size)}",
            *table(("node", "role", "state", "lag", "bytes", "seconds"), self.lag.rows(), right=(3, 4, 5)),
        ]

    def _line(self) -> str:
        files, size = self._done
        lags = "; ".join(f"{row[0]} {row[2]}, lag {row[3]} records" for row in self.lag.rows()[1:])
        return (
            f"{time.monotonic() - self.began_s:5.1f} s  {self.step}: {number(files)} of {number(len(self.files))}"
            f" files, {megabytes(size)}; {lags}"
        )

    def result(self) -> dict[str, Any]:
        """What was measured, and what was checked."""
        latencies = sorted(s for load in self.loads for s in load.latencies_s)
        cuts = quantiles(latencies, n=100) if len(latencies) > 1 else [0.0] * 99
        return {
            "ok": all(check.ok for check in self.checks),
            "acks": self.args.acks,
            "files": len(self.files),
            "bytes": self.size,
            "load_s": self.load_s,
            "bytes_per_s": sum(load.size for load in self.loads) / self.load_s if self.load_s else 0.0,
            "writes": len(latencies),
            "put_p50_s": cuts[49],
            "put_p99_s": cuts[98],
            **self.measured,
            "worst_lag_records": self.lag.worst_records,
            "worst_lag_bytes": self.lag.worst_bytes,
            "worst_lag_s": self.lag.worst_s,
            "total_s": self.total_s,
            "checks": [vars(check) for check in self.checks],
        }

    def report(self) -> list[str]:
        """The final block."""
        r = self.result()
        verdict = (
            style("everything was true", "green", "bold")
            if r["ok"]
            else style("NOT everything was true", "red", "bold")
        )
        facts = [
            ("data", f"{number(r['files'])} files, {megabytes(r['bytes'])}"),
            ("load", f"{megabytes(r['bytes_per_s'])}/s, on the disks of {_rule(r['acks'])}"),
            ("put latency", f"p50 {duration(r['put_p50_s'])}, p99 {duration(r['put_p99_s'])}"
                            f" ({number(r['writes'])} writes of up to {self.args.batch_files} files)"),
            ("crash", f"first acknowledged write {duration(r['recovery_s'])} after the kill, restart included"),
            ("unknown outcomes", f"{r['unknown_writes']}: {r['unknown_committed']} were committed,"
                                 f" {r['unknown_absent']} were not"),
            ("worst lag", f"{number(r['worst_lag_records'])} records, {megabytes(r['worst_lag_bytes'])},"
                          f" {duration(r['worst_lag_s'])}"),
            ("checks", f"{sum(c.ok for c in self.checks)} of {len(self.checks)} passed"),
            ("time", duration(r["total_s"])),
            ("result", verdict),
        ]  # fmt: skip
        return ["", *key_values(facts)]


def _rule(acks: int | str) -> str:
    """What an ack rule means with two followers."""
    followers = {"majority": 1, "all": 2}.get(str(acks), acks)
    return {0: "the primary alone", 1: "the primary and one follower", 2: "all three nodes"}.get(
        int(followers), f"the primary and {followers} followers"
    )


class Lag:
    """Asks the primary how far its followers are behind, ten times a second, on a thread of its own."""

    def __init__(self, primary: Node) -> None:
        self._primary = primary
        self._status: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.worst_records = 0
        self.worst_bytes = 0
        self.worst_s = 0.0

    def __enter__(self) -> Lag:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        self.stop()
        self._stop.clear()
        self._thread = threading.Thread(target=self._ask, args=(self._primary.address,), name="lag")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._status = None

    def _ask(self, address: str) -> None:
        with RemoteTarget(address, timeout_s=2.0) as primary:
            while not self._stop.wait(0.1):
                try:
                    self._status = primary.status()
                except Error:
                    self._status = None
                    continue
                for follower in self._status["followers"]:
                    self.worst_records = max(self.worst_records, follower["lag_records"])
                    self.worst_bytes = max(self.worst_bytes, follower["lag_bytes"])
                    self.worst_s = max(self.worst_s, follower["lag_s"])

    def rows(self) -> list[tuple[str, ...]]:
        """One row a node, for a table."""
        status = self._status
        if status is None:
            return [
                ("a", "primary", "no answer", "", "", ""),
                *((n, "follower", "-", "", "", "") for n in "bc"),
            ]
        first = ("a", "primary", "writable" if not status["not_writable"] else "not writable", "", "", "")
        return [
            first,
            *(
                (
                    f["name"],
                    "follower",
                    f["state"],
                    number(f["lag_records"]),
                    megabytes(f["lag_bytes"]),
                    f"{f['lag_s']:.3f}",
                )
                for f in status["followers"]
            ),
        ]


# -- around it -------------------------------------------------------------------------------------


def tell(args: argparse.Namespace) -> int:
    """Play the demo in a temporary folder, print the result, and leave nothing behind."""
    with _ended_in_order(), _folder(args) as folder:
        demo = Demo(args, folder)
        _check_room(demo, folder)
        ok = demo.play()
        print(json.dumps(demo.result()) if args.json else "\n".join(demo.report()))
        if args.keep and not args.json:
            print(f"\nstores and logs are in {folder}; try: kvrep status {demo.primary.path}")
    return Exit.OK if ok else Exit.DAMAGED


@contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="kvrep-demo-", dir=args.folder))
    try:
        yield folder
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does: with its processes, and tidied up."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def _check_room(demo: Demo, folder: Path) -> None:
    needed = DISK_FACTOR * demo.size + (700 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DemoFailed(
            f"{folder} has {megabytes(free)} free, the demo needs {megabytes(needed)}",
            hint="name another place with --folder, or load less with --files",
        )
