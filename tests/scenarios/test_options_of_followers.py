"""A new follower whose options contradict its group's configuration: refused before it joins, not at its next start."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_quorum import Group

import kvrep
from kvrep import ConfigurationMismatch
from kvrep.runtime import service
from kvrep.runtime.node import Node
from tests.replication_kit import FAST, WAIT_S, same, until, voters, writable

GROUP: dict[str, Any] = {"acks": 1, "ack_timeout_s": 4.0}


def refused(store: kvrep.Store) -> kvrep.SourceStatus:
    """Wait until the store has given up following."""
    source = until(lambda: (s := store.status().source) is not None and s.state == "refused" and s)
    assert isinstance(source, kvrep.SourceStatus)
    return source


def state(status: kvrep.Status) -> tuple[tuple[str, ...], int, str]:
    """Who votes, what is committed, and what prevents writes."""
    return status.voters, status.committed_offset, status.not_writable


@pytest.mark.parametrize(
    ("option", "given", "kept"),
    [
        ("acks", 0, 1),
        ("acks", "all", 1),
        ("ack_timeout_s", 2.0, 4.0),
        ("degrade_after_s", 9.0, 0.0),
        ("lag_records_max", 5, 0),
    ],
)
def test_a_new_follower_of_another_rule_is_refused(
    tmp_path: Path, option: str, given: Any, kept: Any
) -> None:
    """The error of the second start comes from every wait; nothing is taken over, and the group does not notice."""
    with (
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **GROUP, **FAST) as a,
        kvrep.open(tmp_path / "b", name="b", follow=a.address, **GROUP, **FAST),
    ):
        voters(writable(a), "a", "b")
        last = a.put(b"k", b"v")
        before = state(a.status())
        with kvrep.open(tmp_path / "c", name="c", follow=a.address, **FAST, **{option: given}) as c:
            source = refused(c)
            assert f"{option}={kept!r}" in source.problem
            assert "reconfigure()" in source.problem
            assert not source.connected
            for wait in (
                lambda: c.wait_for(last, WAIT_S),
                lambda: c.get(b"k", at_least=last, timeout_s=WAIT_S),
                lambda: c.get(b"k", max_staleness_s=1.0),
            ):
                with pytest.raises(ConfigurationMismatch) as caught:
                    wait()
                assert (caught.value.option, caught.value.given, caught.value.stored) == (option, given, kept)
            with pytest.raises(ConfigurationMismatch):
                c.follow(a.address)  # it would follow nobody all the same
            assert c.status().last_offset == 0
            assert state(a.status()) == before
        with kvrep.open(tmp_path / "c", name="c", follow=a.address, **FAST) as c:
            voters(a, "a", "b", "c")
            same(a, c)


def test_a_wait_that_is_under_way_ends_at_once(tmp_path: Path) -> None:
    """Also one of asyncio: who waits for a group that comes up later learns why it never will."""
    with (
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **GROUP, **FAST) as a,
        kvrep.open(tmp_path / "b", name="b", follow=a.address, **GROUP, **FAST),
    ):
        last = writable(a).put(b"k", b"v")

        async def wait() -> None:
            async with kvrep.aio.open(tmp_path / "c", name="c", follow=a.address, acks=0, **FAST) as c:
                with pytest.raises(ConfigurationMismatch):
                    await c.wait_for(last, WAIT_S)
                with pytest.raises(ConfigurationMismatch):
                    await c.get(b"k", max_staleness_s=1.0)

        asyncio.run(wait())


def test_what_is_forwarded_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    """Else the group would do it, and the caller never learn so: it cannot become readable here."""
    with (
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **GROUP, **FAST) as a,
        kvrep.open(tmp_path / "b", name="b", follow=a.address, **GROUP, **FAST),
        kvrep.open(tmp_path / "c", name="c", follow=a.address, forward_writes=True, acks=0, **FAST) as c,
    ):
        last = writable(a).put(b"k", b"v")
        refused(c)
        with pytest.raises(ConfigurationMismatch):
            c.put(b"k", b"c")
        with pytest.raises(ConfigurationMismatch):
            c.submit_put(b"k", b"c")
        assert a.position == last


def test_a_founder_is_not_compared_with_its_own_group(tmp_path: Path) -> None:
    """Its options were the first configuration. Once it follows another node, a rule that was changed stops it not."""
    group = Group(tmp_path, "abc", acks="majority")
    try:
        for name in "abc":
            group.start(name)
        founder = group.nodes[(name := group.write(b"k", b"1")[0])]
        voters(founder, "a", "b", "c")
        founder.reconfigure(acks=1)
        founder.switchover(next(other for other in "abc" if other != name), timeout_s=WAIT_S)
        _, position = group.write(b"k", b"2")
        founder.wait_for(position, WAIT_S)
        assert founder.status().source is not None
    finally:
        group.close()


def test_equal_options_are_fine_and_stay_so(tmp_path: Path) -> None:
    """A follower opened like its primary joins; a rule that is changed later stops nobody who runs. Times are compared
    as the log keeps them."""
    options = {**GROUP, "ack_timeout_s": 4.00049}
    with (
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **options, **FAST) as a,
        kvrep.open(tmp_path / "b", name="b", follow=a.address, **options, **FAST) as b,
    ):
        voters(writable(a), "a", "b")
        a.reconfigure(acks=0)
        b._node.replaying._stream.cancel()  # type: ignore[union-attr]
        last = a.put(b"k", b"v")
        b.wait_for(last, WAIT_S)
    with kvrep.open(tmp_path / "b", name="b", ack_timeout_s=4.00049):
        pass


def test_a_group_that_is_not_there_yet(tmp_path: Path) -> None:
    """The follower was first: it asks until somebody answers who has a configuration."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as a:
        address = a.address
    with kvrep.open(tmp_path / "c", name="c", follow=address, acks="all", **FAST) as c:
        until(lambda: (s := c.status().source) is not None and s.state == "waiting")
        with kvrep.open(tmp_path / "a", name="a", listen=address, **FAST):
            assert "acks=1" in refused(c).problem


