"""A real store against a dict, through every operation on data, with reopening and crashes in between.

``PairModel`` runs the same rules on a primary with a follower that acknowledges every write, and restarts, kills
and promotes either of them. After every step the follower shows what the dict holds.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

import kvrep
from kvrep.codecs import BYTES, JSON, MSGPACK, TEXT
from kvrep.model.record import Kind
from kvrep.options import Options
from kvrep.runtime.node import Node
from kvrep.storage.rescue import load_rescue
from kvrep.transport.memory import MemoryTransport
from tests.replication_kit import until

MEMORY = Path("/dev/shm")
SMALL = {
    "log_file_bytes": 64 << 10,
    "memtable_bytes": 64 << 10,
    "memtable_bytes_max": 4 << 20,
    "flush_interval_s": 3600.0,
    "map_bytes": 64 << 20,
    "retention_bytes": 0,
    "retention_age_s": 0,
    "transaction_age_max_s": 600.0,  # a transaction stays open over many steps, on a machine that may be busy
    "snapshot_age_max_s": 600.0,
}

keys = st.one_of(
    st.binary(min_size=1, max_size=3),
    st.sampled_from([b"a", b"a\xff", b"a\xff\xff", b"b", b"\xff", b"\xff\xff", b"\x00"]),
    st.just(511).map(lambda n: b"k" * n),
)
values = st.one_of(st.binary(max_size=8), st.sampled_from([0, 5_000, 70_000]).map(lambda n: b"v" * n))
edges = st.one_of(st.none(), st.just(b""), keys)
ops = st.lists(st.tuples(keys, st.one_of(st.none(), values)), max_size=6)
CODECS: dict[str, Any] = {"texts": TEXT, "objects": MSGPACK, "documents": JSON, "kept": BYTES}
"""The keyspaces beside the default one; ``kept`` is opened with ``keep_before``."""
State = dict[tuple[str, bytes], Any]
objects = st.one_of(
    st.none(), st.integers(-9, 9), st.text(max_size=3), st.lists(st.integers(0, 3), max_size=3)
)
MISSING = object()


def scan_model(
    model: dict[bytes, Any],
    prefix: bytes,
    start: bytes | None,
    stop: bytes | None,
    reverse: bool,
    limit: int | None,
) -> list[tuple[bytes, Any]]:
    """What a scan must give."""
    found = [
        (k, v)
        for k, v in sorted(model.items(), reverse=reverse)
        if k.startswith(prefix) and (start is None or k >= start) and (stop is None or k < stop)
    ]
    return found if limit is None else found[:limit]


class StoreModel(RuleBasedStateMachine):
    """Every rule does one thing to the store and to a dict; they must never differ."""

    snapshots = Bundle("snapshots")
    alone = True
    """Nothing is logged but by these rules: a primary with a follower logs on its own as well."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvrep-model-", dir=MEMORY if MEMORY.is_dir() else None))
        self.path = self.folder / "store-0"
        self.generation = 0
        self.model: dict[bytes, bytes] = {}
        self.spaces: dict[str, dict[bytes, Any]] = {name: {} for name in CODECS}
        self.held: list[Any] = []
        self.position = kvrep.Position(0, 0)
        self.emitted: list[tuple[str, bytes]] = []
        """All messages, in order."""
        self.fed: State | None = None
        """What the reader of the named feed has; ``None`` before it began."""
        self.fed_messages = 0
        self.start()

    def start(self) -> None:
        """Open the store at ``self.path``."""
        self.db = kvrep.open(self.path, **SMALL)

    def end(self, store: kvrep.Store) -> None:
        """Close a store; what is held of it is over."""
        store.close()
        self.held = [held for held in self.held if held[0]._node is not store._node]

    def teardown(self) -> None:
        try:
            self.check_digests()
            self.db.close()
        finally:
            shutil.rmtree(self.folder)

    def space(self, name: str) -> Any:
        return self.db.keyspace(name, codec=CODECS[name], keep_before=name == "kept")

    @staticmethod
    def value(name: str, value: Any) -> Any:
        """``value`` as something that the codec of the keyspace takes."""
        return {"texts": str(value), "kept": str(value).encode()}.get(name, value)

    def state(self) -> State:
        """All that the store must hold, as it is stored."""
        found: State = {("default", key): value for key, value in self.model.items()}
        for name, model in self.spaces.items():
            found |= {(name, key): CODECS[name].encode(value) for key, value in model.items()}
        return found

    def moved(self, position: kvrep.Position) -> None:
        assert position > self.position
        self.position = position

    # -- writes ----------------------------------------------------------------------------------

    @initialize(pairs=st.dictionaries(keys, values, max_size=8))
    def begin(self, pairs: dict[bytes, bytes]) -> None:
        self.db.update(pairs)
        self.model.update(pairs)

    @rule(key=keys, value=values, how=st.sampled_from(["put", "item", "future", "memoryview"]))
    def put(self, key: bytes, value: bytes, how: str) -> None:
        if how == "put":
            self.moved(self.db.put(key, value))
        elif how == "item":
            self.db[key] = value
        elif how == "future":
            self.moved(self.db.submit_put(key, value).result())
        else:
            self.moved(self.db.put(bytearray(key), memoryview(value)))  # type: ignore[arg-type]
        self.model[key] = value

    @rule(key=keys, future=st.booleans())
    def delete(self, key: bytes, future: bool) -> None:
        self.moved(self.db.submit_delete(key).result() if future else self.db.delete(key))
        self.model.pop(key, None)

    @rule(key=keys)
    def delete_item(self, key: bytes) -> None:
        if key in self.model:
            del self.db[key]
            del self.model[key]
        else:
            with pytest.raises(KeyError):
                del self.db[key]

    @rule(changes=ops, fail=st.booleans())
    def batch(self, changes: list[tuple[bytes, bytes | None]], fail: bool) -> None:
        class Stop(Exception):
            pass

        try:
            with self.db.batch() as batch:
                for key, value in changes:
                    if value is None:
                        batch.delete(key)
                    else:
                        batch.put(key, value)
                assert len(batch) == len(changes)
                if fail:
                    raise Stop
        except Stop:
            assert batch.position is None
            return
        assert (batch.position is None) == (not changes)
        self.lay(self.model, changes)

    def lay(self, model: dict[bytes, Any], changes: list[tuple[bytes, Any]]) -> None:
        for key, value in changes:
            if value is None:
                model.pop(key, None)
            else:
                model[key] = value

    @rule(
        changes=ops, fail=st.booleans(), reads=st.lists(keys, max_size=3), reverse=st.booleans(), start=edges,
        stop=edges, prefix=st.one_of(st.just(b""), keys), limit=st.one_of(st.none(), st.integers(0, 5)),
        message=st.one_of(st.none(), values),
    )  # fmt: skip
    def transaction(
        self,
        changes: list[tuple[bytes, bytes | None]],
        fail: bool,
        reads: list[bytes],
        reverse: bool,
        start: bytes | None,
        stop: bytes | None,
        prefix: bytes,
        limit: int | None,
        message: bytes | None,
    ) -> None:
        class Stop(Exception):
            pass

        model = dict(self.model)
        try:
            with self.db.transaction() as txn:
                for key in reads:
                    assert txn.get(key) == model.get(key)
                    assert (key in txn) == (key in model)
                for key, value in changes:
                    if value is None:
                        txn.delete(key)
                    else:
                        txn[key] = value
                    self.lay(model, [(key, value)])
                assert list(txn.scan(reverse=reverse)) == scan_model(model, b"", None, None, reverse, None)
                part = txn.scan(prefix=prefix, start=start, stop=stop, reverse=reverse, limit=limit)
                assert list(part) == scan_model(model, prefix, start, stop, reverse, limit)
                if message is not None:
                    txn.emit("transactions", message)
                if fail:
                    raise Stop
        except Stop:
            return
        self.model = model
        if message is not None:
            self.emitted.append(("transactions", message))

    @rule(changes=ops, name=st.sampled_from(sorted(CODECS)), key=keys, value=objects, message=st.booleans())
    def mixed_batch(
        self, changes: list[tuple[bytes, bytes | None]], name: str, key: bytes, value: Any, message: bool
    ) -> None:
        value = self.value(name, value)
        with self.db.batch() as batch:
            for k, v in changes:
                if v is not None:
                    batch.put(k, v)
            batch.put(key, value, keyspace=self.space(name))
            if message:
                batch.emit("batches", key, headers={"of": name})
        if message:
            self.emitted.append(("batches", key))
        self.lay(self.model, [c for c in changes if c[1] is not None])
        self.spaces[name][key] = value

    @rule(
        key=keys,
        expected=st.one_of(st.none(), values),
        value=st.one_of(st.none(), values),
        match=st.booleans(),
    )
    def compare_and_set(self, key: bytes, expected: bytes | None, value: bytes | None, match: bool) -> None:
        if match:
            expected = self.model.get(key)
        position = self.db.compare_and_set(key, expected=expected, value=value)
        assert (position is not None) == (self.model.get(key) == expected)
        if position is not None:
            self.moved(position)
            self.lay(self.model, [(key, value)])

    @rule(key=keys, value=values)
    def put_if_absent(self, key: bytes, value: bytes) -> None:
        assert (self.db.put_if_absent(key, value) is None) == (key in self.model)
        self.model.setdefault(key, value)

    @rule(key=keys, value=values)
    def setdefault(self, key: bytes, value: bytes) -> None:
        assert self.db.setdefault(key, value) == self.model.setdefault(key, value)

    @rule(key=keys, default=st.booleans())
    def pop(self, key: bytes, default: bool) -> None:
        if default or key in self.model:
            assert self.db.pop(key, b"none") == self.model.pop(key, b"none")
        else:
            with pytest.raises(KeyError):
                self.db.pop(key)

    @rule()
    def popitem(self) -> None:
        if not self.model:
            with pytest.raises(KeyError):
                self.db.popitem()
            return
        smallest = min(self.model)
        assert self.db.popitem() == (smallest, self.model.pop(smallest))

    @rule(pairs=st.dictionaries(keys, values, max_size=4), as_list=st.booleans())
    def update(self, pairs: dict[bytes, bytes], as_list: bool) -> None:
        self.db.update(list(pairs.items()) if as_list else pairs)
        self.model.update(pairs)

    @rule()
    def clear(self) -> None:
        self.db.clear()
        self.model.clear()

    @rule(name=st.sampled_from(sorted(CODECS)), key=keys, value=objects, delete=st.booleans())
    def keyspace_write(self, name: str, key: bytes, value: Any, delete: bool) -> None:
        space, model = self.space(name), self.spaces[name]
        if delete:
            space.delete(key)
            model.pop(key, None)
        else:
            value = self.value(name, value)
            space.put(key, value)
            model[key] = value

    @rule(
        name=st.sampled_from(sorted(CODECS)), key=st.sampled_from([b"a", b"b"]), value=objects,
        how=st.sampled_from(["put", "del", "pop", "put_if_absent", "setdefault"]),
    )  # fmt: skip
    def keyspace_condition(self, name: str, key: bytes, value: Any, how: str) -> None:
        space, model = self.space(name), self.spaces[name]
        value = self.value(name, value)
        if how == "put":
            space[key] = value
            model[key] = value
        elif how == "put_if_absent":
            assert (space.put_if_absent(key, value) is None) == (key in model)
            model.setdefault(key, value)
        elif how == "setdefault":
            assert space.setdefault(key, value) == model.setdefault(key, value)
        elif key not in model:
            with pytest.raises(KeyError):
                space.pop(key) if how == "pop" else space.__delitem__(key)
        elif how == "pop":
            assert space.pop(key) == model.pop(key)
        else:
            del space[key]
            del model[key]
        assert (key in space) == (key in model)

    @rule(
        name=st.sampled_from(sorted(CODECS)), key=st.sampled_from([b"a", b"b"]), expected=objects,
        value=objects, match=st.booleans(),
    )  # fmt: skip
    def keyspace_swap(self, name: str, key: bytes, expected: Any, value: Any, match: bool) -> None:
        space, model = self.space(name), self.spaces[name]
        if name in ("texts", "kept"):
            expected, value = (None if x is None else self.value(name, x) for x in (expected, value))
        if match:
            expected = model.get(key)
        found = model.get(key, MISSING)
        fits = found is MISSING if expected is None else found == expected
        assert (space.compare_and_set(key, expected=expected, value=value) is not None) == fits
        if fits:
            self.lay(model, [(key, value)])

    @rule(name=st.sampled_from(sorted(CODECS)))
    def keyspace_clear(self, name: str) -> None:
        self.space(name).clear()
        self.spaces[name].clear()

    # -- reads -----------------------------------------------------------------------------------

    @rule(key=keys)
    def get(self, key: bytes) -> None:
        assert self.db.get(key) == self.model.get(key)
        assert self.db.get(key, b"none") == self.model.get(key, b"none")
        assert (key in self.db) == (key in self.model)
        if key in self.model:
            assert self.db[key] == self.model[key]
        else:
            with pytest.raises(KeyError):
                self.db[key]

    @rule(
        prefix=st.one_of(st.just(b""), keys), start=edges, stop=edges, reverse=st.booleans(),
        limit=st.one_of(st.none(), st.integers(0, 5)), where=st.sampled_from(["store", "snapshot", "txn"]),
    )  # fmt: skip
    def scan(
        self,
        prefix: bytes,
        start: bytes | None,
        stop: bytes | None,
        reverse: bool,
        limit: int | None,
        where: str,
    ) -> None:
        how: dict[str, Any] = {
            "prefix": prefix, "start": start, "stop": stop, "reverse": reverse, "limit": limit,
        }  # fmt: skip
        if where == "store":
            found = list(self.db.scan(**how))
        elif where == "snapshot":
            with self.db.snapshot() as view:
                found = list(view.scan(**how))
        else:
            with self.db.transaction() as txn:
                found = list(txn.scan(**how))
        assert found == scan_model(self.model, **how)

    @rule()
    def whole(self) -> None:
        assert len(self.db) == len(self.model)
        assert list(self.db) == sorted(self.model)
        assert list(reversed(self.db)) == sorted(self.model, reverse=True)
        assert dict(self.db.items()) == self.model
        assert list(self.db.keys()) == sorted(self.model)
        assert list(self.db.values()) == [self.model[k] for k in sorted(self.model)]
        assert bool(self.db) == bool(self.model)

    @rule(name=st.sampled_from(sorted(CODECS)), key=keys, reverse=st.booleans())
    def keyspace_read(self, name: str, key: bytes, reverse: bool) -> None:
        space, model = self.space(name), self.spaces[name]
        assert space.get(key) == model.get(key)
        assert list(space.scan(reverse=reverse)) == scan_model(model, b"", None, None, reverse, None)
        assert len(space) == len(model)

    @rule(key=keys)
    def read_by_position(self, key: bytes) -> None:
        self.db.wait_for(self.position)
        assert self.db.get(key, at_least=self.position) == self.model.get(key)
        assert self.db.get(key, consistency="linearizable") == self.model.get(key)
        if self.position.offset:
            assert self.db.resolve(self.position) is kvrep.Outcome.COMMITTED
        later = kvrep.Position(self.db.position.epoch, self.db.status().last_offset + 1000)
        with pytest.raises(kvrep.StaleRead):
            self.db.wait_for(later, 0)

    @rule()
    def keyspaces(self) -> None:
        holding = {name for name, _ in self.state()}
        assert holding <= set(self.db.keyspaces()) <= {"default", *CODECS}

    # -- feeds -----------------------------------------------------------------------------------

    @rule()
    def stream_of_all(self) -> None:
        """A snapshot as a stream is all there is, and nothing twice."""
        with self.db.changes(snapshot=True, stop=self.db.position) as changes:
            rows = [((c.keyspace, c.key), c.value) for c in changes if c.kind == "put"]
        assert dict(rows) == self.state()
        assert len(rows) == len(self.state())

    @rule()
    def follow_the_feed(self) -> None:
        """A named feed brings its reader to the present state, message by message, wherever it stood."""
        with self.db.feed("model", snapshot=self.fed is None, before=True) as feed:
            if self.fed is None:
                self.fed, self.fed_messages = {}, len(self.emitted)
            while found := feed.poll(0):
                for change in found:
                    self.take(self.fed, change)
                feed.ack()
        assert self.fed == self.state()
        assert self.fed_messages == len(self.emitted)

    def take(self, fed: State, change: kvrep.Change) -> None:
        place = (change.keyspace, change.key)
        if change.kind == "emit":
            assert (change.topic, change.value) == self.emitted[self.fed_messages]
            self.fed_messages += 1
        elif change.kind in ("put", "delete"):
            if change.keyspace == "kept" and not change.snapshot:
                assert change.before == fed.get(place)
                assert change.created == (place not in fed)
            if change.kind == "put":
                fed[place] = change.value
            else:
                fed.pop(place, None)

    # -- snapshots held --------------------------------------------------------------------------

    @rule(target=snapshots)
    def take_snapshot(self) -> Any:
        held = (self.db.snapshot(), dict(self.model), {n: dict(m) for n, m in self.spaces.items()})
        self.held.append(held)
        return held

    @rule(held=snapshots, key=keys, reverse=st.booleans(), start=edges)
    def read_snapshot(self, held: Any, key: bytes, reverse: bool, start: bytes | None) -> None:
        view, model, spaces = held
        if held not in self.held:
            with pytest.raises(kvrep.ClosedError):
                view.get(key)
            return
        assert view.get(key) == model.get(key)
        assert (key in view) == (key in model)
        assert list(view.scan(reverse=reverse, start=start)) == scan_model(
            model, b"", start, None, reverse, None
        )
        assert len(view) == len(model)
        assert list(view) == sorted(model)
        for name, theirs in spaces.items():
            space = self.space(name)
            assert view.get(key, keyspace=space) == theirs.get(key)
            assert dict(view.scan(keyspace=space)) == theirs

    @rule(held=consumes(snapshots))
    def close_snapshot(self, held: Any) -> None:
        held[0].close()
        if held in self.held:
            self.held.remove(held)

    # -- the life of the store -------------------------------------------------------------------

    @rule()
    def flush(self) -> None:
        before = self.db.status().last_offset
        self.db.flush()
        status = self.db.status()
        assert status.applied_offset >= before
        assert status.applied_offset == status.committed_offset == status.last_offset or not self.alone

    @rule()
    def reopen(self) -> None:
        self.end(self.db)
        self.db.close()
        self.start()
        assert self.db.status().rescued == ()

    @precondition(lambda self: self.generation < 6)
    @rule()
    def crash(self) -> None:
        """The directory as it is while the store is open is what kill -9 would leave."""
        self.generation += 1
        assert self.db._node.engine.flusher.stop(10.0)  # nothing may change while it is copied
        copy = self.folder / f"store-{self.generation}"
        shutil.copytree(self.path, copy, ignore=shutil.ignore_patterns("lock.mdb"))
        self.end(self.db)
        self.path = copy
        self.start()

    @invariant()
    def agrees(self) -> None:
        status = self.db.status()
        assert status.applied_offset <= status.committed_offset <= status.durable_offset <= status.last_offset
        assert status.diverged_at == 0
        assert self.db.position >= self.position or self.position == kvrep.Position(0, 0)

    def check_digests(self) -> None:
        check_tree(self.db)
        assert dict(self.db.scan()) == self.model


