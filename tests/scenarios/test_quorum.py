"""Whole nodes under the built-in coordinator: they form a group, elect, fail over and come back by themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.coordination.driver import Driver
from kvrep.runtime.coordinated import CoordinatedNode
from kvrep.runtime.roles import Roles
from tests.ports import free_address

DEADLINE_S = 20.0


class Group:
    """Nodes by name, each under ``kvrep.Quorum`` with the same peers."""

    def __init__(self, folder: Path, names: str, **options: Any) -> None:
        self.folder = folder
        self.peers = {name: free_address() for name in names}
        self.options = options
        self.nodes: dict[str, kvrep.Store] = {}

    def start(self, name: str, **more: Any) -> kvrep.Store:
        choice = kvrep.Quorum(peers=self.peers, **more)
        store = kvrep.open(
            self.folder / name, name=name, listen=self.peers[name], coordinator=choice, **self.options
        )
        self.nodes[name] = store
        return store

    def stop(self, name: str) -> None:
        self.nodes.pop(name).close()

    def write(self, key: bytes, value: bytes) -> tuple[str, kvrep.Position]:
        """Write at whoever is primary, as soon as somebody is; (its name, the position)."""
        deadline = time.monotonic() + DEADLINE_S
        refused: dict[str, str] = {}
        changed = threading.Event()
        while time.monotonic() < deadline:
            for name, store in list(self.nodes.items()):
                try:
                    return name, store.put(key, value)
                except kvrep.RefusedError as error:
                    refused[name] = str(error)
            changed.wait(0.01)
        raise AssertionError(f"nobody takes writes: {refused}")

    def close(self) -> None:
        for store in self.nodes.values():
            store.close()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Callable[..., Group]]:
    made: list[Group] = []

    def make(names: str, **options: Any) -> Group:
        made.append(Group(tmp_path, names, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_nodes_started_empty_form_one_group(group: Callable[..., Group]) -> None:
    """Three empty nodes become one group with one lineage, one primary and three voters."""
    three = group("abc")
    for name in "abc":
        three.start(name)

    name, position = three.write(b"k", b"v")

    for store in three.nodes.values():
        store.wait_for(position, timeout_s=DEADLINE_S)
        assert store[b"k"] == b"v"
    statuses = [store.status() for store in three.nodes.values()]
    assert len({s.lineage for s in statuses}) == 1
    assert [s.name for s in statuses if s.role is kvrep.Role.PRIMARY] == [name]
    assert all(sorted(s.voters) == ["a", "b", "c"] and s.acks == "majority" for s in statuses)


def test_a_founder_that_nobody_confirms_in_time(
    group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It steps down before anybody has joined; voters that are empty still put it back."""
    founded, stepped_down = threading.Event(), threading.Event()
    become, step_down, call = Driver._become, CoordinatedNode.step_down, Driver._call_once

    def note_founded(*arguments: Any) -> None:
        founded.set()
        become(*arguments)

    def note_stepped_down(*arguments: Any) -> None:
        step_down(*arguments)
        stepped_down.set()

    def held_up(*arguments: Any) -> Any:
        if founded.is_set():
            stepped_down.wait(DEADLINE_S)
        return call(*arguments)

    monkeypatch.setattr(Driver, "_become", note_founded)
    monkeypatch.setattr(CoordinatedNode, "step_down", note_stepped_down)
    monkeypatch.setattr(Driver, "_call_once", held_up)
    nodes = group("abc")
    for name in "abc":
        nodes.start(name)
    assert nodes.write(b"k", b"v")[0] == "a"
    assert stepped_down.is_set()


