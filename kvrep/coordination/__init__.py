"""Who tries to be primary, with threads and clocks: one interface, three coordinators.

::

    interface   Coordinator, and what it needs from a node (NodeView)
    driver      an election (kvrep.replication.election) with its clock, threads and calls
    quorum      the nodes elect among themselves
    etcd        a key in etcd says who tries
    memory      a node without storage, for tests

The third, ``manual``, is what every node has by default: nobody tries by itself. It is in :mod:`kvrep.runtime.voting`,
together with what all three have in common: answering questions and requests for promises.

Importing this package imports nothing; only ``etcd`` imports grpc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvrep.coordination.interface import Coordinator
    from kvrep.coordinators import CoordinatorChoice

__all__ = ["make_coordinator"]


def make_coordinator(choice: CoordinatorChoice) -> Coordinator:
    """The coordinator that was chosen for a node, not started; what it needs is imported only here."""
    from kvrep.coordinators import Etcd

    if isinstance(choice, Etcd):
        from kvrep.coordination.etcd import EtcdCoordinator

        return EtcdCoordinator(choice)
    from kvrep.coordination.quorum import QuorumCoordinator

    return QuorumCoordinator(choice)
