"""Promotion, step by step: ask without binding anybody, then collect promises, fetch what is missing, begin.

The rules are in ``replication/promotion.py``; this module carries them out over unary calls. Asking first
means that a promotion that cannot succeed leaves no promise behind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvrep.errors import Error, Fenced, NotPrimary, ProtocolError, UnsafePromotion
from kvrep.model.configuration import Acks, Configuration, Voter
from kvrep.model.position import EpochTable, Position, epoch_after
from kvrep.replication.messages import Promise
from kvrep.replication.promotion import Promotion

if TYPE_CHECKING:
    from kvrep.runtime.node import Node
    from kvrep.runtime.roles import Roles

__all__ = ["Peer", "answer_promise", "answer_records", "answer_standing", "ask_all", "promise_of", "promote"]

log = logging.getLogger("kvrep.replication")

ASK_TIMEOUT_S = 2.0
ATTEMPTS_MAX = 3
FETCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Force:
    """Promote without the promises it would take, knowing that acknowledged writes may be lost."""

    voters: tuple[str, ...] = ()
    """Names of those who vote from then on, this node included; empty: this node alone."""
    acks: Acks | None = None
    """The ack rule from then on; ``None`` keeps it, unless this node is alone: then 0."""


@dataclass(frozen=True, slots=True)
class Peer:
    """What a voter answered about itself."""

    voter: Voter
    promise: Promise
    """Its promised epoch and what its log holds."""
    primary_epoch: int
    """The epoch in which it is primary; 0 when it is not."""
    primary_address: str
    """Where it says the primary is; empty when it does not know."""


# -- the side that asks --------------------------------------------------------------------------------


def promote(roles: Roles, deadline_s: float, force: Force | None = None) -> int:
    """Make this node primary; returns the epoch.

    Raises :class:`UnsafePromotion` that names who is missing and what could be lost; then nothing changed,
    except that some voters may have promised an epoch in which nobody is primary (a primary that meets such a
    promise promotes itself anew).
    """
    node = roles.node
    engine = node.engine
    home = engine.home
    effective, proposed = engine.configurations_in_force()
    if force is not None:
        return _promote_by_force(roles, effective, force, deadline_s)
    me = effective.voter(home.store_id) or (proposed[1].voter(home.store_id) if proposed else None)
    if me is None or me.witness:
        raise UnsafePromotion(
            f"{node.label} is not a data voter of its group",
            hint="promote one of the voters that status() lists",
            missing=(),
            needed=effective.fence,
            answered=0,
        )
    if engine.tail.offset < home.vote_floor:
        raise UnsafePromotion(
            f"{node.label} has confirmed records up to {home.vote_floor} and does not hold them any more",
            hint="let it catch up, or promote another voter",
            missing=(),
            needed=effective.fence,
            answered=0,
        )
    rules = () if proposed is None else (proposed[1],)
    seen = 0
    for _ in range(ATTEMPTS_MAX):
        peers = ask_all(roles, "standing", {}, deadline_s)
        asked = _promotion(node, effective, rules, node.next_epoch(seen), peers)
        if not asked.would_be_enough:
            raise _unsafe(node, asked, answered=len(peers) + 1)
        seen = max(seen, asked.highest_seen)
        epoch = node.next_epoch(seen)
        with roles.standing_still():
            promotion = _collect(roles, effective, rules, epoch, deadline_s)
            if promotion.superseded:
                seen = promotion.highest_seen
                continue
            if not promotion.enough:
                raise _unsafe(node, promotion, answered=len(promotion.promised))
            _fetch_all(roles, promotion, deadline_s)
            roles.take_over(epoch, promotion.promised)
            return epoch
    raise UnsafePromotion(
        f"other promotions came between, the last one at epoch {seen}",
        hint="see who is primary now",
        missing=(),
        needed=effective.fence,
        answered=0,
    )


def _promote_by_force(roles: Roles, effective: Configuration, force: Force, deadline_s: float) -> int:
    """Take what promises and records can be had, and begin a new branch under a new configuration."""
    node = roles.node
    configuration = _forced_configuration(node, effective, force)
    peers = ask_all(roles, "standing", {}, deadline_s)
    me = configuration.voter(node.engine.home.store_id)
    assert me is not None
    seen = max([node.next_epoch(), *(max(p.promise.epoch, p.promise.last.epoch) for p in peers)])
    epoch = epoch_after(seen, me.member)
    with roles.standing_still():
        promotion = _collect(roles, effective, (), epoch, deadline_s)
        _fetch_all(roles, promotion, deadline_s, complete=False)
        missing = ", ".join(promotion.missing)
        log.warning("%s: promoted by force in epoch %d, without the promises of: %s",
                    node.label, epoch, missing or "nobody")  # fmt: skip
        roles.take_over(epoch, promotion.promised, configuration)
    return epoch


def _forced_configuration(node: Node, effective: Configuration, force: Force) -> Configuration:
    """The configuration that the forced epoch starts with; ``ValueError`` for names that are no voters."""
    home = node.engine.home
    if effective.voter(home.store_id) is None:
        effective = effective.with_voter(home.store_id, home.name, node.address)
    names = set(force.voters) | {home.name}
    unknown = names - {v.name for v in effective.voters}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: not voters; they are"
                         f" {', '.join(v.name for v in effective.voters)}")  # fmt: skip
    voters = tuple(v for v in effective.voters if v.name in names)
    acks = force.acks if force.acks is not None else (effective.acks if len(voters) > 1 else 0)
    return replace(effective, voters=voters, acks=acks)


def _promotion(
    node: Node, effective: Configuration, rules: tuple[Configuration, ...], epoch: int, peers: list[Peer]
) -> Promotion:
    promotion = Promotion(
        effective, node.engine.home.store_id, epoch, promise_of(node, epoch), proposed=rules
    )
    for peer in peers:
        promotion.on_promise(peer.voter.store_id, peer.promise)
    return promotion


def _collect(
    roles: Roles, effective: Configuration, rules: tuple[Configuration, ...], epoch: int, deadline_s: float
) -> Promotion:
    """Promise ``epoch`` ourselves, durably, then ask the others to."""
    node = roles.node
    home = node.engine.home
    with node.engine.committer.lead:
        if not home.promise(epoch, home.store_id):
            raise Fenced(
                f"epoch {home.promised_epoch} has been promised meanwhile", epoch=home.promised_epoch
            )
    request = {
        "epoch": epoch,
        "store_id": home.store_id,
        "name": home.name,
        "address": node.address,
        "lineage": home.lineage,
    }
    peers = ask_all(roles, "promise", request, deadline_s)
    return _promotion(node, effective, rules, epoch, peers)


def ask_all(roles: Roles, method: str, request: Mapping[str, Any], deadline_s: float) -> list[Peer]:
    """Ask every other voter with a known address at once; those that answered in time, in no order."""
    node = roles.node
    found: list[Peer] = []
    # Protects the list that the asking threads add to.
    lock = threading.Lock()

    def ask(voter: Voter) -> None:
        try:
            answer = roles.call(
                voter.address, method, request, min(ASK_TIMEOUT_S, deadline_s - time.monotonic())
            )
            peer = _peer(voter, answer)
        except (Error, ValueError) as error:
            log.debug("%s: %s at %s: %s", node.label, voter.name, voter.address, error)
            return
        with lock:
            found.append(peer)

    threads = [
        threading.Thread(target=ask, args=(voter,), name=f"kvrep-ask-{node.label}", daemon=True)
        for voter in roles.other_voters()
        if voter.address
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.1, deadline_s - time.monotonic() + 0.5))
    with lock:
        return list(found)


def _peer(voter: Voter, answer: Mapping[str, Any]) -> Peer:
    try:
        if bytes(answer["store_id"]) != voter.store_id:
            raise ProtocolError(f"another store answers at {voter.address}")
        promise = Promise(
            epoch=int(answer["promised"]),
            last=Position(*(int(n) for n in answer["last"])),
            committed=int(answer["committed"]),
            epochs=EpochTable((int(e), int(f)) for e, f in answer["epochs"]),
        )
        return Peer(voter, promise, int(answer["primary_epoch"]), str(answer["primary_address"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"{voter.name} answered what is not a standing: {error}") from error


def _unsafe(node: Node, promotion: Promotion, *, answered: int) -> UnsafePromotion:
    names = promotion.missing
    configuration = node.engine.configuration
    lost = (
        "what only they acknowledged would be lost"
        if configuration.synchronous
        else "with acks=0 nobody can know what only the old primary holds"
    )
    return UnsafePromotion(
        f"{promotion.needed} data voters must promise, {answered} answered; missing: {', '.join(names)};"
        f" {lost}",
        hint="start or reach the missing voters, or accept the loss with promote(force=True, …)",
        missing=names,
        needed=promotion.needed,
        answered=answered,
    )


def _fetch_all(roles: Roles, promotion: Promotion, deadline_s: float, *, complete: bool = True) -> None:
    """Make our log equal to the best one among those that promised."""
    node = roles.node
    engine = node.engine
    while (fetch := promotion.fetch) is not None:
        log.info("%s: fetches records after %s through %s from %s",
                 node.label, fetch.after, fetch.to, fetch.voter.name)  # fmt: skip
        if fetch.after.offset < engine.tail.offset:
            engine.cut(fetch.after.offset, reason=f"{fetch.voter.name} holds a newer history")
        while engine.tail.offset < fetch.to.offset:
            left = deadline_s - time.monotonic()
            if left <= 0:
                raise UnsafePromotion(
                    f"the records of {fetch.voter.name} could not be fetched in time",
                    missing=(fetch.voter.name,),
                    needed=promotion.needed,
                    answered=len(promotion.promised),
                )
            first = engine.tail.offset + 1
            answer = roles.call(fetch.voter.address, "records", {"first": first, "bytes": FETCH_BYTES}, left)
            if not answer.get("data"):
                raise ProtocolError(f"{fetch.voter.name} has no record {first}")
            engine.append(first, bytes(answer["data"]), sync=True)
        promotion.fetched(promise_of(node, promotion.epoch))
        for _, configuration in engine.configurations[-2:]:
            if configuration.voters:
                promotion.learned(configuration)
        if complete and not promotion.enough:
            raise _unsafe(node, promotion, answered=len(promotion.promised))


# -- the side that answers -----------------------------------------------------------------------------


def promise_of(node: Node, epoch: int) -> Promise:
    """What this node's log holds now, under a promise of ``epoch``."""
    engine = node.engine
    tail = engine.tail
    return Promise(
        epoch=epoch,
        last=Position(tail.epoch, tail.offset),
        committed=engine.committer.committed,
        epochs=engine.epochs,
    )


