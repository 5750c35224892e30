"""Whole nodes under the etcd coordinator, with a real etcd: two data nodes, etcd as the third vote."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvrep
from tests.etcd_kit import EtcdServer
from tests.ports import free_address

DEADLINE_S = 30.0


def start(
    folder: Path, name: str, address: str, etcd: EtcdServer, cluster: str, **options: Any
) -> kvrep.Store:
    choice = kvrep.Etcd(endpoints=[etcd.endpoint], cluster=cluster)
    return kvrep.open(folder / name, name=name, listen=address, acks=1, coordinator=choice, **options)


def write(nodes: dict[str, kvrep.Store], key: bytes) -> tuple[str, kvrep.Position]:
    """Write at whoever is primary, as soon as somebody is."""
    deadline = time.monotonic() + DEADLINE_S
    refused: dict[str, str] = {}
    pause = threading.Event()
    while time.monotonic() < deadline:
        for name, store in nodes.items():
            try:
                return name, store.put(key, b"v")
            except kvrep.RefusedError as error:
                refused[name] = f"{error} {store.status().role}"
        pause.wait(0.02)
    raise AssertionError(f"nobody takes writes: {refused}")


def test_two_nodes_and_etcd(tmp_path: Path, etcd_server: EtcdServer) -> None:
    """The key in etcd makes one of two nodes primary; when it leaves, the other takes over with all data."""
    addresses = {"a": free_address(), "b": free_address()}
    nodes = {name: start(tmp_path, name, address, etcd_server, "two") for name, address in addresses.items()}
    try:
        name, position = write(nodes, b"k")
        other = "b" if name == "a" else "a"
        nodes[other].wait_for(position, timeout_s=DEADLINE_S)
        nodes.pop(name).close()

        deadline = time.monotonic() + DEADLINE_S
        pause = threading.Event()
        while nodes[other].status().role is not kvrep.Role.PRIMARY and time.monotonic() < deadline:
            pause.wait(0.05)

        assert nodes[other].status().role is kvrep.Role.PRIMARY
        assert nodes[other][b"k"] == b"v"
        nodes[name] = start(tmp_path, name, addresses[name], etcd_server, "two")
        _, position = write(nodes, b"l")
        for store in nodes.values():
            store.wait_for(position, timeout_s=DEADLINE_S)
    finally:
        for store in nodes.values():
            store.close()


def test_a_primary_goes_on_without_etcd(tmp_path: Path, etcd_server: EtcdServer) -> None:
    """With etcd stopped the primary keeps taking writes, because its voters confirm it."""
    addresses = {"a": free_address(), "b": free_address()}
    nodes = {name: start(tmp_path, name, address, etcd_server, "gone") for name, address in addresses.items()}
    try:
        name, _ = write(nodes, b"k")
        etcd_server.stop()
        end = time.monotonic() + 6.0  # twice the lease
        count = 0
        while time.monotonic() < end:
            nodes[name].put(b"n", b"%d" % count)
            count += 1
        assert nodes[name].status().role is kvrep.Role.PRIMARY
    finally:
        for store in nodes.values():
            store.close()


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        pause.wait(0.01)


def test_etcd_remembers_that_the_rule_went_on_with_fewer_copies(
    tmp_path: Path, etcd_server: EtcdServer
) -> None:
    """One of two nodes goes on alone with etcd's word, and dies; the other is not promoted, by no way."""
    addresses = {"a": free_address(), "b": free_address()}

    def begin(name: str) -> kvrep.Store:
        return start(tmp_path, name, addresses[name], etcd_server, "alone", degrade_after_s=0.5)

    nodes = {name: begin(name) for name in addresses}
    try:
        name, position = write(nodes, b"k")
        other = "b" if name == "a" else "a"
        nodes[other].wait_for(position, timeout_s=DEADLINE_S)
        nodes.pop(other).close()
        until(lambda: nodes[name].status().away, "the rule to go on without the other")
        nodes[name].put(b"alone", b"v")
        nodes.pop(name).close()

        nodes[other] = begin(other)
        coordinator = nodes[other]._node.coordinator
        until(lambda: "fewer copies" in coordinator.status().problem, "etcd's word")  # type: ignore[union-attr]
        with pytest.raises(kvrep.UnsafePromotion, match="fewer copies"):
            nodes[other].promote(timeout_s=10.0)
        assert nodes[other].status().role is kvrep.Role.FOLLOWER

        nodes[name] = begin(name)
        who, position = write(nodes, b"again")
        assert who == name
        nodes[other].wait_for(position, timeout_s=DEADLINE_S)
        assert nodes[other][b"alone"] == b"v"
        until(lambda: not nodes[name].status().away, "protection")
    finally:
        for store in nodes.values():
            store.close()


def test_without_etcd_the_rule_stays(tmp_path: Path, etcd_server: EtcdServer) -> None:
    """etcd is gone, then the other node: nobody agrees to fewer copies, and writes stay refused."""
    addresses = {"a": free_address(), "b": free_address()}
    nodes = {
        name: start(tmp_path, name, address, etcd_server, "none", degrade_after_s=0.3)
        for name, address in addresses.items()
    }
    try:
        name, _ = write(nodes, b"k")
        primary = nodes[name]
        refused = threading.Event()
        primary.on_event(lambda event: event.kind is kvrep.EventKind.NOT_DEGRADED and refused.set())
        etcd_server.stop()
        nodes.pop("b" if name == "a" else "a").close()
        until(lambda: refused.is_set() or primary.status().role is not kvrep.Role.PRIMARY, "an end")
        with pytest.raises(kvrep.RefusedError):
            primary.put(b"l", b"v", timeout_s=0.5)
        assert primary.status().unprotected == ()
    finally:
        for store in nodes.values():
            store.close()
