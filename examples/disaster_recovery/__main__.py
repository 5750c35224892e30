"""One command: ``python -m examples.disaster_recovery`` (from a checkout, after ``make .venv``).

It starts RabbitMQ and PostgreSQL in temporary folders (or takes ``--rabbitmq`` and ``--postgres``), a shop that
writes orders at a primary site, an agent that keeps tables in PostgreSQL, and a far kvrep store behind the broker.
Then it kills the primary site in mid-order, promotes the far store, and counts what is missing: nothing that was
acknowledged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import kvrep
from kvrep.codecs import JSON
from kvrep.sinks.postgres import PostgresSink
from kvrep.sinks.tables import parse_table

TABLE = "orders=json(key text, customer text, total numeric)"
WAIT_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.disaster_recovery", description=__doc__)
    parser.add_argument(
        "--rabbitmq", metavar="URL", help="amqp://user:password@host:port/vhost of a running server"
    )
    parser.add_argument("--postgres", metavar="URL", help="postgresql://… of a running server")
    parser.add_argument(
        "--orders", type=int, default=300, help="how many to take before the disaster (default 300)"
    )
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvrep-dr-")))
        folder.chmod(0o755)
        rabbitmq = args.rabbitmq or _rabbitmq(folder, stack)
        postgres = args.postgres or _postgres(folder, stack)
        return _story(folder, rabbitmq, postgres, args.orders, stack)


def _story(folder: Path, rabbitmq: str, postgres: str, orders: int, stack: ExitStack) -> int:
    log_url, events_url = f"{rabbitmq}?topic=shop-log", f"{rabbitmq}?topic=shop-events"
    database = f"{postgres}?schema=shop"

    say("the far site: a kvrep store that follows the broker, and an agent into PostgreSQL")
    far = stack.enter_context(kvrep.open(folder / "far", name="far", follow=log_url))
    agent = stack.enter_context(
        kvrep.Agent(events_url, PostgresSink(database, tables=dict([parse_table(TABLE)])))
    )

    say("the primary site: a shop that acknowledges an order once the broker has confirmed it")
    shop = Shop(folder / "near", log_url, events_url)
    stack.callback(shop.kill)
    wait(lambda: shop.acknowledged >= orders, f"{orders} orders", shop.problem)
    say(f"{shop.acknowledged} orders are acknowledged; the far store has {len(far.keyspace('orders'))}")

    say("DISASTER: the primary site is gone (SIGKILL)")
    shop.kill()
    acknowledged = shop.acknowledged
    began = time.monotonic()
    wait(lambda: len(far.keyspace("orders")) >= acknowledged, "what the broker still holds arrives")
    far.promote(force=True, voters=["far"], acks=0)
    far.keyspace("orders", codec=JSON).put(
        b"order-after", {"customer": "the first at the far site", "total": 1}
    )
    took = time.monotonic() - began
    say(f"the far store is promoted and has taken an order, {took:.2f} s after the disaster")

    copy = far.keyspace("orders")
    missing = [n for n in range(1, acknowledged + 1) if b"order-%06d" % n not in copy]
    expected = sum(1 for key in copy if key != b"order-after")
    wait(lambda: agent.status().applied >= expected, "PostgreSQL has every order")
    rows = dict(_rows(database))
    missing_rows = [n for n in range(1, acknowledged + 1) if f"order-{n:06d}" not in rows]
    status = agent.status()
    print(json.dumps({
        "acknowledged": acknowledged, "missing_at_the_far_store": len(missing),
        "missing_in_postgresql": len(missing_rows), "rto_s": round(took, 3),
        "postgresql_consistent": status.consistent, "delay_p50_s": status.delay_p50_s,
        "delay_p99_s": status.delay_p99_s, "repeats_dropped": status.repeats,
    }, indent=1))  # fmt: skip
    ok = not missing and not missing_rows and status.consistent
    say("nothing that was acknowledged is missing" if ok else "SOMETHING IS MISSING")
    return 0 if ok else 1


def _rows(database: str) -> list[tuple[str, object]]:
    with PostgresSink(database, tables=dict([parse_table(TABLE)])) as sink:
        sink.open()
        return [(str(key), value) for key, value in sink.scan("orders")]


class Shop:
    """The process of the primary site, and the last order that it has acknowledged."""

    def __init__(self, folder: Path, log_url: str, events_url: str) -> None:
        self.acknowledged = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "examples.disaster_recovery.shop", str(folder), log_url, events_url],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):
                self.acknowledged = int(line)

    def problem(self) -> str:
        code = self._process.poll()
        return "" if code is None else f"the shop ended with {code}"

    def kill(self) -> None:
        """As a power cut; what it had printed by then is read to the end."""
        self._process.kill()
        self._process.wait(30)
        self._reader.join(30)


def wait(condition: Callable[[], bool], what: str, problem: Callable[[], str] = str) -> None:
    """Until it holds; ``SystemExit`` when something ended, or it takes too long."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if (why := problem()) or time.monotonic() > deadline:
            raise SystemExit(f"{what}: {why or f'not within {WAIT_S:g} s'}")
        time.sleep(0.01)


def say(text: str) -> None:
    print(f"-- {text}", flush=True)


def _rabbitmq(folder: Path, stack: ExitStack) -> str:
    from tests.rabbit_kit import SERVER, RabbitServer

    if SERVER is None:
        raise SystemExit(
            "RabbitMQ is not installed (Debian: apt-get install rabbitmq-server); or give --rabbitmq URL"
        )
    say("starting RabbitMQ")
    (folder / "rabbitmq").mkdir()
    server = RabbitServer(folder / "rabbitmq")
    server.start()
    stack.callback(server.stop)
    return f"amqp://guest:guest@127.0.0.1:{server.port}/"


def _postgres(folder: Path, stack: ExitStack) -> str:
    from tests.postgres_kit import BINARIES, PostgresServer

    if BINARIES is None:
        raise SystemExit(
            "PostgreSQL is not installed (Debian: apt-get install postgresql); or give --postgres URL"
        )
    say("starting PostgreSQL")
    (folder / "postgres").mkdir()
    server = PostgresServer(folder / "postgres")
    server.start()
    stack.callback(server.stop)
    return server.url().partition("?")[0]


if __name__ == "__main__":
    sys.exit(main())
