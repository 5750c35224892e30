"""A failover in the middle of a stream: nodes, broker and database are real, and the primary is killed."""

from __future__ import annotations

import threading
from pathlib import Path

import kvrep
from kvrep import brokers
from kvrep.sinks.agent import Agent
from kvrep.sinks.broker import BrokerSource
from kvrep.sinks.cursor import FileCursor
from kvrep.testing.cluster import Cluster
from kvrep.testing.nodes import ClusterNode, ProcessNode
from tests.agent_kit import copy_of, wait_until
from tests.postgres_kit import PostgresServer, guarded, need_postgres
from tests.rabbit_kit import RabbitServer, need_rabbitmq

need_postgres()
need_rabbitmq()

from kvrep.sinks.postgres import PostgresSink  # noqa: E402


class Client(threading.Thread):
    """Writes growing numbers to whoever is primary, each in a transaction: to a key of its own, and to "total"."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(name="client")
        self._cluster = cluster
        self._ending = threading.Event()
        self._problem: BaseException | None = None
        self.acknowledged: list[bytes] = []

    def run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self._problem = error

    def _write(self) -> None:
        node, count = self._cluster.wait_for_primary(), 0
        while not self._ending.is_set():
            count += 1
            try:
                put(node, count)
            except kvrep.Error:  # whatever became of it: the next number goes to the next primary
                node = self._cluster.wait_for_primary()
            else:
                self.acknowledged.append(b"%010d" % count)

    def wait_for(self, more: int) -> None:
        """Until so many more writes are acknowledged."""
        wanted = len(self.acknowledged) + more
        wait_until(lambda: len(self.acknowledged) >= wanted or not self.is_alive(), "writes go on")
        assert self.is_alive()

    def end(self) -> None:
        """Write no more. Idempotent; raises what ended it before."""
        self._ending.set()
        self.join(30)
        assert not self.is_alive()
        if self._problem is not None:
            raise self._problem

    def __enter__(self) -> Client:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def put(node: ClusterNode, count: int) -> None:
    assert isinstance(node, ProcessNode)
    number = b"%010d" % count
    ops = [["default", number, number], ["default", b"total", number]]
    node.acknowledged.append(kvrep.Position.parse(node._call("write", ops=ops)["position"]))


def test_a_primary_killed_in_the_middle_of_the_stream(
    tmp_path: Path,
    shared_postgres: PostgresServer,
    shared_rabbitmq: RabbitServer,
) -> None:
    """SIGKILL of the primary: the stream goes on at another node, and nothing acknowledged is missing or doubled."""
    url, queue = shared_postgres.new_url(), shared_rabbitmq.url("failover")
    guarded(url)
    with Cluster(tmp_path / "nodes", processes=True) as cluster, Client(cluster) as client:
        primary = cluster.wait_for_primary()
        nodes = [primary, *cluster.followers]
        publication = kvrep.Publication(
            ",".join(node.connection.address for node in nodes),
            queue, FileCursor(tmp_path / "cursor"), mark_interval_s=0.5,
        )  # fmt: skip
        source = BrokerSource(brokers.connect(queue), gap_wait_s=0.5, ask_interval_s=1.0)
        client.wait_for(10)
        with publication.start(), Agent(source, PostgresSink(url), batch_changes=20) as agent:
            wait_until(lambda: agent.status().snapshots == 1 and agent.status().commits > 10, "it applies")
            cluster.kill(primary)
            client.wait_for(100)
            client.end()
            successor = cluster.wait_for_primary()
            agent.wait_for(successor.put(b"end", b"1"), 30)
            after, sent = agent.status(), publication.status()
        cluster.assert_no_acknowledged_loss()
        content = successor.content()
    copy = copy_of(PostgresSink(url))["default"]
    assert {("default", key): value for key, value in copy.items()} == content
    assert copy.keys() >= set(client.acknowledged)
    assert sent.reconnects >= 1
    assert (sent.snapshots, after.snapshots, after.dead_letters) == (1, 1, 0)
    assert after.consistent
