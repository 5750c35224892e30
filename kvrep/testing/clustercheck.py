"""What must hold of a cluster: its copies are equal, and nothing that was acknowledged is lost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from kvrep.errors import Error
from kvrep.model.position import Position
from kvrep.status import Outcome
from kvrep.testing.checkers import (
    Violation,
    check_acknowledged_loss,
    check_linearizable,
    check_monotonic_reads,
    check_one_primary,
    check_read_your_writes,
)
from kvrep.testing.history import History
from kvrep.testing.nodes import ClusterNode, open_offline
from kvrep.testing.storecheck import check_store

__all__ = ["acknowledged", "check_calls", "check_offline", "lost", "need_equal"]


def need_equal(primary: ClusterNode, others: Iterable[ClusterNode]) -> None:
    """``AssertionError`` unless all show every key as ``primary`` does."""
    expected = primary.content()
    for node in others:
        found = node.content()
        different = {k for k in {*expected, *found} if expected.get(k) != found.get(k)}
        if different:
            raise AssertionError(
                f"{node.name} differs from {primary.name} in {len(different)} keys, such as {min(different)}"
            )


def acknowledged(nodes: Iterable[ClusterNode], history: History) -> Iterator[Position]:
    """Where the writes are that returned, of nodes and of recorded clients."""
    for node in nodes:
        yield from node.all_acknowledged()
    for operation in history:
        if operation.result == "done" and operation.position is not None:
            yield operation.position


def lost(primary: ClusterNode, positions: Iterable[Position], history: History) -> list[Violation]:
    """What of ``positions``, and of the keys that recorded clients wrote, is not in the primary's history."""
    violations = [
        Violation("acknowledged loss", f"the write at {p} returned and is not in {primary.name}'s history")
        for p in sorted(p for p in set(positions) if primary.resolve(p) is not Outcome.COMMITTED)
    ]
    operations = history.operations
    used = {o.key for o in operations}
    final = {k: v for (name, k), v in primary.content().items() if name == "default" and k in used}
    return violations + check_acknowledged_loss(operations, final)


def check_calls(history: History, *, forwarded: bool, disturbed: Collection[str]) -> list[Violation]:
    """What no order of calls explains.

    ``forwarded``: nodes acknowledge what others have committed. ``disturbed``: nodes that were ended at least
    once, so that what they show may go back.
    """
    violations = check_linearizable(history)
    if not forwarded:
        violations += check_one_primary(history)
    operations = history.operations
    violations += check_read_your_writes([o for o in operations if not o.lagging])
    return violations + check_monotonic_reads(
        o for o in operations if not o.lagging or o.node not in disturbed
    )


def check_offline(node: ClusterNode, missing: set[Position]) -> list[Violation]:
    """Check the store of a node that is down, and take what its log holds out of ``missing``."""
    try:
        with open_offline(node.path, node.options) as store:
            engine = store._node.engine
            missing -= {p for p in missing if engine.epochs.holds(p, engine.tail.offset)}
            return check_store(store)
    except (Error, OSError) as error:
        return [Violation("store", f"{node.name} cannot be opened: {type(error).__name__}: {error}")]
