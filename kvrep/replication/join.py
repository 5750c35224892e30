"""What a primary answers to a Hello: go on, cut, bootstrap, refuse, or learn that it is superseded.

The epoch tables of both ends give the last offset they share (``EpochTable.common``). Then, with
``last`` the end of the follower's log::

    shared == last   records after it still in our log ──> Continue       (then compare the checksum there)
                     trimmed                           ──> NeedBootstrap
    shared <  last   the follower has a tail that our history does not have:
                     tail claims our own epoch         ──> Refused        (nobody else may write in it)
                     shared < what it knows committed,
                     and our epoch is not fenced       ──> Refused        (see LogView.fenced)
                     shared < what its LMDB holds      ──> NeedBootstrap
                     otherwise                         ──> Truncate       (it says Hello again)

A follower above our epoch is not fed, whatever its log says: its promise means that somebody has
fenced us, or tried to (``Superseded``).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvrep.model.configuration import Configuration
from kvrep.model.position import ZERO, EpochTable, Position
from kvrep.replication.messages import (
    PROTOCOL,
    PROTOCOL_MIN,
    Hello,
    NeedBootstrap,
    Refused,
    Truncate,
)

__all__ = [
    "Continue",
    "JoinPlan",
    "LogView",
    "Superseded",
    "agreed_protocol",
    "check_loss",
    "check_running",
    "plan_join",
    "refusal",
    "voter_change",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogView:
    """The log of the node that is asked, read after the Hello arrived."""

    store_id: bytes
    name: str
    lineage: bytes
    branch: bytes
    ancestors: tuple[bytes, ...] = ()
    """The branches that ours was forced out of, from the epoch starts in our log. A follower of one of them
    may join; a follower of any other branch holds a forced history that ours knows nothing of."""
    epoch: int
    """The epoch we feed in; 0 while there is none (starting, or collecting promises)."""
    fenced: bool
    """Whether that epoch was made by a full fence or by force. Only then may a follower be told to drop
    records that it knows to be committed."""
    first: int
    """The first offset still in the log; ``last + 1`` when the log is empty. Invariant: first <= last + 1."""
    last: int
    """The last offset written (not only synced): nothing that was shipped lies above it."""
    epochs: EpochTable
    primary_address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continue:
    """The follower's log is a part of ours up to its end, as far as epochs tell; records follow ``at``."""

    at: Position
    protocol: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Superseded:
    """The follower has promised, or holds records of, an epoch above ours. Do not feed it; find out more."""

    epoch: int


JoinPlan = Continue | Truncate | NeedBootstrap | Refused | Superseded


def plan_join(hello: Hello, view: LogView) -> JoinPlan:
    """What to answer. Everything but ``Continue`` and ``Superseded`` is the message to send."""
    refused = refusal(hello, view)
    if refused is not None:
        return refused
    if view.epoch == 0:
        return _refused("starting", "this node is not a primary yet", view)
    seen = max(hello.promised_epoch, hello.last.epoch)
    if seen > view.epoch:
        return Superseded(epoch=seen)
    if hello.last != ZERO and hello.branch not in (view.branch, *view.ancestors):
        text = f"{hello.name} holds a history that was forced apart from that of {view.name}"
        return _refused("lineage", text, view)
    return _by_history(hello, view)


def _by_history(hello: Hello, view: LogView) -> JoinPlan:
    last = hello.last.offset
    shared = view.epochs.common(view.last, hello.epochs, last)
    if shared < last:
        if _claims_our_epochs(hello, view):
            text = (
                f"{hello.name} holds records up to {hello.last} that nobody but {view.name} may have written"
            )
            return _refused("bad-hello", text, view)
        if shared < hello.committed and not view.fenced:
            text = f"{hello.name} knows records after {shared} as committed, which {view.name} has not"
            return _refused("unfenced", text, view)
        if shared < hello.applied:
            return NeedBootstrap(first=view.first, reason="diverged")
    if shared + 1 < view.first:
        return NeedBootstrap(first=view.first, reason="trimmed")
    if shared < last:
        to = Position(view.epochs.epoch_at(shared), shared)
        return Truncate(to=to, epoch=view.epoch)
    return Continue(at=hello.last, protocol=agreed_protocol(hello))


