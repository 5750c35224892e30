"""``kvrep verify``: one store on disk, or running nodes against each other."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvrep.cli.arguments import add_security, add_target, add_timeout, is_address
from kvrep.cli.checks import Report
from kvrep.cli.exits import UsageError

__all__ = ["configure", "run"]

_EPILOG = """\
With a PATH, a store that nobody has open is read from the first byte to the last, and not changed: every
log file, the chain of checksums over all records, the digests of what LMDB holds against those stored with
it, and whether log and LMDB meet.

With one or more ADDRESSes, running nodes are compared: each recomputes the digests of what is on its disk,
and all are compared at one position. While writes go on, the digests kept at a common digest mark are
compared instead. With the address of one node only, the primary and all followers it knows are compared.

A check that could not be made counts as failed. The exit code is 0 if all passed, else 6.

examples:
  kvrep verify ./orders
  kvrep verify 127.0.0.1:7400                             the primary and its followers
  kvrep verify 127.0.0.1:7400 127.0.0.1:7401              these two
  kvrep verify 127.0.0.1:7400 --json | jq .ok"""


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    del name
    parser.epilog = _EPILOG
    add_target(parser, many=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_timeout(parser, 60.0, "how long nodes may take to come to one position")
    add_security(parser)


def run(args: argparse.Namespace) -> int:
    if all(is_address(target) for target in args.target):
        from kvrep.cli.verify_nodes import verify_nodes

        report = verify_nodes(args, args.target)
    elif len(args.target) == 1:
        report = _verify_path(args.target[0])
    else:
        raise UsageError("verify takes one path, or any number of addresses")
    print(report.to_json() if args.json else "\n".join(report.lines()))
    return report.exit_code


def _verify_path(path: str) -> Report:
    from kvrep.cli.verify_store import verify_store
    from kvrep.errors import NotAStore

    if not Path(path).is_dir():
        raise NotAStore(f"there is no store at {path}", hint="give the directory of a store, or host:port")
    return verify_store(Path(path))
