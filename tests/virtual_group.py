"""A whole group in virtual time: elections, promotions and replication over a network that misbehaves.

One thread, one queue of events, one seeded source of chance. Nodes keep what is durable across crashes and
lose the rest. What is decided is decided by the modules under test (election, promotion, join, acks); only
the moving of records is a model of its own. A ledger remembers what any primary ever committed: nobody may
commit something else in its place, or begin an epoch without it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvrep.model.configuration import Acks, Configuration, Voter
from kvrep.model.position import ZERO, EpochTable, Position
from kvrep.replication.acks import CommitTracker
from kvrep.replication.ballots import Answer, PrimarySeen, PromiseReply, PromiseRequest
from kvrep.replication.election import (
    Action,
    Adopt,
    Ask,
    BecomePrimary,
    Election,
    ElectionSettings,
    FollowPrimary,
    GivePromise,
    RequestPromises,
    Standing,
    StepDown,
    WhyGone,
    without_data,
)
from kvrep.replication.join import Continue, LogView, plan_join
from kvrep.replication.messages import Hello, Promise, Truncate
from kvrep.replication.promotion import Promotion

RESEND_S = 0.05
SYNC_S = 0.001
SILENCE_S = 0.5


@dataclass
class Entry:
    epoch: int
    value: int
    """A write's number; 0 for an epoch start."""
    rules: Configuration | None = None


@dataclass
class Node:
    """One process and its disk. ``life`` grows at every start: events of an earlier life are dropped."""

    name: str
    store_id: bytes
    witness: bool
    # On disk.
    lineage: bytes = b""
    log: list[Entry] = field(default_factory=list)
    durable: int = 0
    promised: int = 0
    promised_to: bytes = b""
    lowered: Position = ZERO
    # In memory.
    committed: int = 0
    life: int = 0
    up: bool = False
    paused: bool = False
    held: list[Callable[[], None]] = field(default_factory=list)
    election: Election | None = None
    primary_epoch: int = 0
    tracker: CommitTracker | None = None
    streams: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    """The primary's: joined followers by store id, as (name, stream number)."""
    following: PrimarySeen | None = None
    stream: int = 0
    """The follower's: the number of its joined stream, 0 without one."""
    stream_epoch: int = 0
    joining: int = 0
    """The number of the join that is under way; only its answer counts."""
    short_since: float | None = None
    """The primary's: since when copies have been missing."""
    heard: dict[bytes, float] = field(default_factory=dict)
    """The primary's: when each follower last confirmed something; a follower's: its stream, under b""."""

    @property
    def last(self) -> Position:
        return Position(self.log[-1].epoch, len(self.log)) if self.log else ZERO

    @property
    def epochs(self) -> EpochTable:
        firsts: dict[int, int] = {}
        for offset, entry in enumerate(self.log, 1):
            firsts.setdefault(entry.epoch, offset)
        return EpochTable(firsts.items())

    @property
    def rules(self) -> tuple[Configuration, ...]:
        """In force, then perhaps in force: what is not known to be committed, and the one before it."""
        found = [(at, e.rules) for at, e in enumerate(self.log, 1) if e.rules is not None]
        known = len(found) == 1 or (bool(found) and found[-1][0] <= self.committed)
        return tuple(rules for _, rules in found[-1 if known else -2 :])

    @property
    def proposed(self) -> tuple[int, Configuration] | None:
        """The newest configuration and its offset, while it is not known to be committed."""
        at = max((at for at, e in enumerate(self.log, 1) if e.rules is not None), default=0)
        return (at, self.rules[1]) if len(self.rules) > 1 else None

    def promise(self) -> Promise:
        if self.witness:
            return without_data(self.promised, self.lowered)
        return Promise(
            epoch=self.promised,
            last=self.last,
            committed=self.committed,
            epochs=self.epochs,
            lowered=self.lowered,
        )

    def standing(self) -> Standing:
        return Standing(
            store_id=self.store_id,
            name=self.name,
            address=f"{self.name}:1",
            lineage=self.lineage,
            rules=self.rules,
            promised_epoch=self.promised,
            last=self.last,
            lowered=self.lowered,
            primary_epoch=self.primary_epoch if self.primary_epoch >= self.promised else 0,
            witness=self.witness,
        )