def check_tree(store: kvrep.Store) -> None:
    """What LMDB holds is what its digests and counts say."""
    store.flush()
    tree = store._node.engine.tree
    for name in tree.keyspaces:
        digest, count = tree.digest(name)
        assert (digest, count) == (tree.state.digests[name], tree.state.counts[name])


def check_rescued(store: kvrep.Store) -> None:
    """What was dropped is at most what nodes tell each other; every write was acknowledged before the next step.

    A node may be replaced just when it has logged a mark of its flush or the start of its epoch.
    """
    for path in store.status().rescued:
        for record in load_rescue(Path(path)).records:
            assert record.kind in (Kind.EPOCH, Kind.CONFIGURATION, Kind.DIGEST), record


PAIR: dict[str, Any] = {
    **SMALL,
    "acks": 1,
    "heartbeat_interval_s": 0.1,
    "heartbeat_timeout_s": 5.0,
    "reconnect_backoff_max_s": 0.02,
}
ADDRESSES = {"a": "127.0.0.1:7001", "b": "127.0.0.1:7002"}
"""In a network of the test's own."""


class PairModel(StoreModel):
    """The same with a follower without which nothing is acknowledged; either may restart, die, be promoted."""

    alone = False

    def start(self) -> None:
        """Open what is not open, and wait until both are there."""
        if not hasattr(self, "network"):
            self.network = MemoryTransport()
            self.leader, self.follower = "a", "b"
            self.copy: kvrep.Store | None = None
        self.db = self.open(self.leader, follow=None)
        self.start_copy()

    def start_copy(self) -> None:
        if self.copy is None:
            self.copy = self.open(self.follower, follow=ADDRESSES[self.leader])
        self.ready()

    def open(self, name: str, follow: str | None) -> kvrep.Store:
        options = Options.of({**PAIR, "name": name, "listen": ADDRESSES[name], "follow": follow})  # type: ignore[typeddict-item]
        return kvrep.Store(Node.open(self.folder / name, options, self.network))

    def ready(self) -> None:
        """The primary takes writes and shows all there is, which is so when the follower has joined and votes."""

        def there() -> bool:
            status = self.db.status()
            whole = status.committed_offset == status.last_offset
            return status.voters == ("a", "b") and not status.not_writable and whole

        until(there, what="a primary with its follower")

    def end(self, store: kvrep.Store, how: Literal["close", "kill"] = "close") -> None:
        if how == "kill":  # as far as one process can: the log takes nothing more, not even a mark
            committer = store._node.engine.committer
            committer.fail_storage(OSError("killed"))
            with committer.lead:
                committer.log._current = None
        super().end(store)

    def crash(self) -> None:
        """Not as in one store: a follower would go on while the directory is copied."""

    @rule(how=st.sampled_from(["close", "kill"]))
    def restart_follower(self, how: Literal["close", "kill"]) -> None:
        assert self.copy is not None
        self.end(self.copy, how)
        self.copy = None
        self.start_copy()
        check_rescued(self.copy)

    @rule()
    def kill_primary(self) -> None:
        self.end(self.db, "kill")
        self.start()

    @rule()
    def promote_follower(self) -> None:
        """By hand, beside a living primary, which follows from then on."""
        assert self.copy is not None
        self.copy.promote()
        self.swap()

    @rule()
    def fail_over(self) -> None:
        """Without the consent of the primary, which is dead and comes back as a follower."""
        assert self.copy is not None
        self.end(self.db, "kill")
        self.copy.promote(force=False, timeout_s=10.0)
        self.swap(dead=True)

    @rule(to=st.just("follower"))
    def switch_over(self, to: str) -> None:
        self.db.switchover(self.follower)
        self.swap()

    def swap(self, *, dead: bool = False) -> None:
        assert self.copy is not None
        self.leader, self.follower = self.follower, self.leader
        self.db, self.copy = self.copy, None if dead else self.db
        self.start_copy()

    @rule(key=keys, value=values)
    def write_to_the_follower(self, key: bytes, value: bytes) -> None:
        assert self.copy is not None
        with pytest.raises(kvrep.NotPrimary):
            self.copy.put(key, value)

    @invariant()
    def follower_shows_the_same(self) -> None:
        assert self.copy is not None
        self.copy.wait_for(self.db.position, 20.0)
        assert dict(self.copy.scan()) == self.model
        for name, model in self.spaces.items():
            assert dict(self.copy.keyspace(name, codec=CODECS[name]).scan()) == model
        status = self.copy.status()
        assert (status.diverged_at, status.role) == (0, kvrep.Role.FOLLOWER)
        check_rescued(self.copy)

    def teardown(self) -> None:
        try:
            if self.copy is not None:
                self.follower_shows_the_same()
                check_tree(self.db)
                self.copy.wait_for(self.db.position, 20.0)
                check_tree(self.copy)
        finally:
            if self.copy is not None:
                self.copy.close()
            super().teardown()


StoreModel.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class TestStoreModel(StoreModel.TestCase):  # type: ignore[misc, valid-type]
    """The store does what a sorted dict does."""


PairModel.TestCase.settings = settings(StoreModel.TestCase.settings, max_examples=12)


class TestPairModel(PairModel.TestCase):  # type: ignore[misc, valid-type]
    """A store that is followed does what a sorted dict does, and its follower shows the same."""


class TestPairModelLong(PairModel.TestCase):  # type: ignore[misc, valid-type]
    """The same, for long."""

    pytestmark: ClassVar = [pytest.mark.prove, pytest.mark.timeout(3600)]
    settings = settings(
        max_examples=400,
        stateful_step_count=60,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class TestStoreModelLong(StoreModel.TestCase):  # type: ignore[misc, valid-type]
    """The same, for long."""

    pytestmark = pytest.mark.prove
    settings = settings(
        max_examples=1500,
        stateful_step_count=60,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