def answer_standing(node: Node, request: Mapping[str, Any]) -> dict[str, Any]:
    """What this node is and holds; binds it to nothing."""
    del request
    home = node.engine.home
    promise = promise_of(node, home.promised_epoch)
    return {
        "store_id": home.store_id,
        "name": home.name,
        "lineage": home.lineage,
        "promised": promise.epoch,
        "last": list(promise.last),
        "committed": promise.committed,
        "epochs": [list(entry) for entry in promise.epochs],
        "primary_epoch": node.primary_epoch,
        "primary_address": node.primary_address,
    }


def answer_promise(node: Node, request: Mapping[str, Any]) -> dict[str, Any]:
    """Promise durably to refuse every epoch below the one asked for, and say what the log holds then.

    The log's end is read under the lock that appends take: an ack that leaves later carries the promise.
    Refused to strangers, and by a node whose disk cannot store the promise.
    """
    engine = node.engine
    home = engine.home
    try:
        epoch = int(request["epoch"])
        asker, address = bytes(request["store_id"]), str(request["address"])
        lineage = bytes(request["lineage"])
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"not a request for a promise: {error}") from error
    if lineage != home.lineage or not any(c.voter(asker) for _, c in engine.configurations[-8:]):
        raise NotPrimary(
            "a promise is given to voters of the same store only", primary_address=None, epoch=None
        )
    if engine.tail.offset < home.vote_floor:
        raise ProtocolError(f"this node lacks records that it has confirmed (up to {home.vote_floor})")
    with engine.committer.lead:
        engine.committer.log.sync()
        home.promise(epoch, asker)
        if home.promised_epoch == epoch and home.promised_to == asker:
            # Under the lock: nothing may be appended, or acked, in the old epoch after this answer was made.
            node.roles.promised(epoch, address)
        return answer_standing(node, {})


def answer_records(node: Node, request: Mapping[str, Any]) -> dict[str, Any]:
    """Raw records from ``first`` on, for a promoter that lacks them."""
    first, size = int(request.get("first", 0)), int(request.get("bytes", FETCH_BYTES))
    run = node.engine.committer.log.read(first, min(max(size, 1), 4 * FETCH_BYTES))
    if run is None:
        return {"first": first, "last": first - 1, "data": b""}
    return {"first": run.first, "last": run.last, "data": run.data}