class Group:
    """See the module. ``names``: one letter per node, a capital one is a witness."""

    def __init__(
        self,
        seed: int,
        names: str = "abc",
        acks: Acks = "majority",
        settings: ElectionSettings | None = None,
        *,
        degrade_after_s: float = 0.0,
    ) -> None:
        self.chance = random.Random(seed)
        self.degrade_after_s = degrade_after_s
        self.degraded = self.restored = 0
        self.settings = settings or ElectionSettings()
        self.acks = acks
        self.now = 100.0
        self.loss = 0.0
        self.peers = {n: f"{n}:1" for n in names}
        self.blocked: set[tuple[str, str]] = set()
        self.ledger: dict[int, tuple[int, int]] = {}
        self.acknowledged: dict[int, tuple[float, int]] = {}
        """By write: (when, in which epoch)."""
        self.committers: dict[int, str] = {}
        self.begun: list[tuple[float, str, int]] = []
        self.founded = 0
        self.elections = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = iter(range(1, 1 << 60))
        self._values = iter(range(1, 1 << 60))
        self.nodes = {n: Node(n, b"id-" + n.encode(), n.isupper()) for n in names}

    # -- time and network --------------------------------------------------------------------------

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._numbers), do))

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, do = heapq.heappop(self._queue)
            do()
        self.now = end

    def until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Let time pass until the condition holds; whether it did in time."""
        end = self.now + seconds
        while not condition():
            if not self._queue or self._queue[0][0] > end:
                self.now = end
                return False
            self.now, _, do = heapq.heappop(self._queue)
            do()
        return True

    def on(self, node: Node, seconds: float, do: Callable[[], None]) -> None:
        """Do something in the node's present life, later if it is paused then."""
        life = node.life

        def run() -> None:
            if node.life != life:
                return
            if node.paused:
                node.held.append(run)
            else:
                do()

        self.after(seconds, run)

    def latency(self) -> float:
        return self.chance.uniform(0.0002, 0.002)

    def passes(self, source: str, target: str) -> bool:
        return (source, target) not in self.blocked and self.chance.random() >= self.loss

    def send(self, source: Node, target: Node, do: Callable[[], None]) -> None:
        """One message without an answer."""
        if self.passes(source.name, target.name) and target.up:
            self.on(target, self.latency(), do)

    def call(
        self,
        source: Node,
        name: str,
        serve: Callable[[Node], object | None],
        done: Callable[[object], None],
        failed: Callable[[WhyGone], None],
    ) -> None:
        """A unary call with its deadline. A dead process refuses; a cut network says nothing."""
        target = self.nodes[name]
        open_ = [True]

        def once(do: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                if open_[0]:
                    open_[0] = False
                    do()

            return run

        def back(do: Callable[[], None]) -> None:
            if self.passes(name, source.name):
                self.on(source, self.latency(), once(do))

        def arrive() -> None:
            answer = serve(target)
            if answer is not None:
                back(lambda: done(answer))

        def reach() -> None:
            if target.up:
                self.on(target, 0.0, arrive)
            else:
                back(lambda: failed(WhyGone.REFUSED))

        self.on(source, self.settings.answer_timeout_s, once(lambda: failed(WhyGone.SILENT)))
        if self.passes(source.name, name):
            self.after(self.latency(), reach)

    # -- faults ------------------------------------------------------------------------------------

    def start(self, *names: str) -> None:
        for name in names or tuple(self.nodes):
            node = self.nodes[name]
            assert not node.up
            node.life += 1
            node.up, node.paused, node.held = True, False, []
            node.committed, node.primary_epoch, node.tracker = 0, 0, None
            node.following, node.stream, node.streams, node.joining = None, 0, {}, 0
            node.short_since, node.heard = None, {}
            node.election = Election(
                self.settings,
                node.standing(),
                peers=self.peers,
                chance=self.chance.random,
                now=self.now,
            )
            self.on(node, 0.0, lambda node=node: self.tick(node))  # type: ignore[misc]
            self.on(node, 0.0, lambda node=node: self.resend(node))  # type: ignore[misc]

    def kill(self, name: str) -> None:
        """SIGKILL: what was not synced is gone; the host closes the connections."""
        node = self.nodes[name]
        node.up, node.paused = False, False
        node.life += 1
        lost = node.log[node.durable :]
        del node.log[node.durable :]
        assert node.committed <= node.durable, lost
        for other in self.nodes.values():
            if other.up and other.following is not None and other.following.name == name:
                self.break_stream(other, name)

    def break_stream(self, node: Node, name: str) -> None:
        def broken() -> None:
            if node.following is not None and node.following.name == name:
                node.stream = 0
                self.event(node, lambda e: e.connection_lost(WhyGone.BROKEN, self.now))

        if self.passes(name, node.name):
            self.on(node, self.latency(), broken)

    def wipe(self, name: str) -> None:
        """Start empty, as a new store (it gets a new id)."""
        node = self.nodes[name]
        assert not node.up
        node.store_id += b"+"
        node.lineage, node.log, node.durable, node.committed = b"", [], 0, 0
        node.promised, node.promised_to, node.lowered = 0, b"", ZERO

    def pause(self, name: str) -> None:
        self.nodes[name].paused = True

    def resume(self, name: str) -> None:
        node = self.nodes[name]
        node.paused = False
        held, node.held = node.held, []
        for do in held:
            self.after(self.chance.uniform(0, 0.0005), do)

    def cut(self, source: str, target: str, *, both: bool = True) -> None:
        self.blocked.add((source, target))
        if both:
            self.blocked.add((target, source))

    def isolate(self, name: str) -> None:
        for other in self.nodes:
            if other != name:
                self.cut(name, other)

    def heal(self) -> None:
        """Everything works again."""
        self.blocked.clear()
        self.loss = 0.0
        for node in self.nodes.values():
            if node.paused:
                self.resume(node.name)
            if not node.up:
                self.start(node.name)

    # -- the shell of one node ---------------------------------------------------------------------

    def event(self, node: Node, do: Callable[[Election], list[Action]]) -> None:
        election = node.election
        assert election is not None
        self.act(node, election.observe(node.standing(), self.now))
        self.act(node, do(election))

    def tick(self, node: Node) -> None:
        election = node.election
        assert election is not None
        self.event(node, lambda e: e.tick(self.now))
        pause = min(max(election.wakes_at - self.now, 0.001), 0.25)
        self.on(node, pause, lambda: self.tick(node))

    def act(self, node: Node, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Ask():
                    self.ask(node, action)
                case GivePromise():
                    self.own_promise(node, action)
                case RequestPromises():
                    self.request(node, action)
                case BecomePrimary():
                    self.elections += 1
                    self.become(node, action)
                case FollowPrimary(primary=primary):
                    node.primary_epoch, node.tracker, node.streams = 0, None, {}
                    node.following, node.stream = primary, 0
                    self.join(node)
                case StepDown():
                    node.primary_epoch, node.tracker, node.streams = 0, None, {}
                case Adopt(lineage=lineage):
                    node.lineage = lineage

    def ask(self, node: Node, ask: Ask) -> None:
        for peer in ask.to:

            def serve(target: Node) -> Answer:
                answers: list[Answer] = []

                def handle(election: Election) -> list[Action]:
                    answer, actions = election.on_question(ask.question, self.now)
                    answers.append(answer)
                    return actions

                self.event(target, handle)
                return Answer.from_wire(answers[0].to_wire())

            self.call(
                node,
                peer.name,
                serve,
                lambda a, n=peer.name: self.event(  # type: ignore[misc]
                    node, lambda e: e.on_answer(ask, n, a, self.now)
                ),
                lambda why, n=peer.name: self.event(  # type: ignore[misc]
                    node, lambda e: e.on_no_answer(ask, n, why, self.now)
                ),
            )

    def give_promise(self, node: Node, epoch: int, to: bytes) -> bool:
        """Durable before anything is answered."""
        if epoch < node.promised or (epoch == node.promised and to != node.promised_to):
            return False
        node.promised, node.promised_to = epoch, to
        if node.primary_epoch < epoch:
            node.primary_epoch, node.tracker, node.streams = 0, None, {}
        if node.stream_epoch < epoch:
            node.stream = 0
        return True

    def own_promise(self, node: Node, action: GivePromise) -> None:
        given = self.give_promise(node, action.epoch, node.store_id)
        promise = node.promise() if given else None
        node.durable = len(node.log)
        self.on(
            node,
            SYNC_S,
            lambda: self.event(node, lambda e: e.on_own_promise(action.epoch, promise, self.now)),
        )

    def request(self, node: Node, action: RequestPromises) -> None:
        request = PromiseRequest.from_wire(action.request.to_wire())
        for peer in action.to:
            self.call(
                node,
                peer.name,
                lambda target: self.serve_request(target, request),
                lambda r, n=peer.name: self.event(  # type: ignore[misc]
                    node, lambda e: e.on_reply(action.request, n, r, self.now)
                ),
                lambda why, n=peer.name: self.event(  # type: ignore[misc]
                    node, lambda e: e.on_no_reply(action.request, n, self.now)
                ),
            )

    def serve_request(self, node: Node, request: PromiseRequest) -> PromiseReply:
        election = node.election
        assert election is not None
        self.act(node, election.observe(node.standing(), self.now))
        chosen = election.on_promise_request(request, self.now)
        if isinstance(chosen, str):
            return election.reply(None, chosen, self.now)
        if not self.give_promise(node, chosen.epoch, chosen.to):
            return election.reply(None, "a higher epoch was promised", self.now)
        node.durable = len(node.log)
        promise = node.promise()
        self.event(node, lambda e: e.gave_promise(chosen.epoch, chosen.to, self.now))
        return PromiseReply.from_wire(election.reply(promise, "", self.now).to_wire())

    # -- becoming primary --------------------------------------------------------------------------

    def become(self, node: Node, action: BecomePrimary) -> None:
        promotion = action.promotion
        fetch = promotion.fetch
        if fetch is None:
            self.begin(node, action)
            return

        def fetched(entries: object) -> None:
            assert isinstance(entries, list)
            if node.promised == action.epoch:
                del node.log[fetch.after.offset :]
                node.log.extend(entries)
                node.durable = len(node.log)
                promotion.fetched(node.promise())
                for rules in node.rules:
                    promotion.learned(rules)
                if promotion.enough or not action.fenced:
                    self.begin(node, action)
                else:
                    self.failed(node, action, "what was fetched asks for more promises")
            else:
                self.failed(node, action, "superseded")

        self.call(
            node,
            fetch.voter.name,
            lambda source: list(source.log[fetch.after.offset : fetch.to.offset]),
            fetched,
            lambda why: self.failed(node, action, "no records to fetch"),
        )

    def failed(self, node: Node, action: BecomePrimary, problem: str) -> None:
        self.event(node, lambda e: e.on_started(action.epoch, problem, self.now))

    def begin(self, node: Node, action: BecomePrimary) -> None:
        epoch, promotion = action.epoch, action.promotion
        if node.promised != epoch or node.promised_to != node.store_id:
            self.failed(node, action, "a higher epoch was promised")
            return
        assert isinstance(promotion, Promotion)
        if promotion.lacks:
            self.failed(node, action, "records were acknowledged without this node")
            return
        assert promotion.ready or not action.fenced
        rules = None
        if action.founding:
            if not node.lineage:
                self.founded += 1
                node.lineage = b"lineage-%d" % self.founded
            rules = Configuration(
                acks=self.acks,
                voters=action.founding,
                next_member=len(action.founding) + 1,
                degrade_after_s=self.degrade_after_s,
            )
        if action.fenced:
            if self.acks != 0:
                node.committed = max(node.committed, promotion.committed)
            for offset, kept in self.ledger.items():
                entry = node.log[offset - 1]
                assert (entry.epoch, entry.value) == kept, f"committed {offset} is lost"
        node.log.append(Entry(epoch, 0, rules))
        node.primary_epoch, node.following, node.streams, node.short_since = epoch, None, {}, None
        node.tracker = CommitTracker(
            node.rules[0],
            node.store_id,
            epoch_start=len(node.log),
            committed=node.committed,
            proposed=node.proposed,
        )
        self.begun.append((self.now, node.name, epoch))
        self.sync(node)
        self.event(node, lambda e: e.on_started(epoch, "", self.now))

    # -- replication, in the small -----------------------------------------------------------------

    def primaries(self) -> list[Node]:
        return [n for n in self.nodes.values() if n.up and n.primary_epoch]

    def write(self, node: Node) -> int:
        value = next(self._values)
        node.log.append(Entry(node.primary_epoch, value))
        self.sync(node)
        for store_id in list(node.streams):
            self.ship(node, store_id)
        return value

    def sync(self, node: Node) -> None:
        end, epoch = len(node.log), node.primary_epoch

        def synced() -> None:
            if node.primary_epoch == epoch and node.tracker is not None:
                node.durable = max(node.durable, end)
                self.commit(node, node.tracker.local_durable(end))

        self.on(node, SYNC_S, synced)

    def commit(self, node: Node, offset: int) -> None:
        """The primary takes this for committed, and acknowledges it."""
        epoch = node.primary_epoch
        for at in range(node.committed + 1, offset + 1):
            entry = node.log[at - 1]
            kept = (entry.epoch, entry.value)
            assert self.acks == 0 or self.ledger.setdefault(at, kept) == kept, f"two histories at {at}"
            assert self.committers.setdefault(epoch, node.name) == node.name, f"two primaries in {epoch}"
            if entry.value and entry.epoch == epoch:
                self.acknowledged[entry.value] = (self.now, epoch)
        node.committed = max(node.committed, offset)

    def resend(self, node: Node) -> None:
        """What a real shell does with its clocks: join again, ship again."""
        if self.degrade_after_s:
            self.drop_silent(node)
        if node.primary_epoch:
            for store_id in list(node.streams):
                self.ship(node, store_id)
            self.protect(node)
        elif not node.stream and not node.joining:
            self.join(node)
        self.on(node, RESEND_S, lambda: self.resend(node))

    def drop_silent(self, node: Node) -> None:
        """Both ends of a stream take silence for its end."""
        silent = [i for i, at in node.heard.items() if self.now - at > SILENCE_S]
        for store_id in silent:
            del node.heard[store_id]
            if node.tracker is not None and node.streams.pop(store_id, None) is not None:
                node.tracker.left(store_id)
            elif not store_id:
                node.stream = 0

    def join(self, node: Node) -> None:
        following = node.following
        if following is None or node.witness:
            return
        node.durable = len(node.log)
        hello = Hello(
            store_id=node.store_id,
            name=node.name,
            lineage=node.lineage,
            promised_epoch=node.promised,
            last=node.last,
            committed=node.committed,
            epochs=node.epochs,
        )
        number = node.joining = next(self._numbers)

        def serve(primary: Node) -> object:
            if not primary.primary_epoch:
                return "not primary"
            if primary.streams.get(node.store_id, ("", 0))[1] > number:
                return "an older stream than the one that is open"
            view = LogView(
                store_id=primary.store_id,
                name=primary.name,
                lineage=primary.lineage,
                branch=b"",
                epoch=primary.primary_epoch,
                fenced=True,
                first=1,
                last=len(primary.log),
                epochs=primary.epochs,
            )
            plan = plan_join(hello, view)
            if isinstance(plan, Continue):
                assert primary.tracker is not None
                primary.tracker.left(node.store_id)
                primary.streams[node.store_id] = (node.name, number)
                primary.heard[node.store_id] = self.now
                self.on(primary, 0.0, lambda: self.ship(primary, node.store_id))
            return (primary.primary_epoch, primary.lineage, plan)

        def done(answer: object) -> None:
            if node.joining != number:
                return
            node.joining = 0
            if node.following is not following or node.primary_epoch or not isinstance(answer, tuple):
                return
            epoch, lineage, plan = answer
            if epoch < node.promised or hello.last != node.last:
                return
            if isinstance(plan, Truncate):
                assert plan.to.offset >= node.committed or self.acks == 0, "told to drop committed records"
                del node.log[plan.to.offset :]
                node.durable = len(node.log)
                node.committed = min(node.committed, node.durable)
                self.join(node)
            elif isinstance(plan, Continue):
                self.give_promise(node, epoch, following.store_id)
                node.lineage = lineage
                node.stream, node.stream_epoch = number, epoch
                node.heard[b""] = self.now

        def failed(why: WhyGone) -> None:
            if node.joining == number:
                node.joining = 0

        self.call(node, following.name, serve, done, failed)

    def ship(self, primary: Node, store_id: bytes) -> None:
        name, number = primary.streams[store_id]
        node = self.nodes[name]
        epoch, entries, committed = primary.primary_epoch, list(primary.log), primary.committed
        seen = PrimarySeen(
            store_id=primary.store_id, name=primary.name, address=f"{primary.name}:1", epoch=epoch
        )

        def arrive() -> None:
            if node.stream != number or node.promised > epoch or node.store_id != store_id:
                return
            node.heard[b""] = self.now
            mine = len(node.log)
            assert [e.epoch for e in entries[:mine]] == [e.epoch for e in node.log[: len(entries)]]
            node.log.extend(entries[mine:])
            node.committed = max(node.committed, min(committed, len(node.log)))
            for at in range(1, node.committed + 1):
                kept = (node.log[at - 1].epoch, node.log[at - 1].value)
                assert self.acks == 0 or self.ledger[at] == kept
            self.event(node, lambda e: e.heard_from_primary(seen, self.now))
            end = len(node.log)
            self.on(node, SYNC_S, lambda: ack(end))

        def ack(end: int) -> None:
            if node.stream == number and node.promised <= epoch:
                node.durable = max(node.durable, end)
                self.send(node, primary, lambda: acked(end))

        def acked(end: int) -> None:
            if primary.primary_epoch == epoch and primary.streams.get(store_id) == (name, number):
                assert primary.tracker is not None
                primary.heard[store_id] = self.now
                self.commit(primary, primary.tracker.acked(store_id, end))

        self.send(primary, node, arrive)

    # -- going on with fewer copies, and back ------------------------------------------------------

    def protect(self, node: Node) -> None:
        """What ``runtime/degrading.py`` and the admission of voters do, as the primary's clock ticks."""
        tracker = node.tracker
        assert tracker is not None
        if not tracker.missing(node.streams):
            node.short_since = None
            self.count_again(node, tracker)
            return
        if node.short_since is None:
            node.short_since = self.now
        after_s = tracker.configuration.degrade_after_s
        if not after_s or self.now - node.short_since < after_s:
            return
        proposed, old = tracker.proposed, node.rules[-1]
        here = {node.store_id, *node.streams}
        lost = [v.store_id for v in old.voters if v.counts and v.store_id not in here]
        if proposed is None or not proposed[1].away or lost:
            rules = old.without(lost, node.committed + 1).changed(node.store_id, away=False)
            self.propose(node, tracker, rules)
        else:
            offset = max(proposed[0], tracker.epoch_start)
            if tracker.proposed_reached() >= offset:
                self.lower(node, tracker, Position(node.primary_epoch, offset))

    def count_again(self, node: Node, tracker: CommitTracker) -> None:
        if tracker.proposed is not None or tracker.committed < tracker.epoch_start:
            return
        for voter in tracker.configuration.away:
            if voter.store_id in node.streams or voter.store_id == node.store_id:
                self.restored += 1
                self.propose(node, tracker, tracker.configuration.with_copy_of(voter.store_id))
                return

    def propose(self, node: Node, tracker: CommitTracker, rules: Configuration) -> None:
        offset = len(node.log) + 1
        node.log.append(Entry(node.primary_epoch, 0, rules.at(offset)))
        tracker.propose(offset, rules.at(offset))
        self.sync(node)

    def lower(self, node: Node, tracker: CommitTracker, position: Position) -> None:
        """Ask every voter to store it; with most of them the proposed rule is in force."""
        if not self.serve_lower(node, node.store_id, position):
            return
        voters = node.rules[-1].voters
        stored = {node.store_id}

        def done(voter: Voter, answer: object) -> None:
            if answer is not True:
                return
            stored.add(voter.store_id)
            proposed = tracker.proposed
            if node.tracker is not tracker or proposed is None:
                return
            if max(proposed[0], tracker.epoch_start) != position.offset:
                return
            if 2 * len(stored) > len(voters):
                self.degraded += 1
                self.commit(node, tracker.effect())

        for voter in voters:
            if voter.store_id != node.store_id:
                self.call(
                    node,
                    voter.name,
                    lambda target, i=voter.store_id: (  # type: ignore[misc]
                        target.store_id == i and self.serve_lower(target, node.store_id, position)
                    ),
                    lambda answer, v=voter: done(v, answer),  # type: ignore[misc]
                    lambda why: None,
                )

    def serve_lower(self, node: Node, asker: bytes, position: Position) -> bool:
        if position.epoch < node.promised:
            return False
        if position.epoch > node.promised and not self.give_promise(node, position.epoch, asker):
            return False
        node.lowered = max(node.lowered, position)
        return True

    # -- what tests ask ----------------------------------------------------------------------------

    def leader(self) -> Node | None:
        """The primary that can commit, when there is exactly one in the highest epoch and it is confirmed."""
        found = [n for n in self.primaries() if n.election is not None and n.election.alive(self.now)]
        found.sort(key=lambda n: n.primary_epoch)
        return found[-1] if found else None

    def form(self) -> Node:
        """Start all nodes empty, and wait until a write is acknowledged."""
        self.start()
        assert self.until(self.leader, 5.0)
        leader = self.leader()
        assert leader is not None
        assert self.until(
            lambda: len(leader.streams) == sum(not n.witness for n in self.nodes.values()) - 1, 5.0
        )
        value = self.write(leader)
        assert self.until(lambda: value in self.acknowledged, 5.0)
        self.run(1.0)
        return leader

    def writing(self, every_s: float) -> None:
        """From now on somebody writes to every node that takes itself for primary."""

        def again() -> None:
            for node in self.primaries():
                if not node.paused:
                    self.write(node)
            self.after(every_s, again)

        again()

    def acknowledged_after(self, moment: float, epoch: int) -> float | None:
        """When the first write of an epoch above ``epoch`` was acknowledged, after ``moment``."""
        times = [t for t, e in self.acknowledged.values() if t > moment and e > epoch]
        return min(times) if times else None

    def followers(self) -> Iterator[Node]:
        return (n for n in self.nodes.values() if not n.primary_epoch)


def voter(name: str, member: int) -> Voter:
    return Voter(store_id=b"id-" + name.encode(), name=name, member=member)
