"""An agent that kills itself at a certain point: ``python -m tests.warehouse_child SOURCE FOLDER POINT TIMES``.

POINT is TABLE:MOMENT, TABLE one of history, current, staged and dead_letters, MOMENT one of: ``before`` its commit
begins, ``within``, when all rows are written and not committed, and ``after``. TIMES: how often it passes first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from kvrep.codecs import JSON
from kvrep.sinks.agent import Agent
from kvrep.sinks.delta import Delta
from kvrep.sinks.tables import Table
from kvrep.sinks.warehouse import WarehouseSink
from tests.warehouse_kit import EAGER


def main(source: str, folder: str, point: str, times: str) -> None:
    which, moment = point.split(":")
    left = int(times)
    write = Delta.write

    def die() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(batches: Any) -> Iterator[Any]:
        yield from batches
        die()

    def patched(table: Delta, batches: Any, **options: Any) -> None:
        here = f"/{which}" in table.uri.removeprefix(folder)
        if here and moment == "before":
            die()
        write(table, watched(batches) if here and moment == "within" else batches, **options)
        if here and moment == "after":
            die()

    Delta.write = patched  # type: ignore[method-assign]
    sink = WarehouseSink(f"delta:{folder}{EAGER}", tables={"docs": Table(JSON)})
    sink.batch_changes = 50
    with Agent(source, sink, batch_changes=5) as agent:
        print("ready", flush=True)
        while agent.status().state not in ("failed", "closed"):
            time.sleep(0.02)
        agent.raise_error()


if __name__ == "__main__":
    main(*sys.argv[1:])
