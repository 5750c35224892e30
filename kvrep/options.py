"""Every setting of a store, in one frozen value, checked before anything is touched."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from math import inf
from types import NoneType
from typing import Any, Literal, TypedDict

from kvrep.coordinators import CoordinatorChoice, Etcd, Quorum
from kvrep.errors import ConfigurationMismatch
from kvrep.model.configuration import Acks, check_acks
from kvrep.model.position import OFFSET_MAX
from kvrep.model.record import KEY_BYTES_MAX

__all__ = ["KEY_BYTES_MAX", "OpenOptions", "Options", "check_keyspace_name"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KEYSPACE = re.compile(r"[a-z0-9_-]{1,64}")


def check_keyspace_name(name: str) -> bool:
    """Whether ``name`` may name a keyspace: 1 to 64 of ``a-z 0-9 _ -``."""
    return _KEYSPACE.fullmatch(name) is not None


class OpenOptions(TypedDict, total=False):
    """The keyword arguments of :func:`kvrep.open`, as :class:`Options` describes them."""

    name: str | None
    listen: str | None
    advertise: str | None
    follow: str | tuple[str, ...] | None
    voter: bool
    acks: Acks | None
    ack_timeout_s: float | None
    degrade_after_s: float | None
    lag_records_max: int | None
    durability: Literal["sync", "os"]
    sync_interval_s: float
    create: bool
    keyspaces_max: int
    value_bytes_max: int
    record_bytes_max: int
    map_bytes: int
    readers_max: int
    log_file_bytes: int
    memtable_bytes: int
    memtable_bytes_max: int
    flush_interval_s: float
    uncommitted_bytes_max: int
    retention_bytes: int
    retention_bytes_max: int
    retention_age_s: float
    snapshot_age_max_s: float
    transaction_age_max_s: float
    close_timeout_s: float
    followers_max: int
    segment_bytes_max: int
    credit_bytes: int
    heartbeat_interval_s: float
    heartbeat_timeout_s: float
    reconnect_backoff_max_s: float
    forward_writes: bool
    compression: Literal["zstd"] | None
    tls: Any
    token: str | None
    coordinator: CoordinatorChoice | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What :func:`kvrep.open` takes. Sizes are bytes, times seconds."""

    name: str | None = None
    """This node's name, 1 to 64 of ``A-Z a-z 0-9 _ . -``. Kept in the store; needed by a follower
    that shall have a slot and a vote."""
    listen: str | None = None
    """``"host:port"`` to serve followers and clients on; port 0 picks a free one."""
    advertise: str | None = None
    """The address others are told, when it differs from where this node listens."""
    follow: str | tuple[str, ...] | None = None
    """The primary's address (or several to try): this store is a follower."""
    voter: bool = True
    """Whether a named follower becomes a voter once it has caught up."""
    acks: Acks | None = None
    """Seeds the configuration of a new store (default 0); must agree with that of an old one."""
    ack_timeout_s: float | None = None
    """Seeds the configuration of a new store (default 5): how long a write waits for its acks."""
    degrade_after_s: float | None = None
    """Seeds the configuration of a new store (default 0, never): once too few voters have been there for so
    long, writes are acknowledged without the copies that are missing, if most voters (a witness or etcd counts)
    agree and remember it; loudly, see ``docs/failover.md``."""
    lag_records_max: int | None = None
    """Seeds the configuration of a new store (default 0, no bound): with ``acks=0``, how many acknowledged records
    the furthest other voter may lack, hence how many a failover onto it can lose. A write beyond that waits, or
    is refused while no other voter is connected."""
    durability: Literal["sync", "os"] = "sync"
    """``"sync"``: a write that returned is flushed to the disk. ``"os"``: it is with the operating system."""
    sync_interval_s: float = 1.0
    """With durability ``"os"``: the log is flushed at least this often."""
    create: bool = True
    """Whether a missing store is created; if not, :class:`kvrep.NotAStore`."""
    keyspaces_max: int = 128
    value_bytes_max: int = 64 * MIB
    record_bytes_max: int = 256 * MIB
    """The largest transaction or batch, as logged."""
    map_bytes: int = 256 * GIB
    """The largest size LMDB may reach. Address space only: the file grows as it is needed."""
    readers_max: int = 1024
    log_file_bytes: int = 64 * MIB
    memtable_bytes: int = 32 * MIB
    """Payload that starts a flush into LMDB."""
    memtable_bytes_max: int = 192 * MIB
    """Memory of unflushed writes (160 bytes an entry counted in) at which writers wait for the flush."""
    flush_interval_s: float = 30.0
    """The age of unflushed writes that starts a flush."""
    uncommitted_bytes_max: int = 64 * MIB
    """Log that may wait for acks; above it writes are refused (:class:`kvrep.Overloaded`)."""
    retention_bytes: int = 256 * MIB
    """Log kept for followers beyond what they are known to need."""
    retention_bytes_max: int = 16 * GIB
    """Log kept at the most; the slowest follower's slot is released at this bound."""
    retention_age_s: float = 86_400.0
    """Log older than this is trimmed, where no slot needs it."""
    snapshot_age_max_s: float = 600.0
    """Snapshots and scans older than this raise :class:`kvrep.SnapshotExpired`."""
    transaction_age_max_s: float = 30.0
    close_timeout_s: float = 30.0
    followers_max: int = 32
    segment_bytes_max: int = 1 * MIB
    credit_bytes: int = 8 * MIB
    """What a follower lets its primary send ahead."""
    heartbeat_interval_s: float = 1.0
    heartbeat_timeout_s: float = 4.0
    """Silence after which a connection counts as dead."""
    reconnect_backoff_max_s: float = 2.0
    forward_writes: bool = False
    """While this node is a follower, its writes go to the primary, and return when reads here show them."""
    compression: Literal["zstd"] | None = None
    """Compress segments towards followers that can (needs ``kvrep[zstd]``)."""
    tls: Any = None
    """A :class:`kvrep.TLS`; ``None`` speaks plain text."""
    token: str | None = None
    """A shared secret that followers and clients must show; needs ``tls`` beyond the loopback."""
    coordinator: CoordinatorChoice | None = None
    """Who decides which node tries to be primary: a :class:`kvrep.Quorum` or :class:`kvrep.Etcd`, the same on
    every node; ``None``: people do."""

    def __post_init__(self) -> None:
        self._check_types()
        if self.name is not None and not _NAME.fullmatch(self.name):
            _reject("name", self.name, "1 to 64 of A-Z a-z 0-9 _ . -, starting with a letter or digit")
        if self.durability not in ("sync", "os"):
            _reject("durability", self.durability, '"sync" or "os"')
        if self.compression not in (None, "zstd"):
            _reject("compression", self.compression, '"zstd" or None')
        if self.acks is not None:
            try:
                check_acks(self.acks)
            except ValueError as error:
                raise ConfigurationMismatch(str(error), option="acks", given=self.acks) from None
        for low, names in _AT_LEAST.items():
            for name in names:
                value = getattr(self, name)
                if value is None and name in _SEEDS:
                    continue
                if isinstance(value, bool) or not isinstance(value, (int, float)) or value < low:
                    _reject(name, value, f"a number of at least {low}")
        if self.degrade_after_s:
            if self.degrade_after_s > 86_400:
                _reject("degrade_after_s", self.degrade_after_s, "at most 86400 (a day)")
            if self.acks == 0:
                _reject(
                    "degrade_after_s", self.degrade_after_s, "together with acks= that waits for followers"
                )
        if self.lag_records_max:
            if self.lag_records_max > OFFSET_MAX:
                _reject("lag_records_max", self.lag_records_max, f"at most {OFFSET_MAX}")
            if self.acks not in (None, 0):
                _reject(
                    "lag_records_max", self.lag_records_max, "together with acks=0 only: others lose nothing"
                )
        if not 1 <= self.keyspaces_max <= 1024:
            _reject("keyspaces_max", self.keyspaces_max, "1 to 1024")
        if self.coordinator is not None:
            self._check_coordinator()
        if self.value_bytes_max > self.record_bytes_max:
            _reject("value_bytes_max", self.value_bytes_max, "at most record_bytes_max")
        if self.record_bytes_max > GIB:
            _reject("record_bytes_max", self.record_bytes_max, "at most 1 GiB")
        if self.heartbeat_timeout_s < 2 * self.heartbeat_interval_s:
            _reject("heartbeat_timeout_s", self.heartbeat_timeout_s, "at least two heartbeat intervals")
        if self.retention_bytes > self.retention_bytes_max:
            _reject("retention_bytes", self.retention_bytes, "at most retention_bytes_max")

    def _check_types(self) -> None:
        for name in ("name", "listen", "advertise", "token"):
            if not isinstance(getattr(self, name), (str, NoneType)):
                _reject(name, getattr(self, name), "text")
        for name in ("create", "voter", "forward_writes"):
            if not isinstance(getattr(self, name), bool):
                _reject(name, getattr(self, name), "True or False")
        for name, given in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if given is None and name in _SEEDS:
                continue
            if name.endswith(("_bytes", "_bytes_max", "s_max")) and not name.endswith("_s_max"):
                if isinstance(given, bool) or not isinstance(given, int):
                    _reject(name, given, "a whole number")
            elif isinstance(given, float) and not 0 <= given < inf:
                _reject(name, given, "a finite number")

    def _check_coordinator(self) -> None:
        if not isinstance(self.coordinator, Quorum | Etcd):
            _reject("coordinator", self.coordinator, "a kvrep.Quorum or kvrep.Etcd")
        if self.name is None or self.listen is None:
            _reject("coordinator", self.coordinator, "together with name= and listen=")
        if self.follow is not None:
            _reject("follow", self.follow, "nothing beside a coordinator, which says whom to follow")

    @property
    def sources(self) -> tuple[str, ...]:
        """The addresses to follow; empty for a primary."""
        if self.follow is None:
            return ()
        return (self.follow,) if isinstance(self.follow, str) else tuple(self.follow)

    @classmethod
    def of(cls, options: OpenOptions) -> Options:
        """From keyword arguments; :class:`ConfigurationMismatch` for one that does not exist."""
        known = {f.name for f in fields(cls)}
        for name, value in options.items():
            if name not in known:
                _reject(name, value, f"one of {', '.join(sorted(known))}")
        return cls(**options)


def _reject(option: str, given: Any, wanted: str) -> None:
    raise ConfigurationMismatch(
        f"option {option}={given!r} is not allowed: {wanted}", option=option, given=given
    )


_SEEDS = ("ack_timeout_s", "degrade_after_s", "lag_records_max")
"""Numbers that may be left out, because the log's configuration has them."""
_AT_LEAST: dict[float, tuple[str, ...]] = {
    0.001: (
        "ack_timeout_s", "sync_interval_s", "flush_interval_s", "snapshot_age_max_s",
        "transaction_age_max_s", "close_timeout_s", "heartbeat_interval_s", "heartbeat_timeout_s",
        "reconnect_backoff_max_s",
    ),
    0: ("retention_age_s", "retention_bytes", "degrade_after_s", "lag_records_max"),
    1: ("value_bytes_max", "record_bytes_max", "followers_max", "readers_max"),
    64 * KIB: (
        "log_file_bytes", "memtable_bytes", "memtable_bytes_max", "uncommitted_bytes_max",
        "segment_bytes_max", "credit_bytes", "retention_bytes_max",
    ),
    1 * MIB: ("map_bytes",),
}  # fmt: skip
