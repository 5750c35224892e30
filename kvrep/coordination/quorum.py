"""The built-in coordinator: the nodes elect a primary among themselves."""

from __future__ import annotations

from collections.abc import Callable

from kvrep.coordination.driver import Driver
from kvrep.coordinators import Quorum
from kvrep.replication.election import ElectionSettings

__all__ = ["QuorumCoordinator", "settings_of"]


def settings_of(choice: Quorum) -> ElectionSettings:
    """The times of an election, in proportion to those that users set."""
    return ElectionSettings(
        heartbeat_interval_s=choice.heartbeat_interval_s,
        timeout_s=choice.timeout_s,
        spread_s=0.3 * choice.timeout_s,
        step_down_s=choice.step_down_s,
        answer_timeout_s=0.4 * choice.timeout_s,
        patience_s=0.15 * choice.timeout_s,
    )


class QuorumCoordinator(Driver):
    """See :class:`kvrep.coordination.interface.Coordinator`; everything is in the election and its driver."""

    kind = "quorum"

    def __init__(self, choice: Quorum, *, chance: Callable[[], float] | None = None) -> None:
        super().__init__(settings_of(choice), peers=choice.peers, priority=choice.priority, chance=chance)
        self.witness = choice.witness
