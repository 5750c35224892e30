"""``kvrep agent``: keep a secondary system up to date, or publish a store's changes; look after dead letters."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvrep.cli.arguments import add_security, count, seconds, size, tls_of, token_of
from kvrep.cli.console import key_values, log_to_stderr, number, style, table
from kvrep.cli.exits import Exit, UsageError
from kvrep.cli.frugal import be_frugal
from kvrep.cli.stopping import Stop, stoppable

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  events from a broker into PostgreSQL (a schema of its own, a table for each keyspace):
    kvrep agent --from amqp://broker/%2f?topic=orders --to 'postgresql://kvrep@db/site?schema=orders'
  the same without a broker, straight from the nodes (the first one that answers):
    kvrep agent --from 10.0.0.1:7400,10.0.0.2:7400 --to postgresql://kvrep@db/site
  with columns out of JSON values:
    … --table 'orders=json(key text, customer text, total numeric(10,2))'
  into a folder of Delta tables, for DuckDB, Spark and the like:
    kvrep agent --from 10.0.0.1:7400 --to 'delta:///srv/warehouse?commit_s=10&refresh_s=60'
  the other direction, a node's changes as CloudEvents on a broker:
    kvrep agent --from 10.0.0.1:7400 --to amqp://broker/%2f?topic=orders
  how it goes, and what was put aside:
    kvrep agent status --to postgresql://kvrep@db/site
    kvrep agent dead-letters --to postgresql://kvrep@db/site
    kvrep agent retry all --to postgresql://kvrep@db/site

SOURCE is a broker's address, host:port of running nodes (with commas between), or the path of a store that no
process has open.
SECONDARY is postgresql://…, sqlite:PATH, delta:PATH, kvrep:PATH, host:port of nodes of another group (with commas
between; its primary is found), or a broker.
Passwords are better kept out of addresses: PostgreSQL reads ~/.pgpass and PGPASSWORD.

Rows and place move in one transaction, so every change takes effect exactly once, whatever is killed when.
With --http HOST:PORT it answers /status (JSON) and /metrics (Prometheus; needs kvrep[metrics])."""

_ACTIONS = ("run", "status", "dead-letters", "retry", "discard")


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    del name
    parser.epilog = _EPILOG
    parser.add_argument(
        "action", nargs="?", choices=_ACTIONS, default="run",
        help="run (default); status of a secondary; list, retry or discard dead letters",
    )  # fmt: skip
    parser.add_argument("numbers", nargs="*", metavar="N", help="dead letters by number, or 'all'")
    parser.add_argument("--from", dest="source", metavar="SOURCE", help="where changes come from")
    parser.add_argument("--to", dest="to", metavar="SECONDARY", required=True, help="where they go")
    parser.add_argument("--name", default="agent", help="in logs and metrics (default agent)")
    parser.add_argument(
        "--table", metavar="KEYSPACE=CODEC(COLUMNS)", action="append", default=[],
        help="show a keyspace's values as columns: bytes, text, json or msgpack",
    )  # fmt: skip
    parser.add_argument("--topic", default="", help="of the broker, where its address names none")
    parser.add_argument("--group", default="agent", help="of subscribers at the broker (default agent)")
    parser.add_argument("--keyspace", action="append", help="only this keyspace (repeat it for several)")
    parser.add_argument("--prefix", default="", help="only keys that begin with this text")
    parser.add_argument("--order", choices=("total", "key"), default="total",
                        help="to a broker: keep the order of all events, or of each key only")  # fmt: skip
    parser.add_argument("--format", choices=("binary", "structured", "debezium"), default="binary",
                        help="to a broker: a mode of CloudEvents (default binary), or Debezium's envelope")  # fmt: skip
    parser.add_argument("--message-bytes", metavar="BYTES", type=size,
                        help="to a broker: larger events go in parts (default 4 MiB; Kafka 900 kB)")  # fmt: skip
    parser.add_argument("--before", action="store_true", help="to a broker: with former values, where kept")
    parser.add_argument(
        "--feed", metavar="NAME", default="", help="a named feed that holds the log (SOURCE a path)"
    )
    parser.add_argument("--state", metavar="FILE", help="where the place of a publication is kept")
    parser.add_argument(
        "--batch", metavar="N", type=count, default=1000, help="changes in a commit (default 1000)"
    )
    parser.add_argument(
        "--batch-bytes", metavar="BYTES", type=size, default=4 << 20, help="the same in bytes"
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait for a side that does not answer at the start"
    )
    parser.add_argument("--http", metavar="HOST:PORT", help="answer /status and /metrics there")
    parser.add_argument("--log-interval-s", metavar="SECONDS", type=seconds, default=60.0,
                        help="say in the log how it goes this often (default 60)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info",
                        help="what goes to stderr (default info)")  # fmt: skip
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when standard input ends, too")
    parser.add_argument("--until-current", action="store_true", help="end once everything is applied")
    add_security(parser)


