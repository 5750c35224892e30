"""A process that runs an agent until it is killed: ``python -m tests.agent_child SOURCE SECONDARY``."""

from __future__ import annotations

import sys
import time

from kvrep.sinks.agent import Agent


def main(source: str, secondary: str) -> None:
    with Agent(source, secondary, batch_changes=20) as agent:
        print("ready", flush=True)
        while agent.status().state not in ("failed", "closed"):
            time.sleep(0.05)
        agent.raise_error()


if __name__ == "__main__":
    main(*sys.argv[1:])
