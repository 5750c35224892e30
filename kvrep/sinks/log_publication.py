"""The log of a store into a broker, for stores far away: what ``kvrep publish`` does, for use as a library."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvrep import brokers
from kvrep.brokers.interface import Broker, Publisher
from kvrep.errors import ClosedError, Error, StaleRead, again
from kvrep.model.position import Position
from kvrep.runtime.relaying import Relay, RelayStatus
from kvrep.transport.interface import Connection

__all__ = ["LogPublication"]

CLOSE_S = 10.0
LOOK_S = 0.005


class LogPublication:
    """Ships the log of a running store, only what no failover can take back, into a queue, stream or topic.

    ``sources`` are addresses of nodes of one group: it finds the one that is primary. A store opened with
    ``follow=`` the same broker replays the log exactly. ``name`` keeps a slot on the primary, which holds the log
    while this is away; ``state`` is a file that remembers how far it is; ``snapshot`` begins with a whole copy.

    :meth:`start` connects to the broker and raises what is wrong there; the rest runs in a thread
    ``kvrep-publish``. All methods may be called on any thread. It closes ``broker``.
    """

    def __init__(
        self,
        sources: Sequence[str],
        broker: Broker | str,
        *,
        name: str = "",
        state: str | os.PathLike[str] | None = None,
        snapshot: bool = False,
        transactional_id: str = "",
        tls: Any = None,
        token: str | None = None,
    ) -> None:
        from kvrep.transport.network import GrpcTransport
        from kvrep.transport.security import Security

        self._sources = list(sources)
        self._broker = brokers.connect(broker) if isinstance(broker, str) else broker
        self._name, self._snapshot, self._transactional_id = name, snapshot, transactional_id
        self._state = None if state is None else Path(state)
        self._transport = GrpcTransport(security=Security(tls=tls, token=token))
        self._publisher: Publisher | None = None
        self._relay: Relay | None = None
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._error: BaseException | None = None

    def start(self) -> Self:
        """Connect to the broker and begin; once."""
        if self._relay is not None or self._over.is_set():
            raise ClosedError("a publication is started once")
        self._publisher = self._broker.publisher(transactional_id=self._transactional_id)
        self._relay = Relay(
            self._sources, self._connect, self._publisher,
            name=self._name, state=self._state, snapshot=self._snapshot,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, name="kvrep-publish", daemon=True)
        self._thread.start()
        return self

    def _connect(self, address: str) -> Connection:
        return self._transport.connect(address, name=self._name or "publish")

    def _run(self) -> None:
        try:
            self._need().run()
        except BaseException as error:
            self._error = error
        finally:
            self._over.set()

    def _need(self) -> Relay:
        if self._relay is None:
            raise ClosedError("the publication was not started")
        return self._relay

    @property
    def published(self) -> Position:
        """The last position that the broker has confirmed."""
        return self._need().published

    def status(self) -> RelayStatus:
        """A look at it, at any time."""
        return self._need().status()

    def wait_for(self, position: Position, timeout_s: float = 10.0) -> None:
        """Return once the broker has confirmed the log through ``position``.

        :class:`StaleRead` after ``timeout_s``; ``ClosedError``, or what ended it.
        """
        deadline_s = time.monotonic() + timeout_s
        while self.published < position:
            if self._over.is_set():
                self.raise_error()
                raise ClosedError("the publication is closed")
            if time.monotonic() >= deadline_s:
                raise StaleRead(
                    f"{self._broker.url} has confirmed the log through {self.published}, not yet {position}",
                    position=self.published, wanted=position, staleness_s=None,
                )  # fmt: skip
            self._over.wait(LOOK_S)

    def wait_over(self, timeout_s: float) -> bool:
        """Wait until it has ended by itself, which only an error makes it do, or was closed; whether it has."""
        return self._over.wait(timeout_s)

    def raise_error(self) -> None:
        """Raise what ended it; nothing while it runs."""
        error = self._error
        if error is not None:
            raise again(error) if isinstance(error, Error) else error

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """End it; what is under way is confirmed or given up. Idempotent; ``TimeoutError`` after ``timeout_s``."""
        if self._relay is not None:
            self._relay.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        if self._publisher is not None:
            self._publisher.close(timeout_s)
        self._over.set()
        self._broker.close()
        if self._thread is not None and self._thread.is_alive():
            raise TimeoutError(f"the publication did not end within {timeout_s:g} s")

    def __enter__(self) -> Self:
        return self if self._relay is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
