"""What the tests of stores behind a broker share: a relay on a thread, and sites to carry it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvrep
from kvrep import brokers
from kvrep.runtime.relaying import Relay
from kvrep.transport.network import GrpcTransport
from tests.replication_kit import until


class Publishing:
    """A relay that runs until the block ends."""

    def __init__(self, relay: Relay, publisher: Any) -> None:
        self.relay, self.publisher = relay, publisher
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kvrep-publish-test")
        self._thread.start()

    def _run(self) -> None:
        try:
            self.relay.run()
        except BaseException as error:
            self.error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def caught_up(self, store: kvrep.Store) -> None:
        """Wait until the broker has all of ``store``."""
        until(
            lambda: self.relay.published.offset >= store.status().committed_offset,
            what=lambda: f"the relay: {self.relay.status()}",
        )

    def stop(self) -> None:
        self.relay.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextmanager
def publishing(sources: kvrep.Store | Sequence[str], url: str, **options: Any) -> Iterator[Publishing]:
    """Publish what the node has to ``url``."""
    addresses = [sources.address] if isinstance(sources, kvrep.Store) else list(sources)
    transport = GrpcTransport()
    broker = brokers.connect(url)
    publisher = broker.publisher(**{n: options.pop(n) for n in ("transactional_id",) if n in options})
    running = Publishing(
        Relay(addresses, lambda address: transport.connect(address, name="relay"), publisher, **options),
        publisher,
    )
    try:
        yield running
    finally:
        running.stop()
        publisher.close(1.0)
        broker.close()


def far(path: Path, url: str, **options: Any) -> kvrep.Store:
    """A follower behind the broker."""
    return kvrep.open(path, name=options.pop("name", "far"), follow=url, **options)
