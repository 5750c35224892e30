"""A real store against a dict, through every public operation, with reopening and crashes in between."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

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
from kvrep.codecs import JSON, MSGPACK, TEXT

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
CODECS: dict[str, Any] = {"texts": TEXT, "objects": MSGPACK, "documents": JSON}
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

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvrep-model-", dir=MEMORY if MEMORY.is_dir() else None))
        self.path = self.folder / "store-0"
        self.generation = 0
        self.model: dict[bytes, bytes] = {}
        self.spaces: dict[str, dict[bytes, Any]] = {name: {} for name in CODECS}
        self.held: list[Any] = []
        self.position = kvrep.Position(0, 0)
        self.db = kvrep.open(self.path, **SMALL)

    def teardown(self) -> None:
        try:
            self.check_digests()
            self.db.close()
        finally:
            shutil.rmtree(self.folder)

    def space(self, name: str) -> Any:
        return self.db.keyspace(name, codec=CODECS[name])

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

    @rule(changes=ops, fail=st.booleans(), reads=st.lists(keys, max_size=3), reverse=st.booleans())
    def transaction(
        self, changes: list[tuple[bytes, bytes | None]], fail: bool, reads: list[bytes], reverse: bool
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
                if fail:
                    raise Stop
        except Stop:
            return
        self.model = model

    @rule(changes=ops, name=st.sampled_from(sorted(CODECS)), key=keys, value=objects)
    def mixed_batch(
        self, changes: list[tuple[bytes, bytes | None]], name: str, key: bytes, value: Any
    ) -> None:
        value = str(value) if name == "texts" else value
        with self.db.batch() as batch:
            for k, v in changes:
                if v is not None:
                    batch.put(k, v)
            batch.put(key, value, keyspace=self.space(name))
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
            value = str(value) if name == "texts" else value
            space.put(key, value)
            model[key] = value

    @rule(
        name=st.sampled_from(sorted(CODECS)), key=st.sampled_from([b"a", b"b"]), value=objects,
        how=st.sampled_from(["put", "del", "pop", "put_if_absent", "setdefault"]),
    )  # fmt: skip
    def keyspace_condition(self, name: str, key: bytes, value: Any, how: str) -> None:
        space, model = self.space(name), self.spaces[name]
        value = str(value) if name == "texts" else value
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
        if name == "texts":
            expected, value = (None if x is None else str(x) for x in (expected, value))
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
        self.db.flush()
        status = self.db.status()
        assert status.applied_offset == status.committed_offset == status.last_offset

    @rule()
    def reopen(self) -> None:
        self.db.close()
        self.db.close()
        self.held.clear()
        self.db = kvrep.open(self.path, **SMALL)
        assert self.db.status().rescued == ()

    @precondition(lambda self: self.generation < 6)
    @rule()
    def crash(self) -> None:
        """The directory as it is while the store is open is what kill -9 would leave."""
        self.generation += 1
        assert self.db._node.engine.flusher.stop(10.0)  # nothing may change while it is copied
        copy = self.folder / f"store-{self.generation}"
        shutil.copytree(self.path, copy, ignore=shutil.ignore_patterns("lock.mdb"))
        self.db.close()
        self.held.clear()
        self.path = copy
        self.db = kvrep.open(self.path, **SMALL)

    @invariant()
    def agrees(self) -> None:
        status = self.db.status()
        assert status.applied_offset <= status.committed_offset <= status.durable_offset <= status.last_offset
        assert status.diverged_at == 0
        assert self.db.position >= self.position or self.position == kvrep.Position(0, 0)

    def check_digests(self) -> None:
        self.db.flush()
        tree = self.db._node.engine.tree
        for name in tree.keyspaces:
            digest, count = tree.digest(name)
            assert (digest, count) == (tree.state.digests[name], tree.state.counts[name])
        assert dict(self.db.scan()) == self.model


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
