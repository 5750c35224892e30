"""The life that an agent and a publication share: a thread, connections that are tried again, an end."""

from __future__ import annotations

import logging
import random
import threading
from abc import ABC, abstractmethod
from enum import StrEnum
from types import TracebackType
from typing import Self

from kvrep.errors import ClosedError, Error, again

__all__ = ["AgentState", "Running", "words"]

log = logging.getLogger("kvrep.sinks")

BACKOFF_S, BACKOFF_MAX_S = 0.1, 5.0


class AgentState(StrEnum):
    """What an agent does now."""

    NEW = "new"
    SNAPSHOT = "snapshot"
    """A whole copy is arriving."""
    APPLYING = "applying"
    """Changes are there to be applied."""
    CURRENT = "current"
    """Everything that is known of is applied."""
    WAITING = "waiting"
    """Source or secondary do not answer; ``problem`` says which and why. It tries again by itself."""
    FAILED = "failed"
    """Somebody has to fix what ``problem`` names."""
    CLOSED = "closed"


class Running(ABC):
    """Runs sessions between two sides until it is closed, or until something ends it that does not pass by itself.

    ``start()`` runs them in a thread ``kvrep-KIND-NAME``, ``run()`` in the calling one.
    """

    kind: str
    """What it calls itself in errors, logs and the name of its thread."""
    retryable: tuple[type[Exception], ...]
    """What ends a session, but not the life: another one follows after a pause."""

    def __init__(self, name: str, *, wait: bool) -> None:
        self.name = name
        self._wait = wait
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # Announces every change of state, for those who wait.
        self._moved = threading.Condition()
        self._state, self._problem = AgentState.NEW, ""
        self._error: BaseException | None = None
        self._reconnects = 0

    # -- what one is made of -----------------------------------------------------------------------

    @abstractmethod
    def _connect(self) -> None:
        """Open both sides; nothing stays open when it raises."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Close what is open, whatever state it is in. Does not raise."""

    @abstractmethod
    def _session(self) -> None:
        """Work until told to end; raises what goes wrong."""

    @abstractmethod
    def _close_sides(self) -> None:
        """Both sides are given up for good."""

    @abstractmethod
    def _progress(self) -> int:
        """A number that grows with what is done: a session that did something makes the next pause short."""

    # -- its life ----------------------------------------------------------------------------------

    def start(self) -> Self:
        """Connect, and go on in a thread. Wrong credentials and addresses raise here, at once.

        With ``wait``, sides that do not answer are awaited in the thread instead.
        """
        if self._thread is not None:
            raise ClosedError(f"one {self.kind} is started once")
        if not self._wait:
            self._connect()
        name = f"kvrep-{self.kind}-{self.name}"
        self._thread = threading.Thread(target=self._guarded, name=name, daemon=True)
        self._thread.start()
        return self

    def run(self) -> None:
        """Run in this thread until :meth:`close`; raises what ends it."""
        if not self._wait:
            self._connect()
        self._guarded()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what ended it; nothing while it runs."""
        error = self._error
        if error is not None:
            raise again(error) if isinstance(error, Error) else error

    def close(self, timeout_s: float = 30.0) -> None:
        """End it: what is under way is finished or given up. Idempotent; ``TimeoutError`` after ``timeout_s``."""
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)
            if thread.is_alive():
                raise TimeoutError(f"the {self.kind} did not end within {timeout_s:g} s")
        elif thread is None:
            self._disconnect()
        self._close_sides()
        self._say(AgentState.FAILED if self._error is not None else AgentState.CLOSED, self._problem)

    def __enter__(self) -> Self:
        return self if self._thread is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _say(self, state: AgentState, problem: str) -> None:
        with self._moved:
            self._state, self._problem = state, problem
            self._moved.notify_all()

    def _guarded(self) -> None:
        try:
            self._sessions()
        except BaseException as error:
            self._error = error
            self._say(AgentState.FAILED, words(error))
            log.error("%s %s ends: %s", self.kind, self.name, words(error))
            if not isinstance(error, Exception):
                raise
        finally:
            self._disconnect()

    def _sessions(self) -> None:
        backoff_s, connected = BACKOFF_S, not self._wait
        while not self._stop.is_set():
            before = self._progress()
            try:
                if not connected:
                    self._connect()
                self._session()
                return
            except self.retryable as error:
                self._reconnects += 1
                level = logging.DEBUG if words(error) == self._problem else logging.WARNING
                log.log(level, "%s %s waits: %s", self.kind, self.name, words(error))
                self._say(AgentState.WAITING, words(error))
            connected = False
            self._disconnect()
            backoff_s = BACKOFF_S if self._progress() > before else min(backoff_s * 2, BACKOFF_MAX_S)
            self._stop.wait(backoff_s * random.uniform(0.5, 1.0))


def words(error: BaseException) -> str:
    """What an error says, or what it is."""
    return str(error) or type(error).__name__
