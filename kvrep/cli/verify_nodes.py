"""The checks of running nodes against each other."""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from kvrep.cli import describe
from kvrep.cli.arguments import security
from kvrep.cli.checks import Report
from kvrep.cli.console import number
from kvrep.cli.target import RemoteTarget
from kvrep.errors import Error
from kvrep.model.position import Position

__all__ = ["verify_nodes"]

PAUSE_S = 0.1


@dataclass(slots=True)
class _Node:
    """A node that answers."""

    label: str
    target: RemoteTarget
    status: dict[str, Any]
    answer: dict[str, Any] = field(default_factory=dict)
    """Its newest recomputed digests."""


def verify_nodes(args: argparse.Namespace, addresses: list[str]) -> Report:
    """Compare the nodes at ``addresses``; of one address, the primary and all its followers."""
    report = Report(f"nodes {', '.join(addresses)}")
    deadline = time.monotonic() + args.timeout_s
    with ExitStack() as stack:
        nodes = _reach(args, addresses, report, stack)
        if len(addresses) == 1 and nodes:
            nodes = _find_others(args, nodes[0], report, stack)
        if not nodes:
            return report
        if len(nodes) < 2:
            report.add("comparison", False, "there is nothing to compare with: only one node answers")
        elif not _same_store(nodes, report):
            return report
        _compare(nodes, report, deadline)
    return report


# -- who there is ----------------------------------------------------------------------------------


def _reach(args: argparse.Namespace, addresses: list[str], report: Report, stack: ExitStack) -> list[_Node]:
    """The nodes that answer, each once; for the others a failed check."""
    nodes: list[_Node] = []
    for address in addresses:
        target = RemoteTarget(address, security(args), timeout_s=args.timeout_s)
        stack.callback(target.close)
        try:
            status: dict[str, Any] = target.call("status", {}, timeout_s=min(5.0, args.timeout_s))["status"]
        except Error as error:
            report.add(address, False, f"could not be checked: {describe(error)}")
            continue
        if any(node.status["store_id"] == status["store_id"] for node in nodes):
            continue
        nodes.append(_Node(status["name"] or address, target, status))
    return nodes


def _find_others(args: argparse.Namespace, first: _Node, report: Report, stack: ExitStack) -> list[_Node]:
    """From one node to its primary, and from there to all followers that it remembers."""
    primary = first
    if first.status["role"] != "primary":
        address = first.status["primary_address"]
        found = _reach(args, [address], report, stack) if address else []
        if not found:
            if not address:
                report.add("primary", False, f"{first.label} does not know its primary")
            return [first]
        primary = found[0]
    others: list[str] = []
    for follower in primary.status["followers"]:
        if follower["store_id"] == first.status["store_id"]:
            continue
        if not follower["connected"]:
            report.add(
                follower["name"] or follower["store_id"][:8], False, "could not be checked: not connected"
            )
        else:
            others.append(follower["address"])
    known = [primary] if primary is first else [primary, first]
    return [*known, *_reach(args, others, report, stack)]


def _same_store(nodes: list[_Node], report: Report) -> bool:
    lineages = {node.status["lineage"] for node in nodes}
    primaries = [node.label for node in nodes if node.status["role"] == "primary"]
    if len(lineages) > 1:
        which = ", ".join(f"{node.label} {node.status['lineage'][:8] or 'none'}" for node in nodes)
        return report.add("one store", False, f"these nodes hold different stores: {which}")
    if len(primaries) > 1:
        return report.add("one primary", False, f"{' and '.join(primaries)} both say that they are primary")
    if not primaries:
        report.notes.append("none of these nodes is the primary: they are compared with each other")
    return report.add("one store", True, f"{len(nodes)} nodes of lineage {lineages.pop()[:8]}…")


# -- the comparison --------------------------------------------------------------------------------


def _compare(nodes: list[_Node], report: Report, deadline: float) -> None:
    """Digests at one position; while writes go on, those that every node keeps at a common mark."""
    while True:
        problems = _recompute(nodes, deadline)
        one_position = len({node.answer.get("position") for node in nodes}) == 1
        if problems or one_position or time.monotonic() >= deadline or _busy(nodes):
            break
        time.sleep(PAUSE_S)
    for node in nodes:
        _check_own(node, problems.get(node.label), report)
    if len(nodes) < 2 or problems:
        if problems and len(nodes) > 1:
            report.add("comparison", False, "could not be made: not all nodes answered")
    elif one_position:
        position = nodes[0].answer["position"]
        for other in nodes[1:]:
            _check_pair(nodes[0], other, position, nodes[0].answer, other.answer, report)
    else:
        _compare_at_mark(nodes, report, deadline)


