"""Events of a node, told to the application on a thread of their own: a slow listener stalls nothing."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from kvrep.status import Event

__all__ = ["Events", "Listener"]

log = logging.getLogger("kvrep")

WAITING_MAX = 1000
"""Events that may wait for slow listeners; the oldest are dropped then, and their number is told."""

Listener = Callable[[Event], None]


class Events:
    """The listeners of one node. The thread starts with the first listener and ends with :meth:`stop`."""

    def __init__(self, label: str) -> None:
        self._label = label
        # Protects the queue and the listeners, and announces both.
        self._changed = threading.Condition()
        self._waiting: deque[Event] = deque(maxlen=WAITING_MAX)
        self._dropped = 0
        self._listeners: list[Listener] = []
        self._thread: threading.Thread | None = None
        self._stopped = False

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener(event)`` for every event from now on, one at a time, in order.

        Returns a function that ends it. What the listener raises is logged and dropped.
        """
        with self._changed:
            self._listeners.append(listener)
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(
                    target=self._run, name=f"kvrep-events-{self._label}", daemon=True
                )
                self._thread.start()

        def forget() -> None:
            with self._changed:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return forget

    def tell(self, event: Event) -> None:
        """Queue an event and return at once. Any thread, under any lock."""
        with self._changed:
            if not self._listeners or self._stopped:
                return
            if len(self._waiting) == WAITING_MAX:
                self._dropped += 1
            self._waiting.append(event)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._stopped:
                        return
                    self._changed.wait()
                event = self._waiting.popleft()
                listeners = list(self._listeners)
                dropped, self._dropped = self._dropped, 0
            if dropped:
                log.warning("%s: listeners were too slow; %d events were dropped", self._label, dropped)
            for listener in listeners:
                try:
                    listener(event)
                except Exception:
                    log.exception("%s: an event listener raised", self._label)

    def stop(self, timeout_s: float) -> None:
        """Tell what still waits, then end the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
