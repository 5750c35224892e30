"""Forming a group, exactly once: what an empty node does with the answers of its peers.

All listed peers must answer, be empty and have the same list; then the one with the first name (no witness)
asks **all** of them for their promise. A peer that has a lineage ends that for good: an empty node then waits
for its primary and joins as a non-voter. So nodes that were wiped never outvote the one that holds the data:
they are other stores, which no configuration lists.

One that is listed and empty has never had anything (what it confirmed and lost would make it unable): its
promise is as good as any. Without it a founder that failed before anybody had joined could never lead again.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvrep.model.configuration import Voter
from kvrep.model.position import EPOCH_MEMBERS
from kvrep.replication.ballots import Answer
from kvrep.replication.election.group import Group
from kvrep.replication.election.interface import Standing

__all__ = ["found_alone", "found_together"]


def found_alone(group: Group) -> tuple[Voter, ...]:
    """The voters of a group of one."""
    return (_founder(group.own, 1, group.own.address, group.priority),)


def found_together(group: Group, answers: Mapping[str, Answer], *, outside: bool) -> tuple[Voter, ...] | str:
    """The voters of the group that this node is to begin now, or why it is not to.

    ``outside``: a service outside says who founds, so it is not for this node to try.
    """
    return _problem(group, answers, outside=outside) or _voters(group, answers)


def _problem(group: Group, answers: Mapping[str, Answer], *, outside: bool) -> str:
    own, peers = group.own, group.peers
    # Who has our own lineage without a record is from an attempt of ours that was interrupted.
    ours = own.lineage
    held = sorted(
        name
        for name, a in answers.items()
        if a.lineage and not (a.lineage == ours and (a.empty or a.witness))
    )
    if held:
        return f"{held[0]} belongs to a group already; waiting for its primary, to join"
    if outside or not peers:
        return "waiting for a group to be formed"
    if own.name not in peers:
        return f"{own.name} is not in the list of peers it was given"
    mute = sorted(peers.keys() - answers.keys() - {own.name})
    if mute:
        return "a new group needs all its nodes once; no answer from " + ", ".join(mute)
    for name, answer in sorted(answers.items()):
        if answer.name != name:
            return f"the node at the address of {name} is named {answer.name!r}"
        if answer.peers != group.listed:
            return f"{name} was given another list of peers"
        if not answer.empty and not answer.lineage:
            return f"{name} holds data without a group"
    return "too many peers" if len(peers) >= EPOCH_MEMBERS else ""


def _voters(group: Group, answers: Mapping[str, Answer]) -> tuple[Voter, ...] | str:
    own, peers = group.own, group.peers
    members = {name: i for i, name in enumerate(sorted(peers), 1)}
    voters = [_founder(a, members[name], peers[name], a.priority) for name, a in answers.items()]
    voters.append(_founder(own, members[own.name], peers[own.name], group.priority))
    voters.sort(key=lambda v: v.member)
    first = next(v for v in voters if not v.witness or v is voters[-1])
    return tuple(voters) if first.store_id == own.store_id else f"{first.name} is to begin the new group"


def _founder(node: Standing | Answer, member: int, address: str, priority: int) -> Voter:
    return Voter(
        store_id=node.store_id,
        name=node.name,
        member=member,
        address=address,
        priority=priority,
        witness=node.witness,
    )
