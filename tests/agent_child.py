"""A process that runs an agent until it is killed: ``python -m tests.agent_child SOURCE SECONDARY``.

It prints "ready" once it has the secondary, and "committed" after each commit there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from kvrep.sinks.addresses import sink_at
from kvrep.sinks.agent import Agent


def telling(step: Callable[..., Any], said: str) -> Callable[..., Any]:
    """``step``, which says so on standard output when it is done."""

    def told(*arguments: Any) -> Any:
        answer = step(*arguments)
        print(said, flush=True)
        return answer

    return told


def main(source: str, secondary: str) -> None:
    sink: Any = sink_at(secondary)
    sink.open, sink.commit = telling(sink.open, "ready"), telling(sink.commit, "committed")
    Agent(source, sink, batch_changes=20).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
