"""Who decides which node tries to be primary: what ``coordinator=`` of :func:`kvrep.open` takes.

``None`` (the default) means by hand: ``promote()``, ``follow()``, ``switchover()``. Whoever tries, promises
of the voters decide who may; so a wrong choice here costs time, never data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kvrep.errors import ConfigurationMismatch

__all__ = ["CoordinatorChoice", "Etcd", "Quorum"]

_CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quorum:
    """The nodes elect a primary among themselves; no other service is needed.

    Give the same ``peers`` to every node: nodes that start empty together form the group. Afterwards the
    log's configuration says who votes, and ``peers`` are only addresses.
    """

    peers: Mapping[str, str]
    """``{"a": "host-a:7400", …}``: all nodes by name, this one included."""
    priority: int = 0
    """Seeds the configuration: of equally up-to-date nodes the highest stands first; below 0 never."""
    witness: bool = False
    """This node votes and keeps no data."""
    heartbeat_interval_s: float = 0.25
    """How often the primary asks its voters to confirm it."""
    timeout_s: float = 1.0
    """Silence after which a primary counts as dead."""
    step_down_s: float = 1.0
    """A primary that most voters have not confirmed for so long steps down. With ``acks=0`` this bounds
    what a failover can lose."""

    def __post_init__(self) -> None:
        peers = _texts("peers", self.peers)
        if not peers:
            _reject("peers", self.peers, "at least one name and address")
        object.__setattr__(self, "peers", MappingProxyType(peers))
        if type(self.priority) is not int or not -1000 <= self.priority <= 1000:
            _reject("priority", self.priority, "-1000 to 1000")
        _check_times(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Etcd:
    """One key in etcd, taken by compare-and-swap and kept by a lease, says which node tries.

    It counts as one vote more, so two data nodes suffice. While etcd is away, a primary goes on as long as
    most voters confirm it.
    """

    endpoints: Sequence[str]
    cluster: str
    """The name of this group in etcd: all its keys begin with ``/kvrep/<cluster>/``."""
    priority: int = 0
    ttl_s: int = 3
    """The lease; etcd's own minimum is 2 s with its default settings."""
    tls: Any = None
    """A :class:`kvrep.TLS` for etcd."""
    heartbeat_interval_s: float = 0.25
    timeout_s: float = 1.0
    step_down_s: float = 1.0

    def __post_init__(self) -> None:
        given: Any = self.endpoints
        if isinstance(given, str) or not given:
            _reject("endpoints", self.endpoints, 'a list such as ["host:2379"]')
        object.__setattr__(self, "endpoints", tuple(self.endpoints))
        if not _CLUSTER.fullmatch(str(self.cluster)):
            _reject("cluster", self.cluster, "1 to 64 of A-Z a-z 0-9 _ . -")
        if type(self.ttl_s) is not int or not 1 <= self.ttl_s <= 3600:
            _reject("ttl_s", self.ttl_s, "1 to 3600 whole seconds")
        _check_times(self)

    @property
    def witness(self) -> bool:
        """Nobody is a witness here: etcd is the vote that two data nodes lack."""
        return False


CoordinatorChoice = Quorum | Etcd


def _texts(option: str, given: Any) -> dict[str, str]:
    found: Any = dict(given) if isinstance(given, Mapping) else {None: None}
    if not all(isinstance(text, str) and text for pair in found.items() for text in pair):
        _reject(option, given, 'a map such as {"a": "host-a:7400"}')
    texts: dict[str, str] = found
    return texts


def _check_times(choice: Quorum | Etcd) -> None:
    for name in ("heartbeat_interval_s", "timeout_s", "step_down_s"):
        value = getattr(choice, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.01 <= value <= 3600:
            _reject(name, value, "0.01 to 3600 seconds")
    if choice.timeout_s < 3 * choice.heartbeat_interval_s:
        _reject("timeout_s", choice.timeout_s, "at least three heartbeat intervals")
    if choice.step_down_s < 2 * choice.heartbeat_interval_s:
        _reject("step_down_s", choice.step_down_s, "at least two heartbeat intervals")


def _reject(option: str, given: Any, wanted: str) -> None:
    raise ConfigurationMismatch(
        f"coordinator option {option}={given!r} is not allowed: {wanted}", option=option, given=given
    )
