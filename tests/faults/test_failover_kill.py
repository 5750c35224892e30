"""kill -9 of a node at each step of its own promotion: whoever is left goes on, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import Outcome, Role
from tests.replication_kit import WAIT_S, NodeProcess, processes, same, until, voters

OPTIONS: dict[str, Any] = {
    "heartbeat_interval_s": 0.1,
    "heartbeat_timeout_s": 0.5,
    "reconnect_backoff_max_s": 0.1,
    "flush_interval_s": 600.0,
}
POINTS_MAX = 60
STRIKE = """
import os, signal, threading
from kvrep.runtime.roles import Roles
lock, count, said = threading.Lock(), 0, []
def step(what):
    global count
    with lock:
        count += 1
        said.append(what)
        if count == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)
def watched(what, real):
    def call(*args, **kwargs):
        step("before " + what)
        answer = real(*args, **kwargs)
        step("after " + what)
        return answer
    return call
for name in ("pwritev", "fdatasync", "fsync", "rename", "replace", "unlink", "truncate", "ftruncate"):
    setattr(os, name, watched(name, getattr(os, name)))
Roles.call = watched("call", Roles.call)
"""
"""Run in the node's process: every system call that changes the disk, and every call of another node, is a
step; at step KILL_AT the process is killed, with SIGKILL."""


def promote_and_die(node: NodeProcess, kill_at: int) -> bool:
    """Have a node promote itself and kill it at a step; whether it died before it had ended."""
    node.run(f"exec({STRIKE.replace('KILL_AT', str(kill_at))!r}, globals())")
    try:
        node.run("db.promote(timeout_s=5.0)")
    except EOFError:
        node.kill()
        return True
    except kvrep.RefusedError:
        pass
    return False


def accepted(store: kvrep.Store, key: bytes, value: bytes) -> kvrep.Position:
    """Write; a promise that the killed candidate brings back may fence the primary for a moment."""

    def attempt() -> kvrep.Position | None:
        try:
            return store.put(key, value)
        except kvrep.RefusedError:
            return None

    found: kvrep.Position = until(attempt, what="a write to be taken")
    return found


def goes_on(stores: list[kvrep.Store]) -> kvrep.Store:
    """Wait until one of the stores takes writes; a candidate that made itself primary is gone, so that one
    of the others is promoted if nobody goes on by itself."""

    def attempt() -> kvrep.Store | None:
        for store in stores:
            try:
                store.put(b"probe", b"x")
                return store
            except (kvrep.RefusedError, kvrep.UnknownOutcome):
                pass
        if all(store.status().role is Role.FOLLOWER for store in stores):
            try:
                stores[0].promote(timeout_s=2.0)
            except kvrep.RefusedError:
                pass
        return None

    found: kvrep.Store = until(attempt, what="somebody who takes writes")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.prove), 4])
def test_the_candidate_is_killed_at_each_step(tmp_path: Path, stride: int) -> None:
    """A follower that must fetch records promotes itself beside a living primary and is killed half-way: the
    primary, or whoever took over, goes on; every acknowledged write stays; the candidate comes back."""
    with (
        processes() as start,
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **OPTIONS) as a,
    ):
        with kvrep.open(tmp_path / "c", name="c", listen="127.0.0.1:0", follow=a.address, **OPTIONS) as c:
            acked: list[tuple[bytes, kvrep.Position]] = []
            primary, ended = a, False
            for kill_at in range(1, POINTS_MAX, stride):
                node = start(
                    tmp_path / "b", name="b", listen="127.0.0.1:0", follow=primary.address, **OPTIONS
                ).ready()
                voters(primary, "a", "b", "c")
                key = b"before-%d" % kill_at
                acked.append((key, accepted(primary, key, b"v")))
                until(
                    lambda node=node: len(node.run("db.status().voters")) == 3, what="b to know that it votes"
                )
                node.run("db._node.replaying.stop(5.0)")
                key = b"fetched-%d" % kill_at
                acked.append((key, accepted(primary, key, bytes(100))))  # the candidate lacks this one
                ended = not promote_and_die(node, kill_at)
                node.kill()
                primary = goes_on([primary, c if primary is a else a])
                for key, position in acked:
                    assert key in primary, f"{key!r} is lost after a kill at step {kill_at}"
                    assert primary.resolve(position) is Outcome.COMMITTED
                if ended:
                    break
            assert ended, "the promotion has more steps than were tried"
            assert kill_at > 10
            same(primary, c if primary is a else a)


def test_the_candidate_is_killed_and_the_primary_is_dead(tmp_path: Path) -> None:
    """The same with the old primary down: the other follower is promoted and has what the dead ones acked."""
    for kill_at in (2, 4, 6, 8, 10, 12):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        with processes() as start:
            a = kvrep.open(folder / "a", name="a", listen="127.0.0.1:0", acks=1, **OPTIONS)
            with kvrep.open(folder / "c", name="c", listen="127.0.0.1:0", follow=a.address, **OPTIONS) as c:
                node = start(
                    folder / "b", name="b", listen="127.0.0.1:0", follow=a.address, **OPTIONS
                ).ready()
                voters(a, "a", "b", "c")
                acked = [a.put(b"k%d" % i, b"v") for i in range(20)]
                a.close()
                promote_and_die(node, kill_at)
                node.kill()
                again = start(
                    folder / "b", name="b", listen=node.address, follow=c.address, **OPTIONS
                ).ready()
                until(lambda c=c: _promoted(c), what="c to be promoted")
                until(lambda c=c: not c.status().not_writable, what="c to take writes")
                last = c.put(b"after", b"1")
                assert all(c.resolve(p) is Outcome.COMMITTED for p in acked)
                again.run(f"db.wait_for(kvrep.Position(*{tuple(last)!r}), 10.0)", WAIT_S)
                assert again.run("len(db)") == len(c) == 21


def _promoted(store: kvrep.Store) -> bool:
    try:
        store.promote(timeout_s=3.0)
    except kvrep.RefusedError:
        return False
    return True
