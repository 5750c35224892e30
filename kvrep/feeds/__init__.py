"""The changes of a store as an ordered, resumable stream: what sinks, brokers and applications read.

``selection`` says what of it somebody wants, ``reader`` reads it from the log, ``changes`` is the iterator that
users hold (a snapshot and the log behind it), ``named`` keeps a place in the store itself, ``serving`` answers
clients in other processes.
"""

from __future__ import annotations

from kvrep.feeds.changes import Changes
from kvrep.feeds.named import Feed, FeedInfo
from kvrep.feeds.selection import Selection
from kvrep.model.change import Change
from kvrep.model.event import Event

__all__ = ["Change", "Changes", "Event", "Feed", "FeedInfo", "Selection"]
