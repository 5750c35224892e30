"""This node among those that may be asked: who and where they are, what it asks them, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping

from kvrep.model.configuration import Voter
from kvrep.replication.ballots import Answer, PrimarySeen, PromiseRequest, Purpose, Question
from kvrep.replication.election.interface import Ask, Peer, Standing

__all__ = ["Group"]


class Group:
    """``priority`` is this node's own while it is no voter yet."""

    def __init__(self, own: Standing, peers: Mapping[str, str], priority: int) -> None:
        self.own = own
        self.peers = dict(peers)
        """Addresses by name, as this node was given them, its own included."""
        self.priority = priority
        self.known: dict[str, Answer] = {}
        """The newest answer of each peer, for addresses and names."""
        self._questions = 0

    @property
    def listed(self) -> tuple[tuple[str, str], ...]:
        """``peers`` as nodes compare them that are to form a group."""
        return tuple(sorted(self.peers.items()))

    def others(self) -> tuple[Peer, ...]:
        """Everybody whose answer may matter, each once, by name; ``peers`` knows addresses best."""
        voters = [voter for rule in self.own.rules for voter in rule.voters]
        found = {voter.name: voter.address or self._told(voter) for voter in voters} | self.peers
        found.pop(self.own.name, None)
        return tuple(Peer(name, address) for name, address in sorted(found.items()) if address)

    def voters(self) -> tuple[Peer, ...]:
        """Those of the others that vote."""
        names = {v.name for rule in self.own.rules for v in rule.voters}
        return tuple(p for p in self.others() if p.name in names)

    def address_of(self, voter: Voter) -> str:
        return self.peers.get(voter.name) or voter.address or self._told(voter)

    def _told(self, voter: Voter) -> str:
        known = self.known.get(voter.name)
        return known.address if known is not None else ""

    def question(
        self,
        purpose: Purpose,
        to: tuple[Peer, ...],
        now: float,
        *,
        gone: bool,
        epoch: int = 0,
        begun: bool = False,
    ) -> Ask:
        own = self.own
        self._questions += 1
        question = Question(
            purpose=purpose,
            store_id=own.store_id,
            name=own.name,
            address=own.address,
            lineage=own.lineage,
            epoch=epoch,
            last=own.last,
            gone=gone,
            begun=begun,
            peers=self.listed if own.empty else (),
        )
        return Ask(to=to, question=question, asked_at=now, number=self._questions)

    def answer(self, alive: PrimarySeen | None, *, would: bool, why: str) -> Answer:
        own, voter = self.own, self.own.voter
        return Answer(
            store_id=own.store_id,
            name=own.name,
            address=own.address,
            lineage=own.lineage,
            promised_epoch=own.promised_epoch,
            last=own.last,
            would=would,
            why=why,
            able=own.could,
            priority=voter.priority if voter is not None else self.priority,
            member=voter.member if voter is not None else 0,
            witness=own.witness,
            empty=own.empty,
            alive=alive,
            peers=self.listed if own.empty or own.witness else (),
        )

    def objection(self, question: Question, alive: PrimarySeen | None) -> str:
        """Why this node would not promise the asker an epoch; empty if it would. ``alive``: the primary it knows."""
        own = self.own
        if not own.lineage and not own.empty:
            return "this node holds data without a group"
        if not own.able and not own.witness:
            return "this node's copy is not whole"
        if alive is not None and alive.store_id != question.store_id:
            return f"{alive.name} is primary, and alive"
        if own.could and own.last > question.last:
            return f"this node holds {own.last}, the candidate {question.last}"
        if own.lowered > question.last:
            return f"records from {own.lowered} on were acknowledged without the candidate"
        return ""

    def refusal(self, request: PromiseRequest, alive: PrimarySeen | None) -> str:
        """Why this node refuses the promise that it is asked for; empty if it gives it."""
        own = self.own
        if request.epoch < own.promised_epoch:
            return f"epoch {own.promised_epoch} was promised here"
        if not request.lineage:
            if own.lineage or not own.empty:
                return "this node belongs to a group already"
            if request.peers != self.listed:
                return "this node was given another list of peers"
        elif request.lineage != own.lineage and (own.lineage or not own.empty):
            return "this node belongs to another group"
        if not own.able and not own.witness:
            return "this node's copy is not whole"
        if alive is not None and alive.store_id != request.store_id and not request.planned:
            return f"{alive.name} is primary, and alive"
        return ""