def test_who_becomes_primary_after_it_was_asked_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower that says that it is none, and then welcomes the new node as primary, does not make it a voter."""
    asked: list[kvrep.Status] = []
    status_of = service.status_of

    def follower_at_first(node: Node, **options: Any) -> kvrep.Status:
        status = status_of(node, **options)
        asked.append(status)
        return replace(status, role=kvrep.Role.FOLLOWER) if len(asked) == 1 else status

    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as a:
        writable(a).put(b"k", b"v")
        monkeypatch.setattr(service, "status_of", follower_at_first)
        with kvrep.open(tmp_path / "c", name="c", follow=a.address, acks="all", **FAST) as c:
            assert "acks=0" in refused(c).problem
            assert len(asked) >= 2
            assert c.status().last_offset == 0
        assert a.status().voters == ("a",)


@pytest.mark.parametrize("failure", [kvrep.StorageFailed("its disk"), ConfigurationMismatch("its own")])
def test_a_failure_of_the_primary_is_not_ours(
    tmp_path: Path, failure: kvrep.Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the primary cannot say what its group goes by, a new follower waits, and then joins."""

    def fail(node: Node) -> kvrep.Status:
        del node
        raise failure

    with (
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as a,
        kvrep.open(tmp_path / "b", name="b", follow=a.address, **FAST),
        monkeypatch.context() as patch,
    ):
        patch.setattr("kvrep.runtime.service.status_of", fail)
        with kvrep.open(tmp_path / "c", name="c", follow=a.address, acks=1, **FAST) as c:

            def waits() -> bool:
                source = c.status().source
                assert source is not None
                return source.state == "waiting" and failure.message in source.problem

            until(waits)
            patch.undo()
            voters(a, "a", "b", "c")