def _recompute(nodes: list[_Node], deadline: float) -> dict[str, str]:
    """Every node recomputes, the first one first; returns what went wrong, by label."""
    problems: dict[str, str] = {}

    def ask(node: _Node, position: str | None) -> None:
        left = max(0.1, deadline - time.monotonic())
        try:
            if position is not None:
                node.target.call("wait", {"position": position}, timeout_s=left)
            node.answer = node.target.call("digests", {}, timeout_s=max(left, 5.0))
        except Error as error:
            problems[node.label] = describe(error)

    ask(nodes[0], None)
    position = nodes[0].answer.get("position")
    with ThreadPoolExecutor(max_workers=len(nodes)) as pool:
        list(pool.map(lambda node: ask(node, position), nodes[1:]))
    return problems


def _busy(nodes: list[_Node]) -> bool:
    """Whether writes go on: then the nodes will not come to rest at one position."""
    try:
        now: str = nodes[0].target.status()["position"]
    except Error:
        return False
    return Position.parse(now) > max(Position.parse(node.answer["position"]) for node in nodes)


def _check_own(node: _Node, problem: str | None, report: Report) -> None:
    """What is on a node's disk against the digests that it keeps."""
    if problem is not None:
        report.add(f"{node.label} itself", False, f"could not be checked: {problem}")
        return
    answer = node.answer
    computed, stored = _filled(answer["digests"]), _filled(answer["stored"])
    wrong = sorted(name for name in computed.keys() | stored.keys() if computed.get(name) != stored.get(name))
    if wrong:
        detail = f"keyspace {', '.join(wrong)}: what is on its disk is not what was written"
    else:
        pairs = sum(answer["counts"].values())
        detail = f"{number(pairs)} pairs on its disk add up to the digests on record, at {answer['position']}"
    report.add(f"{node.label} itself", not wrong, detail)
    if answer["diverged"]:
        report.add(
            f"{node.label} earlier", False, f"its digests differed at record {number(answer['diverged'])}"
        )


def _check_pair(
    first: _Node, other: _Node, position: str, ours: dict[str, Any], theirs: dict[str, Any], report: Report
) -> None:
    name = f"{first.label} = {other.label}"
    a, b = _filled(ours["digests"]), _filled(theirs["digests"])
    wrong = sorted(space for space in a.keys() | b.keys() if a.get(space) != b.get(space))
    if not wrong:
        report.add(name, True, f"equal at {position}, {len(a)} keyspaces")
        return
    counts = ours.get("counts"), theirs.get("counts")
    said = [_difference(space, *counts) for space in wrong]
    report.add(name, False, f"at {position}: {'; '.join(said)}")


def _difference(space: str, ours: dict[str, int] | None, theirs: dict[str, int] | None) -> str:
    text = f"keyspace {space} differs"
    if ours is None or theirs is None:
        return text
    return f"{text} ({number(ours.get(space, 0))} pairs against {number(theirs.get(space, 0))})"


def _compare_at_mark(nodes: list[_Node], report: Report, deadline: float) -> None:
    """Every node cuts its flush at the same marks, and keeps the digests of the last one."""
    marks: list[dict[str, Any]] = []
    while True:
        try:
            marks = [node.target.call("marks", {}) for node in nodes]
        except Error as error:
            report.add("comparison", False, f"could not be made: {describe(error)}")
            return
        if marks[0]["mark"] is not None and len({mark["mark"] for mark in marks}) == 1:
            break
        if time.monotonic() >= deadline:
            where = ", ".join(f"{node.label} {mark['mark']}" for node, mark in zip(nodes, marks, strict=True))
            report.add(
                "comparison", False, f"could not be made: the nodes came to no common position ({where})"
            )
            return
        time.sleep(PAUSE_S)
    for other, mark in zip(nodes[1:], marks[1:], strict=True):
        _check_pair(nodes[0], other, marks[0]["mark"], marks[0], mark, report)
    report.notes.append("writes went on: the nodes were compared at their last common digest mark")


def _filled(digests: dict[str, bytes]) -> dict[str, bytes]:
    """Without keyspaces that hold nothing: it makes no difference whether they were ever used."""
    return {name: digest for name, digest in digests.items() if any(digest)}
