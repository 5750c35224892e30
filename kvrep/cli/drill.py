"""``kvrep drill``: rehearse a disaster without touching production."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

from kvrep.cli.arguments import add_security, add_timeout, count, is_address, seconds, tls_of, token_of
from kvrep.cli.console import key_values, number, style
from kvrep.cli.exits import Exit, UsageError

if TYPE_CHECKING:
    from kvrep.sinks.drilling import DrillReport

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  with a follower at the far site:
    kvrep drill --from 10.0.0.1:7400 --to 10.9.0.1:7400
  with a database that an agent fills; fail when more than 5 s would be lost, or it takes more than a minute:
    kvrep drill --from 10.0.0.1:7400 --to postgresql://kvrep@far/site --rpo-max-s 5 --rto-max-s 60 --json

What has really arrived at the secondary becomes a scratch copy in a temporary folder, is promoted in isolation,
read and written to, and compared with the source at its position: every key that has not changed since by digests,
and a sample of them by value. Source and secondary are only read.

RPO is the age of the oldest change that would be lost; RTO the time from the decision to the first answered read
and write. The exit code is 0 when every check passed, else 6."""


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    del name
    parser.epilog = _EPILOG
    parser.add_argument(
        "--from", dest="source", metavar="HOST:PORT", required=True, help="a node of the source"
    )
    parser.add_argument("--to", dest="to", metavar="SECONDARY", required=True,
                        help="a follower (host:port), postgresql://…, sqlite:…, delta:… or kvrep:PATH")  # fmt: skip
    parser.add_argument(
        "--sample", metavar="N", type=count, default=1000, help="keys to compare (default 1000)"
    )
    parser.add_argument("--seed", metavar="N", type=count, default=1, help="what the sample is drawn from")
    parser.add_argument("--rpo-max-s", metavar="SECONDS", type=seconds, help="more is a failure")
    parser.add_argument("--rto-max-s", metavar="SECONDS", type=seconds, help="more is a failure")
    parser.add_argument(
        "--dir", metavar="FOLDER", help="where the scratch copy is made (default: for temporary files)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_timeout(parser, 300.0, "how long the copy may take")
    add_security(parser)


def run(args: argparse.Namespace) -> int:
    from kvrep.sinks.drilling import drill

    if not is_address(args.source):
        raise UsageError(f"--from takes HOST:PORT of a running node, not {args.source!r}")
    report = drill(
        args.source, args.to, sample=args.sample, seed=args.seed, rpo_max_s=args.rpo_max_s,
        rto_max_s=args.rto_max_s, timeout_s=args.timeout_s, folder=args.dir, tls=tls_of(args), token=token_of(args),
    )  # fmt: skip
    print(json.dumps(report.to_json()) if args.json else "\n".join(_shown(report)))
    return Exit.OK if report.ok else Exit.DAMAGED


def _shown(report: DrillReport) -> list[str]:
    lost = (
        f"{report.rpo_s:.3f} s: {number(report.missing_records)} records"
        if report.missing_records
        else "nothing"
    )
    if report.newest_missing_s:
        lost += f", the newest of {time.strftime('%H:%M:%S UTC', time.gmtime(report.newest_missing_s))}"
    facts = [
        ("source", f"{report.source} at {report.source_position}"),
        ("secondary", f"{report.secondary} at {report.position}"),
        ("RPO", f"would be lost: {lost}"),
        ("RTO", f"{report.rto_s:.3f} s until it answered"),
        ("copy", f"{number(report.keys)} keys, {number(report.sampled)} of them compared by value"),
    ]
    lines = [style("drill passed", "green", "bold") if report.ok else style("drill FAILED", "red", "bold")]
    lines += [f"  {line}" for line in key_values(facts)]
    for check in report.checks:
        word = style("ok", "green") if check.ok else style("FAILED", "red")
        lines.append(f"  {word}  {check.name}: {check.detail}")
    return lines
