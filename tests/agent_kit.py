"""What the tests of agents share: stores with content, agents that end, and the comparison of copies."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

import kvrep
from kvrep.sinks.agent import Agent
from kvrep.sinks.feed import FeedSource
from kvrep.sinks.interface import Sink
from kvrep.sinks.running import AgentState
from kvrep.sinks.upstream import Local

WAIT_S = 30.0


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = WAIT_S) -> None:
    """Wait for something to become true; fails when it does not in time."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        select.select([], [], [], 0.005)


def content(store: kvrep.Store) -> dict[str, dict[bytes, bytes]]:
    """All that a store holds, without keyspaces that are empty."""
    found = {name: dict(store.keyspace(name).scan()) for name in store.keyspaces()}
    return {name: rows for name, rows in found.items() if rows}


def copy_of(sink: Sink) -> dict[str, dict[bytes, object]]:
    """All that a secondary holds. ``sink`` is one of its own, not the agent's."""
    sink.open()
    try:
        found = {name: dict(sink.scan(name)) for name in sink.keyspaces()}
    finally:
        sink.close()
    return {name: rows for name, rows in found.items() if rows}


def agent_of(store: kvrep.Store, sink: Sink, **options: Any) -> Agent:
    """An agent straight from a store's feed."""
    return Agent(FeedSource(Local(store)), sink, **options)


def wait_current(agent: Agent, store: kvrep.Store) -> None:
    """Wait until an agent has applied all that is committed now."""
    try:
        agent.wait_for(kvrep.Position(0, 0), WAIT_S)
        wait_until(
            lambda: agent.status().backlog == 0 and agent.status().state is AgentState.CURRENT,
            "the agent is current",
        )
    except BaseException:
        print(agent.status(), store.status().position)
        raise