def run(args: argparse.Namespace) -> int:
    if args.action == "run":
        return _run(args)
    if args.source is not None:
        raise UsageError("--from is for running an agent")
    if args.numbers and args.action in ("status", "dead-letters"):
        raise UsageError(f"not understood: {' '.join(args.numbers)}")
    if args.action == "status":
        return _status(args)
    if args.action == "dead-letters":
        return _dead_letters(args)
    return _settle(args, discard=args.action == "discard")


# -- running -------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    from kvrep.sinks.addresses import is_broker

    if args.source is None:
        raise UsageError("--from is missing", hint="name a broker, a node or a path")
    if args.numbers:
        raise UsageError(f"not understood: {' '.join(args.numbers)}")
    log_to_stderr(args.log_level)
    made = _publication(args) if is_broker(args.to) else _agent(args)
    with stoppable(stdin=args.until_stdin_closes) as stop:
        try:
            made.start()
            with _served(made, args.http) as address:
                _say_ready(made, address, as_json=args.json)
                _wait(made, stop, until_current=args.until_current)
        finally:
            made.close()
    return Exit.INTERRUPTED if stop.signal == signal.SIGINT else Exit.OK


def _agent(args: argparse.Namespace) -> Any:
    from kvrep.sinks.addresses import is_broker, sink_at, source_at
    from kvrep.sinks.agent import Agent

    if args.format != "binary" or args.before or args.message_bytes is not None:
        raise UsageError("--format, --before and --message-bytes are for publishing to a broker")
    if args.to.startswith("delta"):
        be_frugal()
    sink = sink_at(args.to, tables=_tables(args), tls=tls_of(args), token=token_of(args))
    selection: dict[str, Any] = {}
    if not is_broker(args.source):
        selection = {"keyspaces": args.keyspace, "prefix": os.fsencode(args.prefix)}
    elif args.keyspace or args.prefix:
        raise UsageError("--keyspace and --prefix are given where the stream is published")
    source = source_at(
        args.source, topic=args.topic, group=args.group, feed=args.feed, tls=tls_of(args), token=token_of(args),
        **selection,
    )  # fmt: skip
    return Agent(
        source, sink, name=args.name, batch_changes=max(1, args.batch), batch_bytes=max(1, args.batch_bytes),
        wait=args.wait, log_interval_s=args.log_interval_s,
    )  # fmt: skip


def _publication(args: argparse.Namespace) -> Any:
    from kvrep import brokers
    from kvrep.sinks.addresses import is_broker, upstream_at
    from kvrep.sinks.cursor import FileCursor
    from kvrep.sinks.publication import Publication

    if is_broker(args.source):
        raise UsageError("from a broker to a broker is the broker's own business")
    if args.table:
        raise UsageError("--table is for PostgreSQL, SQLite and warehouses")
    if args.feed and args.state:
        raise UsageError("--feed and --state exclude each other: the place is kept once")
    broker = brokers.connect(args.to)
    cursor = None if args.feed else FileCursor(args.state or _state_file(args.source, broker.url))
    upstream = upstream_at(args.source, feed=args.feed, tls=tls_of(args), token=token_of(args))
    return Publication(
        upstream, broker, cursor, topic=args.topic, name=args.name, one_line=args.order == "total",
        form=args.format, message_bytes_max=args.message_bytes, log_interval_s=args.log_interval_s, wait=args.wait,
        keyspaces=args.keyspace, prefix=os.fsencode(args.prefix), before=args.before,
    )  # fmt: skip