def test_a_founding_that_is_interrupted_is_begun_again(
    group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lineage is there and its first record is not: the same node begins the group again, restarted or not."""
    take_over = Roles.take_over
    attempts: list[bytes] = []

    def fail_twice(self: Roles, *arguments: Any, **more: Any) -> None:
        if more.get("founding") is not None:
            attempts.append(self.node.engine.home.lineage)
            if len(attempts) <= 2:
                raise kvrep.StorageFull("no room for the first record")
        take_over(self, *arguments, **more)

    monkeypatch.setattr(Roles, "take_over", fail_twice)
    nodes = group("abc")
    for name in "abc":
        nodes.start(name)
    deadline = time.monotonic() + DEADLINE_S
    while not attempts and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    nodes.stop("a")
    nodes.start("a")
    assert nodes.write(b"k", b"v")[0] == "a"
    assert len(attempts) == 3
    assert len(set(attempts)) == 1


def test_a_lone_node_waits_for_its_peers(group: Callable[..., Group]) -> None:
    """Before all listed peers have answered, an empty node forms no group and refuses writes with a reason."""
    three = group("abc")
    alone = three.start("a")

    with pytest.raises(kvrep.NotPrimary):
        alone.put(b"k", b"v")

    assert alone.status().position == (0, 0)


def test_the_group_outlives_its_primaries(group: Callable[..., Group]) -> None:
    """Each primary that leaves is replaced, nothing acknowledged is missing, and it comes back as a follower."""
    three = group("abc")
    for name in "abc":
        three.start(name)
    written: dict[bytes, bytes] = {}
    for turn in range(4):
        name, _ = three.write(b"before %d" % turn, b"1")
        three.stop(name)
        after, position = three.write(b"after %d" % turn, b"2")
        written |= {b"before %d" % turn: b"1", b"after %d" % turn: b"2"}
        assert after != name
        back = three.start(name)
        back.wait_for(position, timeout_s=DEADLINE_S)
        assert back.status().role is kvrep.Role.FOLLOWER

    for store in three.nodes.values():
        store.wait_for(position, timeout_s=DEADLINE_S)
        assert dict(store) == written


def test_a_minority_takes_no_writes(group: Callable[..., Group]) -> None:
    """With two of three nodes gone the last one refuses writes and serves reads; they return, and it goes on."""
    three = group("abc")
    for name in "abc":
        three.start(name)
    _, position = three.write(b"k", b"v")
    for store in three.nodes.values():
        store.wait_for(position, timeout_s=DEADLINE_S)
    last = "c"
    for name in "ab":
        three.stop(name)

    with pytest.raises((kvrep.RefusedError, kvrep.AckTimeout)):
        three.nodes[last].put(b"lost", b"x", timeout_s=0.5)
    assert three.nodes[last][b"k"] == b"v"

    three.start("a")
    name, position = three.write(b"again", b"v")
    assert name in "ac"


def test_a_witness_lets_two_data_nodes_fail_over(group: Callable[..., Group]) -> None:
    """Two data nodes and a witness: the survivor of the two is elected with the witness's promise."""
    three = group("abw", acks=1)
    three.start("a")
    three.start("b")
    three.start("w", witness=True)
    name, position = three.write(b"k", b"v")
    other = "b" if name == "a" else "a"
    three.nodes[other].wait_for(position, timeout_s=DEADLINE_S)

    three.stop(name)

    survivor = three.nodes[other]
    deadline = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while survivor.status().role is not kvrep.Role.PRIMARY and time.monotonic() < deadline:
        pause.wait(0.02)
    assert survivor.status().role is kvrep.Role.PRIMARY
    assert survivor[b"k"] == b"v"
    assert len(three.nodes["w"]) == 0
    three.start(name)
    _, position = three.write(b"both", b"again")
    assert position.epoch > 1001


def test_an_emptied_node_cannot_outvote_the_one_with_data(
    group: Callable[..., Group], tmp_path: Path
) -> None:
    """A node whose directory was lost joins the group that exists; it forms no new one and wipes nobody."""
    import shutil

    three = group("abc")
    for name in "abc":
        three.start(name)
    _, position = three.write(b"k", b"v")
    for store in three.nodes.values():
        store.wait_for(position, timeout_s=DEADLINE_S)
    for name in "ab":
        three.stop(name)
        shutil.rmtree(tmp_path / name)
    three.start("a")
    three.start("b")

    lineage = three.nodes["c"].status().lineage
    assert three.nodes["c"][b"k"] == b"v"
    with pytest.raises((kvrep.RefusedError, kvrep.AckTimeout)):
        three.nodes["a"].put(b"new", b"world", timeout_s=0.5)
    assert three.nodes["a"].status().lineage in ("", lineage)
    assert three.nodes["c"].status().lineage == lineage


def test_wrong_settings_stop_the_start(tmp_path: Path) -> None:
    """A coordinator without a name or an address, or beside follow=, is refused with the option's name."""
    choice = kvrep.Quorum(peers={"a": "127.0.0.1:1"})
    for options in ({"listen": "127.0.0.1:0"}, {"name": "a"}):
        with pytest.raises(kvrep.ConfigurationMismatch, match="coordinator"):
            kvrep.open(tmp_path / "s", coordinator=choice, **options)
    with pytest.raises(kvrep.ConfigurationMismatch, match="follow"):
        kvrep.open(tmp_path / "s", name="a", listen="127.0.0.1:0", follow="127.0.0.1:1", coordinator=choice)
