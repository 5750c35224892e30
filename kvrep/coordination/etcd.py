"""A key in etcd says which node tries to be primary; promises of the voters say who may.

::

    /kvrep/CLUSTER/members/NAME   {"address": …}   of every node that was ever started; where to ask
    /kvrep/CLUSTER/group          the store id of the node that began the group; created once, kept for ever
    /kvrep/CLUSTER/primary        who tries, with a lease that it keeps alive
    /kvrep/CLUSTER/promise        {"epoch": …, "lowered": …}: what a voter keeps in its IDENTITY; only where
                                  the ack rule may go on with fewer copies (degrade_after_s)

Taking ``primary`` is a permit: the election below it then asks, collects promises and begins an epoch as in
:mod:`kvrep.coordination.quorum`, where the permit counts as one vote more. That is the third vote of two
data nodes. A primary that loses etcd goes on while most voters confirm it; one that loses both steps down.
Where something depends on what etcd remembers (``promise``), it is changed by compare-and-swap only, so that no
lease and no clock is trusted. Whoever holds the key and cannot become primary with it for one lease gives it back.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from kvrep.coordination.driver import Driver
from kvrep.coordination.interface import NodeView
from kvrep.coordinators import Etcd
from kvrep.errors import ClosedError, Error, Fenced, ProtocolError
from kvrep.model.position import ZERO, Position
from kvrep.replication.election import Action as ElectionAction
from kvrep.replication.election import BecomePrimary, Election, ElectionSettings, StepDown
from kvrep.transport.etcd import EtcdClient, KeyValue, Lease, LeaseExpired

__all__ = ["EtcdCoordinator"]

log = logging.getLogger("kvrep.coordination")

POLL_S = 0.1
"""How often a node that wants the key, or waits for its group, looks."""
SOON_S = 0.02
SWAPS_MAX = 5
MEMBERS_S = 2.0
"""How often a node reads who else is there."""


class EtcdCoordinator(Driver):
    """See :class:`kvrep.coordination.interface.Coordinator`. One thread more: ``kvrep-etcd-NAME``."""

    kind = "etcd"
    outside_votes = True

    def __init__(self, choice: Etcd, *, chance: Callable[[], float] | None = None) -> None:
        settings = ElectionSettings(
            heartbeat_interval_s=choice.heartbeat_interval_s,
            timeout_s=choice.timeout_s,
            spread_s=0.3 * choice.timeout_s,
            step_down_s=choice.step_down_s,
            answer_timeout_s=0.4 * choice.timeout_s,
            patience_s=0.15 * choice.timeout_s,
        )
        super().__init__(settings, peers={}, priority=choice.priority, needs_permit=True, chance=chance)
        self._choice = choice
        self._prefix = f"/kvrep/{choice.cluster}/"
        self._client: EtcdClient | None = None
        self._keeper: threading.Thread | None = None
        self._look = threading.Event()
        """Set when the keeper should look now: something it waits for may have happened."""
        self._lease: Lease | None = None
        self._lease_until = 0.0
        self._renew_at = 0.0
        self._held: KeyValue | None = None
        self._held_since = 0.0
        self._wait_until = 0.0
        self._wanted = False
        self._members_at = 0.0
        self._registered = ""
        self.etcd_problem = ""
        """Why etcd could not be asked, for people; empty while it answers."""

    def start(self, node: NodeView) -> None:
        self._client = EtcdClient(
            self._choice.endpoints,
            name=node.label,
            timeout_s=min(1.0, self._choice.ttl_s / 3),
            tls=self._choice.tls,
        )
        super().start(node)
        self._keeper = threading.Thread(target=self._keep, name=f"kvrep-etcd-{node.label}", daemon=True)
        self._keeper.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        super().stop(timeout_s)
        keeper, client = self._keeper, self._client
        if keeper is None or client is None:
            return
        self._look.set()
        keeper.join(max(0.1, deadline - time.monotonic()))
        client.close()

    # -- the keeper's thread -----------------------------------------------------------------------

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self._look.clear()
            pause = POLL_S
            try:
                pause = self._step()
                self._say("")
            except ClosedError:
                break
            except Error as error:
                self._say(str(error))
            except Exception as error:
                self._say(repr(error))
                log.exception("%s: talking to etcd failed", self._label())
            self._look.wait(pause)
        self._give_back()

    def _say(self, problem: str) -> None:
        if problem != self.etcd_problem:
            self.etcd_problem = problem
            if problem:
                log.warning("%s: etcd: %s", self._label(), problem)
            else:
                log.info("%s: etcd answers", self._label())

    def _step(self) -> float:
        """One look; returns how long to wait until the next."""
        node, election = self._known()
        now = time.monotonic()
        if self._held is not None:
            pause = self._hold(election, now)
            self._read_members(node, now)
            return pause
        self._read_members(node, now)
        if election.own.empty:
            self._begin_group(node)
            return POLL_S
        if self._wants(election, now):
            return self._try_to_take(node, now)
        return POLL_S

    def _wants(self, election: Election, now: float) -> bool:
        with self._lock:
            return now >= self._wait_until and (election.wants_permit or election.leading_epoch > 0)

    def _read_members(self, node: NodeView, now: float) -> None:
        """Say where we are, and learn where the others are."""
        assert self._client is not None
        own = node.standing()
        if own.address != self._registered:
            data = json.dumps({"address": own.address}).encode()
            self._client.put(f"{self._prefix}members/{own.name}", data)
            self._registered = own.address
        if now < self._members_at + (POLL_S if own.empty else MEMBERS_S):
            return
        self._members_at = now
        peers: dict[str, str] = {}
        for member in self._client.get_prefix(f"{self._prefix}members/"):
            address = _text(member.value, "address")
            if address:
                peers[member.key.rpartition("/")[2]] = address
        with self._lock:
            if self._election is not None:
                self._election.told_addresses(peers)

    def _begin_group(self, node: NodeView) -> None:
        """The first empty node to say so begins the group; it may repeat that as long as it is empty."""
        assert self._client is not None
        own = node.standing()
        _, there = self._client.create(self._prefix + "group", own.store_id.hex().encode())
        if there.value == own.store_id.hex().encode():
            self._event(lambda e, now: e.found(now), quietly=True)

    # -- the key -----------------------------------------------------------------------------------

    def _try_to_take(self, node: NodeView, now: float) -> float:
        client = self._client
        assert client is not None
        lease = self._ensure_lease(client)
        own = node.standing()
        value = json.dumps({"name": own.name, "address": own.address, "id": own.store_id.hex()}).encode()
        try:
            taken, there = client.create(self._prefix + "primary", value, lease.id)
        except LeaseExpired:
            self._lease = None
            return SOON_S
        if not taken and there.lease != lease.id:
            self._watch(client, there)
            return SOON_S
        log.info("%s: has the key", node.label)
        self._held, self._held_since = there, now
        self._permit(self._lease_until)
        return POLL_S

    def _watch(self, client: EtcdClient, there: KeyValue) -> None:
        """Somebody else has the key: wait a moment for it to change."""
        try:
            client.wait_for_change(there.key, there.mod_revision, POLL_S)
        except ClosedError:
            raise
        except Error as error:
            log.debug("%s: watching the key: %s", self._label(), error)

    def _ensure_lease(self, client: EtcdClient) -> Lease:
        lease, now = self._lease, time.monotonic()
        if lease is None or now >= self._lease_until:
            self._lease = lease = client.grant(self._choice.ttl_s)
            self._lease_until = now + lease.ttl_s
            self._renew_at = now + lease.ttl_s / 3
        elif now >= self._renew_at:
            self._renew(client, lease)
        return lease

    def _renew(self, client: EtcdClient, lease: Lease) -> None:
        now = time.monotonic()
        self._renew_at = now + min(0.5, lease.ttl_s / 3)
        ttl_s = client.keep_alive(lease.id)
        self._lease_until = now + ttl_s
        self._renew_at = now + ttl_s / 3

    def _hold(self, election: Election, now: float) -> float:
        """Keep the key while it is of use."""
        client, lease = self._client, self._lease
        assert client is not None
        if now >= self._lease_until:
            log.warning("%s: the lease has run out", self._label())
            self._lose_key()
            return SOON_S
        with self._lock:
            leading = election.leading_epoch > 0
        if leading:
            self._held_since = now
        elif now >= self._held_since + self._choice.ttl_s:
            log.warning("%s: gives the key back: %s", self._label(), election.problem)
            self._give_back()
            self._wait_until = now + self._choice.ttl_s / 2 * (0.5 + self._chance())
            return POLL_S
        if lease is not None and now >= self._renew_at:
            try:
                self._renew(client, lease)
            except LeaseExpired:
                log.warning("%s: etcd has dropped the lease", self._label())
                self._lose_key()
                return SOON_S
            self._permit(self._lease_until)
        return POLL_S

    def _lose_key(self) -> None:
        self._held, self._lease = None, None
        self._permit(0.0)

    def _give_back(self) -> None:
        """Revoke the lease, so that the key is free at once; if that fails, it runs out."""
        lease, client = self._lease, self._client
        self._held, self._lease = None, None
        self._permit(0.0)
        if lease is None or client is None:
            return
        try:
            client.revoke(lease.id)
        except Error as error:
            log.debug("%s: the lease was not revoked: %s", self._label(), error)

    def _permit(self, until: float) -> None:
        self._event(lambda e, now: e.permit(until, now), quietly=True)

    # -- what etcd remembers as a voter would ------------------------------------------------------

    def remember(self, epoch: int, lowered: Position = ZERO) -> Position | None:
        client = self._client
        if client is None:
            return None
        key = self._prefix + "promise"
        try:
            for _ in range(SWAPS_MAX):
                there, _revision = client.get(key)
                promised, known = _promised(there)
                if promised > epoch:
                    self._event(partial(_note_outside, promised), quietly=True)
                    raise Fenced(f"etcd knows of epoch {promised}", epoch=promised)
                known = max(known, lowered)
                value = json.dumps({"epoch": epoch, "lowered": list(known)}).encode()
                if there is not None and there.value == value:
                    return known
                if client.create(key, value)[0] if there is None else client.replace(key, value, there):
                    return known
        except (Fenced, ClosedError):
            raise
        except Error as error:
            log.warning("%s: etcd does not remember: %s", self._label(), error)
        return None

    def _become(self, node: NodeView, action: BecomePrimary) -> None:
        promotion = action.promotion
        if not action.founding and promotion.needs_majority and not promotion.majority:
            try:
                noted = self.remember(action.epoch)
            except ClosedError:
                return
            except Error as error:
                problem = str(error)
                self._event(lambda e, now: e.on_started(action.epoch, problem, now), quietly=True)
                return
            if noted is not None:
                promotion.on_outside(noted)
        super()._become(node, action)

    # -- news for the keeper -----------------------------------------------------------------------

    def _act(self, node: NodeView, actions: list[ElectionAction]) -> None:
        super()._act(node, actions)
        if any(isinstance(action, StepDown) for action in actions):
            self._held_since = float("-inf")
            self._look.set()

    def _after(self, election: Election, now: float) -> None:
        super()._after(election, now)
        if election.wants_permit and not self._wanted:
            self._look.set()
        self._wanted = election.wants_permit


def _note_outside(promised: int, election: Election, now: float) -> list[ElectionAction]:
    del now
    return election.promised_outside(promised)


def _promised(there: KeyValue | None) -> tuple[int, Position]:
    """What is stored under ``promise``; ``ProtocolError`` when it is something else."""
    if there is None:
        return 0, ZERO
    try:
        stored = json.loads(there.value)
        epoch, offset = stored["lowered"]
        return int(stored["epoch"]), Position(int(epoch), int(offset))
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"etcd holds no promise under {there.key}: {error}") from error


def _text(data: bytes, name: str) -> str:
    try:
        value = json.loads(data)[name]
    except (ValueError, KeyError, TypeError):
        return ""
    return value if isinstance(value, str) else ""
