"""``kvrep members``, ``promote`` and ``switchover``: who is primary, and changing it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kvrep.cli.arguments import acks, add_security, add_timeout, is_address
from kvrep.cli.console import number, style, table
from kvrep.cli.exits import Exit, UsageError

__all__ = ["configure", "run"]

_EPILOGS = {
    "members": """\
Every voter of the group is asked by the node at ADDRESS; who does not answer is shown as that.

examples:
  kvrep members 127.0.0.1:7401
  kvrep members 127.0.0.1:7401 --json""",
    "promote": """\
The node asks the other voters, collects the promises of so many that no acknowledged write can be missed,
takes over what it lacks, and begins. If too few answer it says who is missing and changes nothing.

--force goes on without them: what only they acknowledged is lost to the group (each saves it to a rescue
file when it comes back). The history gets a new branch and a new configuration: --voters (this node alone if
not given) and --acks. Be sure that the missing nodes are really gone, or fenced off from all clients.
On a primary --force acts only if that one refuses writes because too few others are there.

examples:
  kvrep promote 127.0.0.1:7401
  kvrep promote 127.0.0.1:7401 --force --voters b --acks 0""",
    "switchover": """\
New writes wait while the target catches up and takes over; none is lost. If it fails half-way the old
primary goes on.

examples:
  kvrep switchover 127.0.0.1:7400 --to b --dry-run          what would block it
  kvrep switchover 127.0.0.1:7400 --to b""",
}


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    parser.epilog = _EPILOGS[name]
    what = "host:port of the primary" if name == "switchover" else "host:port of a node"
    parser.add_argument("target", metavar="ADDRESS", help=what)
    if name == "promote":
        parser.add_argument("--force", action="store_true", help="even if acknowledged writes may be lost")
        parser.add_argument(
            "--voters", metavar="NAMES", help="with --force: who votes from then on, by commas"
        )
        parser.add_argument(
            "--acks", metavar="RULE", type=acks, help="with --force: the ack rule from then on"
        )
    elif name == "switchover":
        parser.add_argument("--to", metavar="NAME", required=True, help="the voter that takes over")
        parser.add_argument("--dry-run", action="store_true", help="only say what would block it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_timeout(parser, 10.0, "how long it may take")
    add_security(parser)
    parser.set_defaults(command=name)


def run(args: argparse.Namespace) -> int:
    from kvrep.cli.target import connect

    if not is_address(args.target):
        raise UsageError(f"{args.target} is not host:port: roles are those of running nodes")
    ask = {"members": _members, "promote": _promote, "switchover": _switchover}[args.command]
    with connect(args, args.target) as node:
        return ask(args, node)


def _members(args: argparse.Namespace, node: Any) -> int:
    answer = node.call("members", {})
    members = answer["members"]
    if args.json:
        print(json.dumps(answer))
        return Exit.OK
    rows = [
        (
            m["name"],
            style(_role(m), "green" if m["role"] == "primary" else "yellow" if not m["answered"] else ""),
            m["address"] or "-",
            str(m["member"]),
            str(m["priority"]),
            str(m["epoch"]) if m["answered"] else "-",
            str(m["promised"]) if m["answered"] else "-",
            number(m["last"]) if m["answered"] else "-",
        )
        for m in members
    ]
    headers = ("voter", "role", "address", "member", "priority", "epoch", "promised", "last")
    print("\n".join(table(headers, rows, right=(3, 4, 5, 6, 7))))
    print(
        f"acks={answer['acks']}: commits need {answer['copies']} copies, promotions {answer['fence']} promises"
    )
    return Exit.OK


def _role(member: dict[str, Any]) -> str:
    return f"{member['role']}, not counted" if member.get("away") else str(member["role"])


def _promote(args: argparse.Namespace, node: Any) -> int:
    if not args.force and (args.voters or args.acks is not None):
        raise UsageError("--voters and --acks are for --force")
    request: dict[str, Any] = {"force": args.force, "acks": args.acks}
    request["voters"] = [name for name in (args.voters or "").split(",") if name]
    answer = node.call("promote", request)
    if args.json:
        print(json.dumps(answer))
    else:
        print(f"{args.target} is primary in epoch {answer['epoch']}")
    return Exit.OK


def _switchover(args: argparse.Namespace, node: Any) -> int:
    answer = node.call("switchover", {"to": args.to, "dry_run": args.dry_run})
    obstacles = answer["obstacles"]
    if args.json:
        print(json.dumps(answer))
    elif not args.dry_run:
        print(f"{args.to} is primary, at {answer['primary_address']}")
    elif not obstacles:
        print(f"nothing would block a switchover to {args.to}")
    for obstacle in obstacles if not args.json else ():
        print(obstacle)
    return Exit.REFUSED if obstacles else Exit.OK
