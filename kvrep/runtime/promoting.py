"""Promotion, step by step: ask without binding anybody, then collect promises, fetch what is missing, begin.

The rules are in ``replication/promotion.py``; this module carries them out over unary calls. Asking first
means that a promotion that cannot succeed leaves no promise behind.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvrep.errors import (
    DigestMismatch,
    Error,
    Fenced,
    NotPrimary,
    ProtocolError,
    ReplicationError,
    UnsafePromotion,
)
from kvrep.model.configuration import Acks, Configuration, Voter
from kvrep.model.position import ZERO, EpochTable, Position, epoch_after
from kvrep.replication.messages import Promise
from kvrep.replication.promotion import Fetch, Promotion

if TYPE_CHECKING:
    from kvrep.runtime.node import Node
    from kvrep.runtime.roles import Roles
    from kvrep.storage.engine import Engine

__all__ = [
    "Force",
    "Peer",
    "answer_lower",
    "answer_members",
    "answer_promise",
    "answer_records",
    "answer_standing",
    "ask_all",
    "fetch_all",
    "promise_of",
    "promote",
    "rules_of",
]

log = logging.getLogger("kvrep.replication")

ASK_TIMEOUT_S = 2.0
GRACE_S = 0.03
"""How long answers are still waited for once there are enough."""
ATTEMPTS_MAX = 4
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
    fenced: bool
    """Whether its epoch was made by a full fence, or by force."""


# -- the side that asks --------------------------------------------------------------------------------


def promote(roles: Roles, deadline_s: float, force: Force | None = None, *, asked: bool = False) -> int:
    """Make this node primary; returns the epoch. The roles' lock is held.

    Raises :class:`UnsafePromotion` that names who is missing and what could be lost, or :class:`Fenced` when
    another node's promotion came first; then nothing changed, except that some voters may have promised an
    epoch in which nobody is primary (a primary that meets such a promise promotes itself anew).
    ``asked``: it is known already that the voters are there, so nobody is asked first.
    """
    node = roles.node
    engine = node.engine
    if force is not None:
        return _promote_by_force(roles, force, deadline_s)
    rival = seen = 0
    for attempt in range(ATTEMPTS_MAX):
        effective, rules = rules_of(engine)
        _check_candidate(node, effective, rules)
        if attempt or not asked:
            peers = ask_all(roles, "standing", {}, deadline_s, _would_do(node, effective, rules))
            newest = max(peers, key=lambda peer: peer.primary_epoch, default=None)
            if newest is not None and newest.primary_epoch > rival:
                if attempt:  # somebody was promoted since we began: two at once, and that one won
                    raise Fenced(
                        f"{newest.voter.name} became primary meanwhile, in epoch {newest.primary_epoch}",
                        epoch=newest.primary_epoch,
                        primary_address=newest.voter.address,
                    )
                rival = newest.primary_epoch
            told = _promotion(node, effective, rules, node.next_epoch(seen), peers)
            if not told.would_be_enough:
                raise _unsafe(node, told, answered=len(peers) + 1)
            if told.would_lack:
                raise _lacking(node, told)
            seen = max(seen, told.highest_seen)
        epoch = node.next_epoch(seen)
        with roles.standing_still():
            try:
                promotion = _collect(roles, effective, rules, epoch, deadline_s)
            except Fenced as error:
                seen = error.epoch
                continue
            if promotion is not None and not promotion.superseded:
                if not promotion.enough:
                    raise _unsafe(node, promotion, answered=len(promotion.promised))
                fetch_all(roles, promotion, deadline_s)
                _check_candidate(node, *rules_of(engine))
                roles.take_over(epoch, promotion.promised)
                return epoch
            seen = promotion.highest_seen if promotion is not None else 0
        # Another promotion is under way. Ours goes on a little later, unless that one has succeeded.
        roles.pause(random.uniform(0.02, 0.1) * (attempt + 1))
    raise Fenced(f"other promotions came between, the last one at epoch {seen}", epoch=seen)


def rules_of(engine: Engine) -> tuple[Configuration, tuple[Configuration, ...]]:
    """The configuration in effect, and those that may be, too."""
    effective, proposed = engine.configurations_in_force()
    return effective, () if proposed is None else (proposed[1],)


def _check_candidate(node: Node, effective: Configuration, rules: tuple[Configuration, ...]) -> None:
    """``UnsafePromotion`` unless this node is a data voter that holds all it ever confirmed.

    ``DigestMismatch`` where its log is right and its LMDB is not: it would show wrong values.
    """
    home = node.engine.home
    voter = (rules[-1] if rules else effective).voter(home.store_id)
    text, hint = "", ""
    if voter is None or voter.witness:
        text = f"{node.label} is not a data voter of its group"
        hint = "promote one of the voters that status() lists"
    elif node.engine.tail.offset < home.vote_floor:
        text = f"{node.label} has confirmed records up to {home.vote_floor} and does not hold them any more"
        hint = "let it catch up, or promote another voter"
    if text:
        raise UnsafePromotion(text, hint=hint, missing=(), needed=effective.fence, answered=0)
    at = node.engine.tree.state.diverged
    if at:
        raise DigestMismatch(
            f"the copy of {node.label} differs from its log since record {at} or before", at=at
        )


def _would_do(
    node: Node, effective: Configuration, rules: tuple[Configuration, ...]
) -> Callable[[list[Peer]], bool]:
    """Whether these answers are enough to ask for promises."""
    return lambda peers: _promotion(node, effective, rules, node.next_epoch(), peers).would_be_enough


def _promote_by_force(roles: Roles, force: Force, deadline_s: float) -> int:
    """Take what promises and records can be had, and begin a new branch under a new configuration."""
    node = roles.node
    configuration = _forced_configuration(node, node.engine.configuration, force)
    me = configuration.voter(node.engine.home.store_id)
    assert me is not None
    seen = 0
    for _ in range(ATTEMPTS_MAX):
        peers = ask_all(roles, "standing", {}, deadline_s)
        seen = max([node.next_epoch(seen), *(max(p.promise.epoch, p.promise.last.epoch) for p in peers)])
        epoch = epoch_after(seen, me.member)
        with roles.standing_still():
            promotion = _collect(roles, node.engine.configuration, (), epoch, deadline_s, outside=False)
            if promotion is None or promotion.superseded:
                continue
            _fetch_what_can_be_had(roles, promotion, deadline_s)
            missing = ", ".join(promotion.missing)
            log.warning("%s: promoted by force in epoch %d, without the promises of: %s",
                        node.label, epoch, missing or "nobody")  # fmt: skip
            roles.take_over(epoch, promotion.promised, configuration)
            return epoch
    raise Fenced(f"other promotions came between, the last one at epoch {seen}", epoch=seen)


def _fetch_what_can_be_had(roles: Roles, promotion: Promotion, deadline_s: float) -> None:
    try:
        fetch_all(roles, promotion, deadline_s, forced=True)
    except (UnsafePromotion, ReplicationError) as error:
        log.warning("%s: goes on by force without the records of a voter: %s", roles.node.label, error)


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
    return replace(
        effective,
        voters=voters,
        acks=acks,
        degrade_after_s=effective.degrade_after_s if acks else 0.0,
        lag_records_max=effective.lag_records_max if not acks else 0,
    ).with_all_copies()


def _promotion(
    node: Node, effective: Configuration, rules: tuple[Configuration, ...], epoch: int, peers: list[Peer]
) -> Promotion:
    promotion = Promotion(
        effective,
        node.engine.home.store_id,
        epoch,
        promise_of(node, epoch),
        proposed=rules,
        outside_votes=node.coordinator.outside_votes,
    )
    for peer in peers:
        promotion.on_promise(peer.voter.store_id, peer.promise)
    return promotion


def _collect(
    roles: Roles,
    effective: Configuration,
    rules: tuple[Configuration, ...],
    epoch: int,
    deadline_s: float,
    *,
    outside: bool = True,
) -> Promotion | None:
    """Promise ``epoch`` ourselves, durably, then ask the others to; ``None`` if a higher one came between."""
    node = roles.node
    home = node.engine.home
    with node.engine.committer.lead:
        node.engine.committer.log.sync()
        if not home.promise(epoch, home.store_id):
            return None
    request = {
        "epoch": epoch,
        "store_id": home.store_id,
        "name": home.name,
        "address": node.address,
        "lineage": home.lineage,
    }

    def enough(peers: list[Peer]) -> bool:
        promotion = _promotion(node, effective, rules, epoch, peers)
        return promotion.enough or promotion.superseded

    peers = ask_all(roles, "promise", request, deadline_s, enough)
    promotion = _promotion(node, effective, rules, epoch, peers)
    if outside and promotion.needs_majority and not promotion.majority:
        noted = node.coordinator.remember(epoch)
        if noted is not None:
            promotion.on_outside(noted)
    return promotion


def ask_all(
    roles: Roles,
    method: str,
    request: Mapping[str, Any],
    deadline_s: float,
    enough: Callable[[list[Peer]], bool] | None = None,
) -> list[Peer]:
    """Ask every other voter with a known address at once, each on a thread of ``roles``; those that answered in
    time, in no order.

    Once the answers are ``enough``, only those that come right behind are waited for: a voter that is cut off
    must not hold up the rest. Raises :class:`ClosedError` when this node is closing.
    """
    node = roles.node
    voters = [voter for voter in roles.other_voters() if voter.address]
    deadline_s = min(deadline_s, time.monotonic() + ASK_TIMEOUT_S)
    found: list[Peer] = []
    # Protects the answers and announces each.
    answered = threading.Condition()
    left = len(voters)

    def ask(voter: Voter) -> None:
        nonlocal left
        peer = None
        try:
            left_s = deadline_s - time.monotonic()
            if left_s > 0:  # else it waited for a thread, and nobody waits for the answer any more
                peer = _peer(voter, roles.call(voter.address, method, request, left_s))
        except (Error, ValueError) as error:
            log.debug("%s: %s at %s: %s", node.label, voter.name, voter.address, error)
        except Exception:
            log.exception("%s: asking %s at %s", node.label, voter.name, voter.address)
        with answered:
            left -= 1
            if peer is not None:
                found.append(peer)
            answered.notify_all()

    for voter in voters:
        roles.ask(ask, voter)
    until = deadline_s + 0.2
    sufficient = False
    with answered:
        while left and (now := time.monotonic()) < until:
            if enough is not None and not sufficient and enough(found):
                sufficient, until = True, min(until, now + GRACE_S)
                continue
            answered.wait(until - now)
        peers = list(found)
    roles.need_open()
    return peers


def _peer(voter: Voter, answer: Mapping[str, Any]) -> Peer:
    try:
        if bytes(answer["store_id"]) != voter.store_id:
            raise ProtocolError(f"another store answers at {voter.address}")
        promise = Promise(
            epoch=int(answer["promised"]),
            last=Position(*(int(n) for n in answer["last"])),
            committed=int(answer["committed"]),
            epochs=EpochTable((int(e), int(f)) for e, f in answer["epochs"]),
            lowered=Position(*(int(n) for n in answer.get("lowered", ZERO))),
        )
        return Peer(
            voter,
            promise,
            int(answer["primary_epoch"]),
            str(answer["primary_address"]),
            bool(answer.get("fenced")),
        )
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
    most = " and most voters" if promotion.needs_majority else ""
    mute = [v.name for v in node.roles.other_voters() if v.name in names and not v.address]
    if mute:
        lost += f"; {', '.join(mute)} cannot be asked, being opened without listen="
    return UnsafePromotion(
        f"{promotion.needed} data voters{most} must promise, {answered} answered; missing: {', '.join(names)};"
        f" {lost}",
        hint="start or reach the missing voters, or accept the loss with promote(force=True, …)",
        missing=names,
        needed=promotion.needed,
        answered=answered,
    )


def _lacking(node: Node, promotion: Promotion) -> UnsafePromotion:
    return UnsafePromotion(
        f"records from {promotion.lowered} on were acknowledged with fewer copies than the rule asks for, and"
        f" neither {node.label}, which ends at {promotion.own.last}, nor any other that answered holds them",
        hint="start the node that was primary then, or accept the loss with promote(force=True, …)",
        missing=promotion.missing,
        needed=promotion.needed,
        answered=len(promotion.promised),
    )


def fetch_all(
    roles: Roles,
    promotion: Promotion,
    deadline_s: float,
    *,
    forced: bool = False,
    addresses: Mapping[bytes, str] | None = None,
) -> None:
    """Make our log equal to the best one among those that promised."""
    node = roles.node
    engine = node.engine
    while (fetch := promotion.fetch) is not None:
        log.info("%s: fetches records after %s through %s from %s",
                 node.label, fetch.after, fetch.to, fetch.voter.name)  # fmt: skip
        address = (addresses or {}).get(fetch.voter.store_id) or fetch.voter.address
        _check_fetch(node, promotion, fetch, forced=forced)
        if fetch.after.offset < engine.tail.offset:
            engine.cut(fetch.after.offset, reason=f"{fetch.voter.name} holds a newer history")
        while engine.tail.offset < fetch.to.offset:
            left = deadline_s - time.monotonic()
            if left <= 0:
                raise _unfetched(promotion, fetch, "could not be fetched in time")
            first = engine.tail.offset + 1
            try:
                request = {"first": first, "bytes": FETCH_BYTES}
                answer = roles.call(address, "records", request, left)
            except ReplicationError as error:
                raise _unfetched(promotion, fetch, f"could not be fetched: {error}") from error
            if not answer.get("data"):
                raise _unfetched(promotion, fetch, f"end before {first}")
            engine.append(first, bytes(answer["data"]), sync=True, epoch=promotion.epoch)
        promotion.fetched(promise_of(node, promotion.epoch))
        for _, configuration in engine.configurations[-2:]:
            if configuration.voters:
                promotion.learned(configuration)
        if not forced and not promotion.enough:
            raise _unsafe(node, promotion, answered=len(promotion.promised))
    if forced:
        return
    if not promotion.enough:
        raise _unsafe(node, promotion, answered=len(promotion.promised))
    if promotion.lacks:
        raise _lacking(node, promotion)
    if engine.configuration.synchronous:  # our log holds all that is committed, and they know more of it
        engine.committer.commit_through(promotion.committed)


def _check_fetch(node: Node, promotion: Promotion, fetch: Fetch, *, forced: bool) -> None:
    """``UnsafePromotion`` when taking over that history would drop what may not, or cannot, be dropped."""
    engine = node.engine
    problem = fetch.problem(
        engine.tree.state.applied.offset, may_drop=forced or not engine.configuration.synchronous
    )
    if problem:
        raise _unfetched(promotion, fetch, problem)


def _unfetched(promotion: Promotion, fetch: Fetch, what: str) -> UnsafePromotion:
    name = fetch.voter.name
    return UnsafePromotion(
        f"{name} holds newer records, and they {what}",
        hint=f"promote {name} instead",
        missing=(name,),
        needed=promotion.needed,
        answered=len(promotion.promised),
    )


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
        lowered=engine.home.lowered,
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
        "lowered": list(promise.lowered),
        "primary_epoch": node.primary_epoch,
        "primary_address": node.primary_address,
        "fenced": node.fenced,
        "witness": node.witness,
    }


def answer_members(node: Node, request: Mapping[str, Any]) -> dict[str, Any]:
    """Who votes, and what each of them is: this node asks them all."""
    timeout_s = min(max(0.1, float(request.get("timeout_s", ASK_TIMEOUT_S))), ASK_TIMEOUT_S)
    configuration = node.engine.configuration
    answers = {p.voter.store_id: p for p in ask_all(node.roles, "standing", {}, time.monotonic() + timeout_s)}
    home = node.engine.home
    own = promise_of(node, home.promised_epoch)
    members = []
    for voter in configuration.voters:
        peer = answers.get(voter.store_id)
        mine = voter.store_id == home.store_id
        promise = own if mine else peer.promise if peer is not None else None
        leads = node.primary_epoch if mine else peer.primary_epoch if peer is not None else 0
        role = "primary" if leads else "witness" if voter.witness else "follower"
        members.append(
            {
                "name": voter.name,
                "store_id": voter.store_id.hex(),
                "address": node.address if mine else voter.address,
                "member": voter.member,
                "priority": voter.priority,
                "witness": voter.witness,
                "away": voter.away,
                "answered": promise is not None,
                "role": role if promise is not None else "no answer",
                "epoch": promise.last.epoch if promise is not None else 0,
                "promised": promise.epoch if promise is not None else 0,
                "last": promise.last.offset if promise is not None else 0,
                "committed": promise.committed if promise is not None else 0,
            }
        )
    return {
        "members": members,
        "acks": configuration.acks,
        "copies": configuration.copies,
        "fence": configuration.fence,
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
    _need_voter(node, asker, lineage)
    if engine.tail.offset < home.vote_floor:
        raise ProtocolError(f"this node lacks records that it has confirmed (up to {home.vote_floor})")
    with engine.committer.lead:
        engine.committer.log.sync()
        granted = home.promise(epoch, asker)
        if granted:
            # Under the lock: nothing may be appended, or acked, in the old epoch after this answer was made.
            node.roles.promised(epoch, address)
        answer = answer_standing(node, {})
    if not granted and answer["promised"] == epoch:
        answer["promised"] = (
            epoch + 1
        )  # this very epoch is another's, as only a copied member number makes it
    return answer


def _need_voter(node: Node, asker: bytes, lineage: bytes) -> None:
    """Refuse strangers. (A witness has no log that tells who votes.)"""
    known = node.witness or any(c.voter(asker) for _, c in node.engine.configurations[-8:])
    if lineage != node.engine.home.lineage or not known:
        raise NotPrimary(
            "a promise is given to voters of the same store only", primary_address=None, epoch=None
        )


def answer_lower(node: Node, request: Mapping[str, Any]) -> dict[str, Any]:
    """Durably note that from a record on fewer copies are enough, for the primary of that record's epoch.

    That is a promise of its epoch, too. Where a higher one was promised nothing is noted, as the answer shows.
    """
    home = node.engine.home
    try:
        position = Position(int(request["epoch"]), int(request["offset"]))
        asker, lineage = bytes(request["store_id"]), bytes(request["lineage"])
        address = str(request["address"])
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"not a request to go on with fewer copies: {error}") from error
    _need_voter(node, asker, lineage)
    with node.engine.committer.lead:
        if position.epoch > home.promised_epoch:
            home.promise(position.epoch, asker)
            node.roles.promised(position.epoch, "" if node.witness else address)
        home.lower(position)
    return answer_standing(node, {})


def answer_records(node: Node, request: Mapping[str, Any]) -> dict[str, Any]:
    """Raw records from ``first`` on, for a promoter that lacks them."""
    first, size = int(request.get("first", 0)), int(request.get("bytes", FETCH_BYTES))
    run = node.engine.committer.log.read(first, min(max(size, 1), 4 * FETCH_BYTES))
    if run is None:
        return {"first": first, "last": first - 1, "data": b""}
    return {"first": run.first, "last": run.last, "data": run.data}
