"""Who tries to be primary, with threads and clocks: one interface, three coordinators.

::

    interface   Coordinator, and what it needs from a node (NodeView)
    voting      what all have in common: answering questions and requests for promises
    manual      the default: nobody tries by itself
    driver      an election (kvrep.replication.election) with its clock, threads and calls
    quorum      the nodes elect among themselves
    etcd        a key in etcd says who tries
    memory      a node without storage, for tests

Importing this package imports nothing; only ``etcd`` imports grpc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvrep.coordination.interface import Coordinator
    from kvrep.coordinators import CoordinatorChoice

__all__ = ["make_coordinator"]


def make_coordinator(choice: CoordinatorChoice | None) -> Coordinator:
    """The coordinator of a node, not started; what it needs is imported only here."""
    from kvrep.coordinators import Etcd

    if choice is None:
        from kvrep.coordination.manual import ManualCoordinator

        return ManualCoordinator()
    if isinstance(choice, Etcd):
        from kvrep.coordination.etcd import EtcdCoordinator

        return EtcdCoordinator(choice)
    from kvrep.coordination.quorum import QuorumCoordinator

    return QuorumCoordinator(choice)