def _claims_our_epochs(hello: Hello, view: LogView) -> bool:
    """Whether the tail that only the follower has lies in an epoch that we wrote, or know otherwise.

    An epoch has one primary and one first record, so this is damage (a promise file restored from a
    backup, a member number used twice): cutting would hide it.
    """
    ours = dict(view.epochs)
    return hello.last.epoch == view.epoch or any(
        ours.get(epoch, first) != first for epoch, first in hello.epochs
    )


def check_running(plan: Continue, hello: Hello, running: int, view: LogView) -> Continue | NeedBootstrap:
    """The plan, if ``running`` (our checksum through ``plan.at``) is the follower's, too.

    Equal epochs with different checksums mean damage on one side; the follower must get a new copy.
    """
    if running == hello.running:
        return plan
    return NeedBootstrap(first=view.first, reason="checksum")


def check_loss(hello: Hello, view: LogView) -> Refused | None:
    """Refuse to replace what a follower knows to be committed, where that can only be our own loss.

    Under a synchronous rule every promotion finds what is committed, so a primary that lacks it lost its
    disk or was restored from an older copy. Only force may go on then; do not ask here after it, nor in
    asynchronous mode.
    """
    shared = view.epochs.common(view.last, hello.epochs, hello.last.offset)
    if shared >= hello.committed:
        return None
    if hello.branch != view.branch:
        return None  # a branch that ours was forced out of, which is how it comes to lack them
    text = (
        f"{hello.name} knows records {shared + 1} to {hello.committed} as committed,"
        f" and {view.name} lacks them: it lost data"
    )
    return Refused(reason="unfenced", message=text, epoch=view.epoch)


def voter_change(hello: Hello, configuration: Configuration) -> Configuration | None:
    """The configuration with this follower, which has caught up, as a voter at its present address whose copy
    counts; ``None`` if it is that already, or may not become one (unnamed, unwilling, removed by hand).

    ``ValueError`` when it wants to and cannot: its name is another voter's, or member numbers are used up.
    """
    voter = configuration.voter(hello.store_id)
    if voter is not None and voter.away:
        return configuration.with_copy_of(hello.store_id)
    if voter is None:
        if not (hello.name and hello.voter) or hello.store_id in configuration.removed:
            return None
        return configuration.with_voter(hello.store_id, hello.name, hello.address)
    if not hello.address or hello.address == voter.address:
        return None
    return configuration.changed(hello.store_id, address=hello.address)


def refusal(hello: Hello, view: LogView) -> Refused | None:
    """Why this follower may not even be asked for a promise; ``None`` when it may."""
    if hello.protocol_min > PROTOCOL or hello.protocol_max < PROTOCOL_MIN:
        theirs = f"{hello.protocol_min}..{hello.protocol_max}"
        text = f"{view.name} speaks protocols {PROTOCOL_MIN}..{PROTOCOL}, {hello.name} {theirs}"
        return _refused("protocol", text, view)
    if hello.store_id == view.store_id:
        return _refused("self", f"{view.name} cannot follow itself", view)
    if hello.lineage and hello.lineage != view.lineage:
        return _refused("lineage", f"{hello.name} holds another store than {view.name}", view)
    fault = _fault(hello)
    return _refused("bad-hello", fault, view) if fault else None


def _fault(hello: Hello) -> str:
    """What in a Hello contradicts itself; empty when nothing does."""
    last = hello.last
    if not 0 <= hello.applied <= hello.committed <= last.offset:
        return f"applied {hello.applied} <= committed {hello.committed} <= last {last.offset} does not hold"
    if hello.epochs.last_epoch != last.epoch or hello.epochs.epoch_at(last.offset) != last.epoch:
        return f"the epoch table does not end at {last}"
    if (last.offset == 0) != (last.epoch == 0):
        return f"{last} is not a position"
    if last.offset and not hello.lineage:
        return "records without a lineage"
    return ""


def agreed_protocol(hello: Hello) -> int:
    """The newest protocol that both ends speak. The caller has checked that there is one."""
    return min(PROTOCOL, hello.protocol_max)


def _refused(reason: str, message: str, view: LogView) -> Refused:
    return Refused(reason=reason, message=message, primary_address=view.primary_address, epoch=view.epoch)
