"""Publishing in transactions: what one commit covers becomes visible at once, and an older publisher is shut out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NoReturn

import confluent_kafka as ck

from kvrep.brokers.interface import Message
from kvrep.brokers.kafka.cluster import Cluster
from kvrep.brokers.kafka.publisher import KafkaPublisher
from kvrep.brokers.publisher import Window
from kvrep.errors import again

__all__ = ["TransactionalPublisher"]

TRANSACTION_TIMEOUT_MS = 60_000
STEP_MIN_S = 0.01
_E = ck.KafkaError


class TransactionalPublisher(KafkaPublisher):
    """Commits when somebody waits: for confirms, or for room. A commit confirms all that was published."""

    def __init__(self, cluster: Cluster, topic: str, window: Window, transactional_id: str) -> None:
        self._messages: list[Message] = []
        """Of the open transaction: an abort publishes them again."""
        self._open = False
        settings = {"transactional.id": transactional_id, "transaction.timeout.ms": TRANSACTION_TIMEOUT_MS}
        super().__init__(cluster, topic, window, settings)

    def _begin(self) -> None:
        super()._begin()
        with self._cluster.asked():
            self._producer.init_transactions(self._cluster.timeout_s)

    def _send(self, message: Message, _size: int) -> None:
        if not self._open:
            with self._cluster.asked():
                self._producer.begin_transaction()
            self._open = True
        self._produce(message, _ignored)
        self._messages.append(message)

    def _wait_for(self, condition: Callable[[], bool], deadline: float) -> bool:
        if not condition():
            self._commit(deadline)
        return super()._wait_for(condition, deadline)

    def _commit(self, deadline: float) -> None:
        """Commit what is open before ``deadline``; raises what ends this publisher."""
        while self._open and time.monotonic() < deadline:
            try:
                self._producer.commit_transaction(_left(deadline))
            except ck.KafkaException as error:
                if not self._recover(error.args[0], deadline):
                    return
                continue
            self._open = False
            self._messages.clear()
            self._confirm(self.published - self.confirmed, self._bytes)

    def _recover(self, error: Any, deadline: float) -> bool:
        """Make the best of a failed commit; whether to try again."""
        if error.retriable():
            return True
        if error.code() == _E._TIMED_OUT:
            return False
        if not error.txn_requires_abort():
            self._give_up(error)
        try:
            self._producer.abort_transaction(_left(deadline))
            self._producer.begin_transaction()
        except ck.KafkaException as second:
            self._give_up(second.args[0])
        for message in self._messages:
            self._produce(message, _ignored)
        return True

    def _give_up(self, error: Any) -> NoReturn:
        fault = self._cluster.mapped(error)
        self._end(fault)
        raise again(fault)


def _left(deadline: float) -> float:
    return max(STEP_MIN_S, deadline - time.monotonic())


def _ignored(_error: Any, _message: Any) -> None:
    """Of a transaction: its commit counts."""
