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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any, TextIO

from kvrep.cli.checks import Report
from kvrep.cli.console import Live, bar, duration, key_values, megabytes, number, style, table
from kvrep.cli.demo.checking import compare_with_files, equal_digests, resolve, wait_writable
from kvrep.cli.demo.lag import Lag
from kvrep.cli.demo.loading import Batch, Load, batches_of, find_files
from kvrep.cli.demo.nodes import DemoFailed, Node, uninterrupted
from kvrep.cli.exits import Exit
from kvrep.cli.target import RemoteTarget

__all__ = ["Demo", "tell"]

DISK_FACTOR = 8
"""Three nodes keep a log and LMDB each, and log files are allocated ahead."""
BATCHES_MIN = 16
"""So that there is a middle of the load to kill the primary in."""
ALLOCATED_BYTES = 3 * 2 * (64 << 20)


class Demo:
    """One run: a primary ``a``, the followers ``b`` and ``c``, and everything measured on the way."""

    def __init__(self, args: argparse.Namespace, folder: Path, out: TextIO) -> None:
        self.args = args
        self.files = find_files(Path(args.data) if args.data else None, args.files)
        self.size = sum(file.size for file in self.files)
        self.batch_files = max(1, min(args.batch_files, len(self.files) // BATCHES_MIN))
        self.batches = deque(batches_of(self.files, self.batch_files))
        self.primary = Node("a", folder, "--acks", str(args.acks))
        self.followers = [Node("b", folder), Node("c", folder)]
        self.loads: list[Load] = []
        self.written: list[Batch] = []
        """Batches that are known to be committed: acknowledged, or found after the crash."""
        self.more_files = 0
        self.unknown = {"writes": 0, "committed": 0, "absent": 0}
        self.killed_s = 0.0
        self.recovery_s = 0.0
        self.load_s = 0.0
        self.total_s = 0.0
        self.report = Report("kvrep demo")
        self.lag = Lag()
        self.step = "starting"
        self.began_s = time.monotonic()
        self.screen = Live(self._block, self._line, stream=out)
        # Taken once, by whoever kills the primary: a writer or the clock.
        self._killer = threading.Lock()

    def play(self) -> bool:
        """The story; whether everything was true."""
        try:
            with self.screen:
                self.start_nodes()
                self.load_and_kill_primary()
                self.restart_primary()
                self.load_the_rest()
                self.verify()
        except BaseException:
            for node in self.nodes:
                node.kill()  # nobody waits for the end of what broke off
            raise
        finally:
            with uninterrupted():
                self.end()
        self.total_s = time.monotonic() - self.began_s
        return self.report.ok

    # -- the acts ----------------------------------------------------------------------------------

    def start_nodes(self) -> None:
        self.primary.start()
        for follower in self.followers:
            follower.launch("--follow", self.primary.address)
        for follower in self.followers:
            follower.wait_ready()
        wait_writable(self.primary.address, self.screen.tick)
        self.lag.start(self.primary.address)
        where = ", ".join(f"{node.name} {node.address}" for node in self.nodes)
        self.say(f"three processes, a the primary: {where}")
        self.say(f"acks={self.args.acks}: a write returns when on the disks of {_disks(self.args.acks)}")

    def load_and_kill_primary(self) -> None:
        """Load until half of the files are acknowledged; the writer that sees it kills the primary."""
        self.step = "loading"
        self.say(f"loading {number(len(self.files))} files, {megabytes(self.size)}")

        def kill_at_half(load: Load) -> None:
            if load.files >= len(self.files) / 2:
                self._kill_primary(load)

        load = self._load(kill_at_half, at_limit=self._kill_primary)
        self.lag.stop()
        self.primary.reap()
        self.say(f"{self._red('primary killed')} (SIGKILL) after {number(load.files)} acknowledged files")
        left = f"{len(load.unknown)} writes were under way, {len(load.waiting)} still to come"
        self.check("killed in mid-load", bool(load.waiting or load.unknown), left)

    def restart_primary(self) -> None:
        """Every acknowledged write must be there; each unknown one wholly there, or wholly absent."""
        self.step = "restarting the primary"
        before = self.loads[0]
        self.primary.start()
        wait_writable(self.primary.address, self.screen.tick)
        self.lag.start(self.primary.address)
        with RemoteTarget(self.primary.address, timeout_s=30.0) as primary:
            next_batch = self.batches.popleft() if self.batches else before.acknowledged[-1]
            position = primary.write(next_batch.ops())
            self.recovery_s = time.monotonic() - self.killed_s
            self.say(f"primary is back; first acknowledged write {duration(self.recovery_s)} after the kill")
            self.written += before.acknowledged
            self._count([next_batch])

            expected = {file.key: file.path for batch in before.acknowledged for file in batch.files}
            found, wrong = compare_with_files(primary, expected, exact=False, tick=self.screen.tick)
            detail = f"{number(found)} of {number(len(expected))} acknowledged files are there"
            self.check("acknowledged writes survived", not wrong, "; ".join([detail, *wrong[:3]]))

            self._settle(primary, before, position)

    def load_the_rest(self) -> None:
        """Go on where the acknowledged writes ended."""
        self.step = "loading the rest"
        rest = self._load(at_limit=Load.ask_to_end)
        self.written += rest.acknowledged
        if rest.unknown:  # nobody was killed, but a slow disk may have cost a write its answer
            with RemoteTarget(self.primary.address, timeout_s=30.0) as primary:
                self._settle(primary, rest, primary.write(rest.unknown[0].batch.ops()))
        if self.batches:
            self.report.notes.append(
                f"the time limit of {self.args.seconds:g} s left {len(self.batches)} writes out"
            )
        written = {file.key for batch in self.written for file in batch.files}
        left = {file.key for batch in self.batches for file in batch.files} - written
        self.files = [file for file in self.files if file.key not in left]
        missing = len({file.key for file in self.files} - written)
        self.check("all files were written", not missing, f"{number(len(written))} files")

    def verify(self) -> None:
        """Compare the three nodes with each other, and each of them with the files."""
        self.step = "verifying"
        self.say("verifying: digests on all nodes, then every pair of every node against its file")
        files = {file.key: file.path for file in self.files}
        with ExitStack() as stack:
            nodes = {n.name: stack.enter_context(RemoteTarget(n.address, timeout_s=30.0)) for n in self.nodes}
            self.check("digests", *equal_digests(nodes, self.screen.tick))
            for name, node in nodes.items():
                self.step = f"verifying: reading node {name}"
                equal, wrong = compare_with_files(node, files, exact=True, tick=self.screen.tick)
                detail = f"{number(equal)} of {number(len(files))} files are equal, byte for byte"
                self.check(f"node {name} against the files", not wrong, "; ".join([detail, *wrong[:3]]))

    def end(self) -> None:
        """Leave no process and no thread behind, however the story ended."""
        for load in self.loads:
            load.ask_to_end()
        # The primary first: writes that wait for an ack still get it.
        self.primary.ask_to_stop()
        self.primary.reap()
        for follower in self.followers:
            follower.ask_to_stop()
        for follower in self.followers:
            follower.reap()
        for load in self.loads:
            load.join()
        self.lag.stop()

    # -- steps -------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Node]:
        return [self.primary, *self.followers]

    def _load(
        self, on_acknowledged: Callable[[Load], None] | None = None, *, at_limit: Callable[[Load], None]
    ) -> Load:
        """Write what waits until the queue is empty or the primary is gone, showing progress meanwhile."""
        load = Load(self.batches, on_acknowledged)
        self.loads.append(load)
        began_s = time.monotonic()
        load.start(self.primary.address, self.args.connections)
        while load.running:
            if time.monotonic() - began_s > self.args.seconds / 2:
                at_limit(load)
            self.screen.tick()
            time.sleep(0.02)
        self.load_s += time.monotonic() - began_s
        if load.problem is not None:
            raise load.problem
        return load

    def _kill_primary(self, load: Load) -> None:
        """In the middle of ``load``, once."""
        del load
        if self._killer.acquire(blocking=False):
            self.killed_s = time.monotonic()
            self.primary.kill()

    def _settle(self, primary: RemoteTarget, load: Load, position: Any) -> None:
        """Find out what became of the writes without an answer; what is absent is written again."""
        resolved = resolve(primary, load.unknown, position, self.screen.tick)
        self._count(resolved.committed)
        self.batches.extend(resolved.absent + resolved.torn)
        self.unknown["writes"] += len(load.unknown)
        self.unknown["committed"] += len(resolved.committed)
        self.unknown["absent"] += len(resolved.absent)
        self.check(
            "no write was torn",
            not resolved.torn,
            f"of {len(load.unknown)} unknown outcomes {len(resolved.committed)} committed,"
            f" {len(resolved.absent)} absent (written again), {len(resolved.torn)} in part",
        )

    # -- what is shown -----------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self.screen.say(f"{time.monotonic() - self.began_s:5.1f} s  {text}")

    def check(self, name: str, ok: bool, detail: str) -> None:
        self.report.add(name, ok, detail)
        mark = style("ok", "green", stream=self.screen.stream) if ok else self._red("FAILED")
        self.say(f"{mark}  {name}: {detail}")

    def _red(self, text: str) -> str:
        return style(text, "red", "bold", stream=self.screen.stream)

    def _count(self, batches: list[Batch]) -> None:
        """Note batches that are committed, but in no load's count."""
        self.written += batches
        self.more_files += sum(len(batch.files) for batch in batches)

    def _progress(self) -> tuple[float, str]:
        """How much is written: as a share, and in words."""
        files = self.more_files + sum(load.files for load in self.loads)
        size = sum(load.size for load in self.loads)
        return files / len(
            self.files
        ), f"{number(files)} of {number(len(self.files))} files, {megabytes(size)}"

    def _block(self) -> list[str]:
        """What is redrawn on a terminal."""
        share, progress = self._progress()
        return [
            "",
            f"{self.step}, {time.monotonic() - self.began_s:.0f} s",
            f"{bar(share)} {share:4.0%}  {progress}",
            *table(Lag.HEADERS, self.lag.rows(), right=Lag.RIGHT),
        ]

    def _line(self) -> str:
        """What is printed now and then elsewhere."""
        _, progress = self._progress()
        return f"{time.monotonic() - self.began_s:5.1f} s  {self.step}: {progress}; {self.lag.line()}"

    def result(self) -> dict[str, Any]:
        """What was measured and what was checked; times are seconds."""
        latencies = [s for load in self.loads for s in load.latencies_s]
        percentiles = quantiles(latencies, n=100) if len(latencies) > 1 else [0.0] * 99
        size = sum(load.size for load in self.loads)
        return {
            "ok": self.report.ok,
            "acks": self.args.acks,
            "files": len(self.files),
            "bytes": sum(file.size for file in self.files),
            "load_s": self.load_s,
            "bytes_per_s": size / self.load_s if self.load_s else 0.0,
            "writes": len(latencies),
            "put_p50_s": percentiles[49],
            "put_p99_s": percentiles[98],
            "kill_to_first_write_s": self.recovery_s,
            "unknown_outcomes": self.unknown,
            "worst_lag_records": self.lag.worst_records,
            "worst_lag_bytes": self.lag.worst_bytes,
            "worst_lag_s": self.lag.worst_s,
            "total_s": self.total_s,
            "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in self.report.checks],
            "notes": self.report.notes,
        }

    def final_block(self) -> list[str]:
        """The result for people."""
        r = self.result()
        writes = f"{number(r['writes'])} writes of up to {self.batch_files} files"
        lag = f"{number(r['worst_lag_records'])} records, {megabytes(r['worst_lag_bytes'])}"
        unknown = "{writes} writes had no answer: {committed} committed, {absent} absent".format(
            **self.unknown
        )
        passed = f"{sum(c.ok for c in self.report.checks)} of {len(self.report.checks)} checks passed"
        verdict = (
            style("everything was true", "green", "bold") if r["ok"] else self._red("NOT everything was true")
        )
        facts = [
            ("loaded", f"{number(r['files'])} files, {megabytes(r['bytes'])}"),
            ("rate", f"{megabytes(r['bytes_per_s'])}/s, each write on the disks of {_disks(r['acks'])}"),
            ("put latency", f"p50 {duration(r['put_p50_s'])}, p99 {duration(r['put_p99_s'])} ({writes})"),
            ("crash", f"{duration(r['kill_to_first_write_s'])} from SIGKILL to the next acknowledged write"),
            ("unknown", unknown),
            ("worst lag", f"{lag}, {duration(r['worst_lag_s'])}"),
            ("verified", passed),
            *(("note", note) for note in r["notes"]),
            ("time", duration(r["total_s"])),
            ("result", verdict),
        ]
        return ["", *key_values(facts)]


def _disks(acks: int | str) -> str:
    """What an ack rule means with two followers."""
    followers = {"majority": 1, "all": 2}.get(str(acks), acks)
    names = ("the primary", "the primary and one follower", "all three nodes")
    return names[int(followers)]


# -- around it -------------------------------------------------------------------------------------


def tell(args: argparse.Namespace) -> int:
    """Play the demo in a temporary folder, print the result, and leave nothing behind."""
    with ExitStack() as stack:
        stack.enter_context(_signals_interrupt())
        folder = stack.enter_context(_folder(args))
        out = stack.enter_context(Path(os.devnull).open("w")) if args.json else sys.stdout
        demo = Demo(args, folder, out)
        _check_possible(demo, folder)
        ok = demo.play()
        print(json.dumps(demo.result()) if args.json else "\n".join(demo.final_block()))
        if args.keep and not args.json:
            print(f"\nthe stores and logs are in {folder}; look: kvrep status {demo.primary.path}")
    return Exit.OK if ok else Exit.DAMAGED


def _check_possible(demo: Demo, folder: Path) -> None:
    if len(demo.files) < BATCHES_MIN:
        raise DemoFailed(
            f"there are {len(demo.files)} files to load, it takes {BATCHES_MIN} at least",
            hint="name another directory with --data, or raise --files",
        )
    needed = DISK_FACTOR * demo.size + ALLOCATED_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DemoFailed(
            f"{folder.parent} has {megabytes(free)} free, the demo needs {megabytes(needed)}",
            hint="name another place with --folder, or load less with --files",
        )


@contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    folder = None
    try:
        with uninterrupted():
            folder = Path(tempfile.mkdtemp(prefix="kvrep-demo-", dir=args.folder))
        yield folder
    finally:
        if folder is not None and not args.keep:
            with uninterrupted():
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does: in order."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