def _state_file(source: str, broker: str) -> Path:
    """The user's folder for state, by both addresses."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    digest = hashlib.blake2b(f"{source}\n{broker}".encode(), digest_size=8).hexdigest()
    return home / "kvrep" / f"publication-{digest}.json"


def _tables(args: argparse.Namespace) -> dict[str, Any]:
    from kvrep.sinks.tables import parse_table

    return dict(parse_table(text) for text in args.table)


@contextmanager
def _served(made: Any, listen: str | None) -> Iterator[str]:
    from kvrep.sinks.metrics import StatusServer

    if listen is None:
        yield ""
        return
    server = StatusServer(made, listen)
    try:
        yield server.address
    finally:
        server.close()


def _say_ready(made: Any, address: str, *, as_json: bool) -> None:
    status = made.status().to_json()
    if as_json:
        ready = {"name": made.name, "http": address, "pid": os.getpid(), "source": status["source"]}
        print(json.dumps(ready), flush=True)
    else:
        to = status.get("secondary") or status.get("broker")
        print(f"ready: {status['source']} to {to}{f', status at {address}' if address else ''}", flush=True)


def _wait(made: Any, stop: Stop, *, until_current: bool) -> None:
    """Until told to end, or the agent has ended, whose error is raised then."""
    while not stop.wait(0.05 if until_current else 0.25):
        status = made.status()
        if status.state == "failed":
            made.raise_error()
        if until_current and status.state == "current" and status.backlog == 0:
            return


# -- looking after a secondary -------------------------------------------------------------------------


def _sink(args: argparse.Namespace) -> Any:
    from kvrep.sinks.addresses import is_broker, sink_at

    if is_broker(args.to):
        raise UsageError("a broker keeps no dead letters and no place: name the secondary")
    return sink_at(args.to, tables=_tables(args), tls=tls_of(args), token=token_of(args))


def _status(args: argparse.Namespace) -> int:
    """What the secondary knows of itself, whether or not its agent runs."""
    with _sink(args) as sink:
        place = sink.look()
        letters = sink.dead_letters()
        keyspaces = sink.keyspaces()
    status = {
        "secondary": sink.url,
        "lineage": place.lineage,
        "position": str(place.position),
        "consistent": place.whole and not letters,
        "as_of_s": place.time_us / 1e6,
        "snapshot_under_way": place.staging,
        "dead_letters": len(letters),
        "keyspaces": keyspaces,
    }
    if args.json:
        print(json.dumps(status))
        return Exit.OK
    as_of = (
        time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(place.time_us / 1e6))
        if place.time_us
        else "nothing yet"
    )
    whole = style("yes", "green") if status["consistent"] else style(_why_not(place, letters), "yellow")
    print(style(sink.url, "bold"))
    for line in key_values([
        ("position", str(place.position)), ("last change", as_of), ("consistent", whole),
        ("dead letters", number(len(letters))), ("keyspaces", ", ".join(keyspaces) or "none"),
        ("lineage", place.lineage or "none yet"),
    ]):  # fmt: skip
        print(f"  {line}")
    return Exit.OK


def _why_not(place: Any, letters: list[Any]) -> str:
    if place.staging:
        return "no: a snapshot is arriving"
    if not place.whole:
        return "no: a transaction is there in part" if place.lineage else "no: nothing has arrived yet"
    return f"no: {len(letters)} changes were put aside"


def _dead_letters(args: argparse.Namespace) -> int:
    from kvrep.cli.forms import TEXT

    with _sink(args) as sink:
        sink.look()
        letters = sink.dead_letters()
    if args.json:
        for x in letters:
            print(json.dumps({
                "number": x.number, "position": x.position, "keyspace": x.keyspace, "key_hex": x.key.hex(),
                "value_hex": None if x.value is None else x.value.hex(), "raw_hex": x.raw.hex(),
                "reason": x.reason, "time_s": x.time_us / 1e6,
            }))  # fmt: skip
        return Exit.OK
    if not letters:
        print("no dead letters")
        return Exit.OK
    rows = [
        (
            str(x.number),
            x.position or "-",
            x.keyspace or "-",
            _short(TEXT.encode(x.key) if x.readable else TEXT.encode(x.raw[:200])),
            _short(x.reason, 60),
        )
        for x in letters
    ]
    print("\n".join(table(("n", "position", "keyspace", "key", "reason"), rows, right=(0,))))
    return Exit.OK


def _short(text: str, limit: int = 32) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _settle(args: argparse.Namespace, *, discard: bool) -> int:
    """Retry or discard; Exit.DAMAGED when some failed again."""
    from kvrep.sinks.agent import retry_dead_letters

    numbers = _numbers(args)
    with _sink(args) as sink:
        if discard:
            place = sink.look()
            known = [letter.number for letter in sink.dead_letters()]
            done = known if numbers is None else numbers
            if missing := sorted(set(done) - set(known)):
                raise UsageError(f"there is no dead letter {missing[0]}")
            sink.forget(done)
            sink.commit(place)
            print(json.dumps({"discarded": done}) if args.json else f"discarded {len(done)}")
            return Exit.OK
        try:
            done, failed = retry_dead_letters(sink, numbers)
        except ValueError as error:
            raise UsageError(str(error)) from error
    if args.json:
        print(json.dumps({"done": done, "failed": {x.number: x.reason for x in failed}}))
    else:
        print(f"{len(done)} took effect, {len(failed)} failed again")
        for x in failed:
            print(f"  {x.number}: {x.reason}")
    return Exit.DAMAGED if failed else Exit.OK


def _numbers(args: argparse.Namespace) -> list[int] | None:
    """``None`` stands for all of them."""
    if args.numbers == ["all"]:
        return None
    if not args.numbers or not all(n.isascii() and n.isdecimal() for n in args.numbers):
        raise UsageError("which dead letters?", hint="name their numbers, or 'all'")
    return [int(n) for n in args.numbers]
