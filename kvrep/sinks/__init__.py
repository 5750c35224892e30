"""Secondary systems, the agents that keep them up to date, and publishing to brokers.

::

    interface   Sink, Place, DeadLetter: what a secondary has to be able to do
    memory, sqlite, postgres, store, warehouse      the secondaries
    sql, tables what databases share; delta, columns: of what a warehouse is made
    source      what an agent reads; feed (a store) and broker are the two
    ordering    in which order events take effect (pure); delays: how late, how fast, until when (pure)
    agent       the loop of an agent; publication: of the other direction; stream: what passes beside events
    log_publication      the log itself into a broker
    addresses   all of them by their addresses; upstream: the store that is read; cursor: a place in a file
    metrics     what they say, over HTTP; drilling: a disaster, rehearsed
"""

from __future__ import annotations

from kvrep.sinks.addresses import sink_at, source_at, upstream_at
from kvrep.sinks.agent import Agent, AgentStatus, retry_dead_letters
from kvrep.sinks.cursor import FileCursor
from kvrep.sinks.drilling import DrillReport, drill
from kvrep.sinks.interface import DeadLetter, Place, Sink
from kvrep.sinks.log_publication import LogPublication
from kvrep.sinks.memory import MemorySink
from kvrep.sinks.publication import Publication, PublicationStatus
from kvrep.sinks.running import AgentState
from kvrep.sinks.source import Source
from kvrep.sinks.tables import Table
from kvrep.sinks.upstream import Local, Remote

__all__ = [
    "Agent",
    "AgentState",
    "AgentStatus",
    "DeadLetter",
    "DrillReport",
    "FileCursor",
    "Local",
    "LogPublication",
    "MemorySink",
    "Place",
    "Publication",
    "PublicationStatus",
    "Remote",
    "Sink",
    "Source",
    "Table",
    "drill",
    "retry_dead_letters",
    "sink_at",
    "source_at",
    "upstream_at",
]
