"""A store in a process of its own, driven by lines of Python on its standard input.

Run as ``python replication_node.py PATH OPTIONS``. Every line is a Python literal, a string of code; what it
evaluates to, or the error it raises, comes back pickled, one line each.
"""

from __future__ import annotations

import ast
import base64
import itertools
import os
import pickle
import sys
import threading
import time
from typing import Any

import kvrep


class Load:
    """Threads that write until stopped; what was acknowledged goes to a file, one line at once."""

    def __init__(self, db: kvrep.Store, path: str, threads: int, value_bytes: int, name: str) -> None:
        self._db = db
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._stop = threading.Event()
        self._value = b"x" * value_bytes
        self.name = name
        self.acked = itertools.count()
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        for i in itertools.count():
            if self._stop.is_set():
                return
            key = f"{self.name}-{number}-{i:08d}"
            try:
                position = self._db.put(key.encode(), key.encode() + self._value)
            except kvrep.UnknownOutcome as error:
                self.errors.append(type(error).__name__)
                continue
            except kvrep.RefusedError as error:
                self.errors.append(type(error).__name__)
                self._stop.wait(0.01)
                continue
            os.write(self._file, f"{key} {position}\n".encode())

    def stop(self) -> list[str]:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        os.close(self._file)
        return self.errors


def answer(code: str, names: dict[str, Any]) -> Any:
    try:
        try:
            compiled = compile(code, "<told>", "eval")
        except SyntaxError:
            exec(code, names)
            return ("ok", None)
        return ("ok", eval(compiled, names))
    except BaseException as error:
        return ("error", error)


def main() -> None:
    options = ast.literal_eval(sys.argv[2])
    try:
        db = kvrep.open(sys.argv[1], **options)
    except kvrep.Error as error:
        tell(("error", error))
        return
    tell(("ok", db.address))
    names = {"db": db, "kvrep": kvrep, "Load": Load, "time": time, "os": os, "threading": threading}
    for line in sys.stdin:
        tell(answer(ast.literal_eval(line), names))
    db.close()


def tell(value: Any) -> None:
    sys.stdout.write(base64.b64encode(pickle.dumps(value)).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
