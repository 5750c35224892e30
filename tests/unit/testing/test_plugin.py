"""The pytest plugin, in test suites of its own: what passes, what fails, and what a failure shows."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

HEAD = "import kvrep, pytest\n"


def run(pytester: pytest.Pytester, code: str, *arguments: str) -> pytest.RunResult:
    """Run a suite in a process of its own, as an application would: nothing is imported or configured."""
    pytester.makepyfile(HEAD + code)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", *arguments, timeout=60)


def test_what_passes(pytester: pytest.Pytester) -> None:
    """Both fixtures come with the package alone; a good test passes; missing rights are a skip that says why."""
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

def test_disk(kvrep_cluster, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    kvrep_cluster(nodes=1, acks=0, disk_bytes=1 << 20)
""",
        "-rs",
    )

    result.assert_outcomes(passed=2, skipped=1)
    result.stdout.fnmatch_lines(["*disk_bytes needs root*"])


def test_a_fault_that_is_not_allowed_skips(pytester: pytest.Pytester) -> None:
    """In the middle of a test too, and the reason is shown."""
    result = run(
        pytester,
        """
def test_slow(kvrep_cluster, monkeypatch):
    cluster = kvrep_cluster(nodes=1, acks=0, processes=True)
    monkeypatch.setattr("shutil.which", lambda name: None)
    cluster.slow_disk("a", 0.1)
""",
        "-rs",
    )

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*slow_disk needs strace*"])


def test_a_cluster_that_does_not_start_shows_its_timeline(pytester: pytest.Pytester) -> None:
    """Seed and timeline are there when the fixture itself fails, too."""
    result = run(
        pytester,
        """
def test_fails(kvrep_cluster, tmp_path):
    (tmp_path / "cluster-1" / "a" / "store").mkdir(parents=True)
    (tmp_path / "cluster-1" / "a" / "store" / "stranger").touch()
    kvrep_cluster(nodes=1, acks=0)
""",
        "--kvrep-seed=1234",
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*seed 1234, timeline of the cluster that did not start*", "*a*starts*"])


def test_what_fails(pytester: pytest.Pytester) -> None:
    """Failures show seed and timeline; damage and impossible histories that a passing test left are errors.

    A test that failed by itself is not checked again: one failure is reported once.
    """
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

def test_fails(kvrep_cluster):
    cluster = kvrep_cluster(nodes=2, acks=1)
    cluster.kill("b")
    cluster.history.begin("two", "get", b"k").done(value=b"2")
    assert cluster.seed == 1234
    assert False, "on purpose"

def test_store(kvrep_store):
    damage(kvrep_store())

def test_cluster(kvrep_cluster):
    cluster = kvrep_cluster(nodes=1, acks=0)
    damage(cluster.primary.store)

def test_history(kvrep_cluster):
    cluster = kvrep_cluster(nodes=1, acks=0)
    cluster.client("one").put(b"k", b"1")
    cluster.history.begin("two", "get", b"k").done(value=b"2")
""",
        "--kvrep-seed=1234",
    )

    result.assert_outcomes(passed=3, failed=1, errors=3)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_store*", "*the log says b'v', reads say b'rotten'*"]
    )
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_cluster*", "*kvrep cluster 1: seed 1234*"])
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_history*", "*linearizability: key b'k'*"])
    result.stdout.fnmatch_lines(
        [
            "*on purpose*",
            "*kvrep cluster 1: seed 1234, timeline*",
            "*s  cluster    seed 1234, 2 nodes, acks=1*",
            "*s  b          starts*",
            "*s  b          is killed*",
        ]
    )
