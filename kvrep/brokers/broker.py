"""What all brokers do alike: open publishers and subscribers, keep them, close them.

A broker's own class derives from :class:`BaseBroker` and says how a publisher and a subscriber are made.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeVar

from kvrep.brokers.interface import (
    BUFFER_BYTES,
    BUFFER_MESSAGES,
    EARLIEST,
    STORED,
    Publisher,
    Subscriber,
)
from kvrep.brokers.publisher import Window
from kvrep.brokers.url import DEFAULT_TOPIC, BrokerUrl
from kvrep.errors import ClosedError, OpenError

__all__ = ["BaseBroker"]

_Opened = TypeVar("_Opened", bound=Publisher | Subscriber)


class BaseBroker(ABC):
    """See :class:`kvrep.brokers.interface.Broker`.

    ``topic`` is used where the address has no such option, as when its path names it. ``options`` are what else
    can stand in the address; ``ConfigurationMismatch`` for any other.
    """

    def __init__(
        self, url: BrokerUrl, *, topic: str = "", options: Iterable[str] = (), is_log: bool = True
    ) -> None:
        url.only("topic", *options)
        self.url = str(url)
        self.topic = url.options.get("topic") or topic or DEFAULT_TOPIC
        self.is_log = is_log
        self._closed = False
        # Protects what follows.
        self._lock = threading.Lock()
        self._opened: list[Publisher | Subscriber] = []

    # -- a broker's own ----------------------------------------------------------------------------

    @abstractmethod
    def _publisher(self, topic: str, window: Window) -> Publisher:
        """A connected publisher; raises what keeps it from being one."""

    def _transactional(self, _topic: str, _window: Window, _id: str) -> Publisher:
        """The same with transactions, where the broker has them."""
        raise OpenError(f"{self.url} has no transactions", hint="leave transactional_id out")

    @abstractmethod
    def _subscriber(self, topic: str, group: str, start: str, prefetch: int) -> Subscriber:
        """A connected subscriber. ``start`` of a queue is STORED or EARLIEST; else a position may be no good."""

    # -- the interface -----------------------------------------------------------------------------

    def publisher(
        self,
        topic: str = "",
        *,
        buffer_messages: int = BUFFER_MESSAGES,
        buffer_bytes: int = BUFFER_BYTES,
        transactional_id: str = "",
    ) -> Publisher:
        self._need_open()
        topic, window = topic or self.topic, Window(buffer_messages, buffer_bytes)
        if transactional_id:
            return self._keep(self._transactional(topic, window, transactional_id))
        return self._keep(self._publisher(topic, window))

    def subscriber(
        self, topic: str = "", *, group: str = "kvrep", start: str = STORED, prefetch: int = 500
    ) -> Subscriber:
        self._need_open()
        if not self.is_log and start not in (STORED, EARLIEST):
            raise OpenError(f"a queue cannot start at {start!r}", hint="start it at STORED")
        return self._keep(self._subscriber(topic or self.topic, group, start, prefetch))

    def close(self) -> None:
        self._closed = True
        for one in self._opened:
            one.close()
        self._opened.clear()

    def _need_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the broker {self.url} is closed")

    def _keep(self, opened: _Opened) -> _Opened:
        """Close it with the broker; forget those that are closed already."""
        with self._lock:
            self._opened = [*(one for one in self._opened if not one.closed), opened]
        if self._closed:  # by another thread, meanwhile
            opened.close()
            self._need_open()
        return opened
