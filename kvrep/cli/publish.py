"""``kvrep publish``: the log of a store into a message broker, for followers far away."""

from __future__ import annotations

import argparse
import json
import signal
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kvrep.cli.arguments import add_security, is_address, tls_of, token_of
from kvrep.cli.console import log_to_stderr
from kvrep.cli.exits import Exit, UsageError
from kvrep.cli.stopping import Stop, stoppable

if TYPE_CHECKING:
    from kvrep.brokers.interface import Broker
    from kvrep.sinks.log_publication import LogPublication

__all__ = ["configure", "run"]

_ABOUT = """\
Ships the log of a running store, as it is and only what no failover can take back, into a queue, stream or topic.
A store opened with follow="amqp://…" (or kafka://…) replays it exactly, under the same positions.

  kvrep publish host-a:7400 host-b:7400 --to amqp://user:password@broker/?topic=orders --name far --state ./far.json

Name all nodes that may be primary: it finds the one that is. With --name the primary keeps the log while this
command is away; with --state it goes on where it was. A store on disk that nobody has open is served meanwhile:

  kvrep publish ./store --to kafka://broker:9092/orders --until-caught-up
"""
REPORT_S = 10.0
POLL_S = 0.1


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    del name
    parser.description = _ABOUT
    parser.add_argument(
        "source", metavar="TARGET", nargs="+",
        help="host:port of nodes of one group, or the path of a store that nobody has open",
    )  # fmt: skip
    parser.add_argument("--to", metavar="URL", required=True, help="amqp://, amqp+stream://, kafka://, …")
    parser.add_argument("--name", default="", help="keep a slot of this name on the primary")
    parser.add_argument("--state", metavar="FILE", type=Path, help="where to remember how far it is")
    parser.add_argument("--snapshot", action="store_true", help="publish a whole copy first")
    parser.add_argument(
        "--transactional-id",
        default="",
        help="Kafka: publish in transactions, and shut out another publisher",
    )
    parser.add_argument(
        "--until-caught-up", action="store_true", help="end once everything of now is confirmed by the broker"
    )
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when standard input ends, too")
    parser.add_argument("--json", action="store_true", help="print the status as JSON lines")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="warning",
        help="what goes to stderr (default warning)",
    )  # fmt: skip
    add_security(parser)


def run(args: argparse.Namespace) -> int:
    log_to_stderr(args.log_level)
    from kvrep import brokers

    paths = [one for one in args.source if not is_address(one)]
    if paths and len(args.source) > 1:
        raise UsageError("give one path, or addresses", hint=f"{paths[0]!r} is not host:port")
    with closing(brokers.connect(args.to)) as broker:
        if not paths:
            return _publish(args, args.source, broker)
        import kvrep
        from kvrep.runtime.offline import check_alone

        check_alone(paths[0])
        with kvrep.open(paths[0], create=False, listen="127.0.0.1:0") as store:
            assert store.address
            return _publish(args, [store.address], broker)


def _publish(args: argparse.Namespace, sources: list[str], broker: Broker) -> int:
    from kvrep.sinks.log_publication import LogPublication

    publication = LogPublication(
        sources, broker, name=args.name, state=args.state, snapshot=args.snapshot,
        transactional_id=args.transactional_id, tls=tls_of(args), token=token_of(args),
    )  # fmt: skip
    with stoppable(stdin=args.until_stdin_closes) as stop, publication:
        _watch(args, publication, stop)
    publication.raise_error()
    _report(args, publication)
    return Exit.INTERRUPTED if stop.signal == signal.SIGINT else Exit.OK


def _watch(args: argparse.Namespace, publication: LogPublication, stop: Stop) -> None:
    told_s, told = 0.0, ""
    while not stop.wait(POLL_S) and not publication.wait_over(0.0):
        status = publication.status()
        there = status.state == "publishing" and status.source_last and not status.lag_records
        if args.until_caught_up and there:
            return
        now = time.monotonic()
        if now - told_s >= REPORT_S or status.state != told:
            told_s, told = now, status.state
            _report(args, publication)


def _report(args: argparse.Namespace, publication: LogPublication) -> None:
    status = publication.status()
    if args.json:
        print(json.dumps({**asdict(status), "published": str(status.published)}), flush=True)
        return
    text = f"{status.state} from {status.address or '-'}: through {status.published}, {status.lag_records} behind"
    problem = status.broker_problem or status.problem
    print(f"{text}{f' ({problem})' if problem else ''}", flush=True)
