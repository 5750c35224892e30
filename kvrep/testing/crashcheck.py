"""Checks crash images in worker processes, so that one that kills its process is just another problem."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kvrep.testing.crash import Image

__all__ = ["Check", "Problem", "check_images"]

START_S = 60.0


@dataclass(frozen=True, slots=True)
class Problem:
    """An image that broke a promise."""

    image: Image
    message: str

    def __str__(self) -> str:
        return f"{self.image}\n    {self.message}"


Check = Callable[[Path, Image], str | None]
"""(folder that holds the image, image) -> what is wrong. Pickled to the workers, so a function or an object
of a module that they can import."""


def check_images(
    made: Iterable[Image],
    check: Check,
    *,
    folder: Path,
    workers: int = 2,
    timeout_s: float = 30.0,
    problems_max: int = 20,
) -> tuple[int, list[Problem]]:
    """Give every image to ``check`` in worker processes; returns (images checked, problems).

    A check that raises, kills its process or takes longer than ``timeout_s`` is a problem of its image.
    Stops after ``problems_max`` problems. ``folder`` is where images are made, one at a time and worker.
    """
    waiting: queue.Queue[Image | None] = queue.Queue(maxsize=2 * workers)
    problems: list[Problem] = []
    counts = [0] * workers
    errors: list[BaseException] = []

    def work(number: int) -> None:
        worker = _Worker(folder / f"worker-{number}", check, timeout_s)
        try:
            while (image := waiting.get()) is not None:
                if len(problems) >= problems_max or errors:
                    continue  # drain
                message = worker.check(image)
                counts[number] += 1
                if message is not None:
                    problems.append(Problem(image, message))
        except BaseException as error:
            errors.append(error)
            while waiting.get() is not None:
                pass
        finally:
            worker.close()

    threads = [
        threading.Thread(target=work, args=(n,), name=f"kvrep-crash-{n}", daemon=True) for n in range(workers)
    ]
    for thread in threads:
        thread.start()
    try:
        for image in made:
            if len(problems) >= problems_max or errors:
                break
            waiting.put(image)
    finally:
        for _ in threads:
            waiting.put(None)
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return sum(counts), sorted(problems, key=lambda p: p.image.number)


class _Worker:
    """A process that makes and checks images; a new one takes its place when it dies."""

    def __init__(self, folder: Path, check: Check, timeout_s: float) -> None:
        self._folder = folder
        self._check = check
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        self._said = folder.with_suffix(".stderr")
        self._stderr = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def check(self, image: Image) -> str | None:
        try:
            if self._process is None:
                self._start()
            return self._ask(image, self._timeout_s)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._end()
            text = self._said.read_bytes()[-2000:].decode(errors="replace")
            return f"the process that opened the image ended with {code}: {text}"

    def _start(self) -> None:
        os.truncate(self._stderr, 0)
        paths = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from kvrep.testing.crashcheck import _work; _work()", str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self._ask(self._check, START_S)

    def _ask(self, question: object, timeout_s: float) -> str | None:
        """Send something to the process and wait for its answer; ``EOFError`` if it ends, or was made to."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(timeout_s, process.kill)
        timer.name = "kvrep-crash-timer"
        timer.start()
        try:
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            answer: str | None = pickle.load(process.stdout)
            return answer
        finally:
            timer.cancel()
            timer.join()

    def _end(self) -> int:
        """Close the pipes, which ends the process unless it has ended; returns its exit code."""
        process, self._process = self._process, None
        assert process is not None
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        return process.wait()

    def close(self) -> None:
        if self._process is not None:
            self._end()
        os.close(self._stderr)
        shutil.rmtree(self._folder, ignore_errors=True)


def _work() -> None:
    """A worker: the check, then images, from standard input; answers on standard output."""
    logging.disable(logging.CRITICAL)
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    check: Check = pickle.load(sys.stdin.buffer)
    pickle.dump(None, answers)
    answers.flush()
    while True:
        try:
            image: Image = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        place = folder / str(image.number)
        place.mkdir()
        try:
            image.write(place)
            answer = check(place, image)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        shutil.rmtree(place, ignore_errors=True)
        pickle.dump(answer, answers)
        answers.flush()
