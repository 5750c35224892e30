"""The pytest plugin: fixtures ``kvrep_store`` and ``kvrep_cluster``, in every suite that has kvrep[testing].

::

    def test_orders_survive_failover(kvrep_cluster):
        cluster = kvrep_cluster(nodes=3, acks="majority")
        cluster.primary.put(b"k", b"v")
        cluster.kill(cluster.primary)
        cluster.wait_for_primary()
        assert cluster.primary.get(b"k") == b"v"

After the test every store is checked: the log, LMDB and the digests must agree, and the history of recorded
clients (:meth:`Cluster.client`) must keep the promises. A failure shows the seed and a timeline of all nodes.
``--kvrep-seed`` repeats what a seed decides.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvrep.store import Store
    from kvrep.testing.cluster import Cluster

__all__ = ["kvrep_cluster", "kvrep_store"]

_clusters = pytest.StashKey[list[Any]]()
_passed = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvrep")
    group.addoption(
        "--kvrep-seed",
        type=int,
        default=None,
        help="what random faults are drawn from (default: a number made from each test's name)",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember how the test went, and add the timelines of its clusters to a failure."""
    report: Any = yield
    if report.when == "call":
        item.stash[_passed] = report.passed
    if report.failed:
        made = item.stash.setdefault(_clusters, [])
        for number, cluster in enumerate(made):
            title = f"kvrep cluster {number + 1}: seed {cluster.seed}, timeline"
            report.sections.append((title, str(cluster.timeline)))
    return report  # type: ignore[no-any-return]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A fault that this machine does not allow skips the test, and says why."""
    try:
        yield
    except Exception as error:
        if item.stash.get(_clusters, None):
            from kvrep.testing.cluster import NotPrivileged

            if isinstance(error, NotPrivileged):
                pytest.skip(str(error))
        raise


def _seed(request: pytest.FixtureRequest) -> int:
    given = request.config.getoption("--kvrep-seed")
    return zlib.crc32(request.node.nodeid.encode()) if given is None else int(given)


@pytest.fixture
def kvrep_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """``kvrep_store(**options)`` opens a store in a temporary folder; ``folder="x"`` is for several.

    After the test every store that is still open is checked and closed.
    """
    import kvrep
    from kvrep.testing.checkers import assert_none
    from kvrep.testing.storecheck import check_store

    opened: list[Store] = []

    def make(folder: str = "store", **options: Any) -> Store:
        store = kvrep.open(tmp_path / folder, **options)
        opened.append(store)
        return store

    yield make
    violations = []
    try:
        for store in opened:
            if not store.closed and request.node.stash.get(_passed, False):
                violations += check_store(store)
    finally:
        for store in opened:
            store.close()
    assert_none(violations)


@pytest.fixture
def kvrep_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """``kvrep_cluster(nodes=3, acks="majority", processes=False, coordinator="auto", **options)``.

    Returns a running :class:`kvrep.testing.cluster.Cluster`. After a test that passed, everything is checked.
    Where a fault needs rights that are missing, the test is skipped and says so.
    """
    from kvrep.testing.checkers import assert_none
    from kvrep.testing.cluster import Cluster, NotPrivileged

    made: list[Cluster] = request.node.stash.setdefault(_clusters, [])

    def make(**options: Any) -> Cluster:
        try:
            cluster = Cluster(tmp_path / f"cluster-{len(made) + 1}", **{"seed": _seed(request), **options})
        except NotPrivileged as reason:
            pytest.skip(str(reason))
        made.append(cluster)
        return cluster

    yield make
    violations = []
    try:
        for cluster in made:
            if request.node.stash.get(_passed, False):
                violations += cluster.check()
    finally:
        for cluster in made:
            cluster.close()
    assert_none(violations)
