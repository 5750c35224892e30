"""The pytest plugin, in test suites of its own: what passes, what fails, and what a failure shows."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

HEAD = "import kvrep, pytest\n"


def run(pytester: pytest.Pytester, code: str, *arguments: str) -> pytest.RunResult:
    """Run a suite in a process of its own, as an application would: nothing is imported or configured."""
    pytester.makepyfile(HEAD + code)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", *arguments, timeout=60)


def test_fixtures_are_there(pytester: pytest.Pytester) -> None:
    """Both fixtures come with the package alone, and a good test passes."""
    result = run(
        pytester,
        """
def test_store(kvrep_store):
    store = kvrep_store()
    store.put(b"k", b"v")
    store.close()
    again = kvrep_store()
    assert again[b"k"] == b"v"
    assert kvrep_store("other", durability="os").get(b"k") is None

def test_orders_survive_failover(kvrep_cluster):
    cluster = kvrep_cluster(nodes=3, acks="majority")
    cluster.primary.put(b"k", b"v")
    cluster.kill(cluster.primary)
    cluster.wait_for_primary()
    assert cluster.primary.get(b"k") == b"v"
""",
    )

    result.assert_outcomes(passed=2)


def test_a_failure_shows_seed_and_timeline(pytester: pytest.Pytester) -> None:
    """The seed, the faults and the nodes' own words are part of the report; --kvrep-seed sets the seed."""
    result = run(
        pytester,
        """
def test_fails(kvrep_cluster):
    cluster = kvrep_cluster(nodes=2, acks=1)
    cluster.kill("b")
    assert cluster.seed == 1234
    assert False, "on purpose"
""",
        "--kvrep-seed=1234",
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*on purpose*",
            "*kvrep cluster 1: seed 1234, timeline*",
            "*s  cluster    seed 1234, 2 nodes, acks=1*",
            "*s  b          starts*",
            "*s  b          is killed*",
        ]
    )


def test_stores_are_checked_after_the_test(pytester: pytest.Pytester) -> None:
    """Damage that a passing test left behind is an error, with the timeline."""
    result = run(
        pytester,
        """
def damage(store):
    store.put(b"k", b"v")
    store.flush()
    tree = store._node.engine.tree
    with tree.env.begin(write=True) as txn:
        txn.put(b"k", b"rotten", db=tree.handle("default"))
    tree.refresh()

def test_store(kvrep_store):
    damage(kvrep_store())

def test_cluster(kvrep_cluster):
    cluster = kvrep_cluster(nodes=1, acks=0)
    damage(cluster.primary.store)
""",
    )

    result.assert_outcomes(passed=2, errors=2)
    result.stdout.fnmatch_lines(["*store: *the log says b'v', reads say b'rotten'*"])
    result.stdout.fnmatch_lines(["*kvrep cluster 1: seed *"])


def test_histories_are_checked_after_the_test(pytester: pytest.Pytester) -> None:
    """A recorded client that was told something impossible is an error."""
    result = run(
        pytester,
        """
def test_cluster(kvrep_cluster):
    cluster = kvrep_cluster(nodes=1, acks=0)
    cluster.client("one").put(b"k", b"1")
    cluster.history.begin("two", "get", b"k").done(value=b"2")
""",
    )

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*linearizability: key b'k'*"])


def test_a_failing_test_is_not_checked_again(pytester: pytest.Pytester) -> None:
    """One failure is reported once; what it left half-done is only closed."""
    result = run(
        pytester,
        """
def test_cluster(kvrep_cluster):
    cluster = kvrep_cluster(nodes=1, acks=0)
    cluster.history.begin("two", "get", b"k").done(value=b"2")
    raise ValueError("first")
""",
    )

    result.assert_outcomes(failed=1)


def test_missing_rights_are_a_skip(pytester: pytest.Pytester) -> None:
    """A fault that needs root skips the test and says why."""
    result = run(
        pytester,
        """
def test_disk(kvrep_cluster, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    kvrep_cluster(nodes=1, acks=0, disk_bytes=1 << 20)
""",
        "-rs",
    )

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*disk_bytes needs root*"])
