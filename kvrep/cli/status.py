"""``kvrep status``: where a node and its followers stand."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from kvrep.cli.arguments import add_security, add_target, add_timeout, is_address, seconds
from kvrep.cli.console import binary, colourful, duration, key_values, number, style, table
from kvrep.cli.exits import Exit

__all__ = ["configure", "render", "run"]

_EPILOG = """\
examples:
  kvrep status 127.0.0.1:7400              a running node
  kvrep status 127.0.0.1:7400 --watch 1    the same, drawn anew every second until Ctrl-C
  kvrep status ./orders                    a store on disk that no process has open
  kvrep status 127.0.0.1:7400 --json | jq '.followers[] | {name, state, lag_records}'

Lag is what a follower has not confirmed as flushed to its disk. "verified through" is the record up to
which this copy's digests were compared with the primary's and found equal; "not yet compared" is not
"equal"."""


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    del name
    parser.epilog = _EPILOG
    add_target(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object (with --watch: one a line)"
    )
    parser.add_argument("--watch", metavar="SECONDS", type=seconds, help="repeat until Ctrl-C")
    add_timeout(parser, 5.0, "how long to wait for the answer")
    add_security(parser)


def run(args: argparse.Namespace) -> int:
    from kvrep.cli.exits import UsageError
    from kvrep.cli.target import open_reader

    if args.watch is not None and not is_address(args.target):
        raise UsageError("--watch needs the address of a running node: a store on disk does not change")
    if args.watch is not None:
        return _watch(args)
    target = open_reader(args)
    try:
        status = target.status()
    finally:
        target.close()
    print(json.dumps(status) if args.json else "\n".join(render(status)))
    return Exit.OK


def _watch(args: argparse.Namespace) -> int:
    """Until Ctrl-C; a node that does not answer is shown as that, and asked again."""
    from kvrep.cli import describe
    from kvrep.cli.arguments import security
    from kvrep.cli.target import RemoteTarget
    from kvrep.errors import AuthenticationFailed, Error

    clear = "\x1b[H\x1b[2J" if colourful(sys.stdout) and not args.json else ""
    while True:
        try:
            with RemoteTarget(args.target, security(args), timeout_s=args.timeout_s) as node:
                status = node.status()
            shown = json.dumps(status) if args.json else "\n".join(render(status))
        except AuthenticationFailed:
            raise
        except Error as error:
            problem = {"address": args.target, "error": describe(error)}
            shown = json.dumps(problem) if args.json else f"{args.target}: {describe(error)}"
        stamp = "" if args.json else time.strftime("%H:%M:%S ")
        print(f"{clear}{stamp}{shown}", flush=True)
        time.sleep(args.watch)


def render(status: dict[str, Any]) -> list[str]:
    """A status as people read it."""
    name = status["name"] or "(no name)"
    lines = [
        style(f"{name}: {status['role']}", "bold") + (f" at {status['address']}" if status["address"] else "")
    ]
    lines += ["  " + line for line in key_values(_facts(status))]
    if status["source"] is not None:
        lines += ["", *_source(status["source"])]
    if status["followers"]:
        lines += ["", *_followers(status["followers"])]
    elif status["role"] == "primary" and status["address"]:
        lines += ["", "no followers"]
    return lines


def _facts(status: dict[str, Any]) -> list[tuple[str, str]]:
    offsets = ("last", "durable", "committed", "applied")
    facts = [
        ("path", status["path"]),
        ("store", status["store_id"]),
        ("lineage", status["lineage"] or "none yet"),
        ("epoch", str(status["epoch"])),
        ("position", str(status["position"])),
        ("offsets", ", ".join(f"{o} {number(status[f'{o}_offset'])}" for o in offsets)),
        ("log", f"from record {number(status['first_offset'])}, {binary(status['log_bytes'])}"),
        ("state", f"LMDB {binary(status['lmdb_bytes'])}, in memory {binary(status['memtable_bytes'])}"),
        ("commit rule", _rule(status)),
        ("durability", status["durability"]),
        ("digests", _digests(status)),
        ("writable", _writable(status)),
    ]
    if status["away"] or status["unprotected"]:
        facts.append(("protection", _protection(status)))
    if status["rescued"]:
        facts.append(("rescued", style(", ".join(status["rescued"]), "yellow")))
    return facts


def _rule(status: dict[str, Any]) -> str:
    voters = ", ".join(status["voters"]) or "none yet"
    timeout = f"within {status['ack_timeout_s']:g} s"
    lag = status.get("lag_records_max", 0)  # an older node does not tell
    bound = f", {number(lag)} records ahead of the furthest other voter at the most" if lag else ""
    return f"acks={status['acks']}: {status['copies']} copies {timeout}{bound}; voters: {voters}"


def _protection(status: dict[str, Any]) -> str:
    spans = ", ".join(f"{number(f)} to {number(t) if t else 'now'}" for f, t in status["unprotected"])
    said = f"acknowledged with fewer copies: records {spans}"
    if not status["away"]:
        return style(said, "yellow")
    return style(f"WITHOUT COPIES AT {', '.join(status['away'])}; {said}", "red", "bold")


def _digests(status: dict[str, Any]) -> str:
    if status["diverged_at"]:
        return style(f"DIFFER from the primary's at record {number(status['diverged_at'])}", "red", "bold")
    if status["role"] == "primary":
        return "this node sets them"
    if status["verified_through"]:
        return style(f"verified through record {number(status['verified_through'])}", "green")
    return "not yet compared"


def _writable(status: dict[str, Any]) -> str:
    why = status["not_writable"]
    return style("yes", "green") if not why else style(f"no: {why}", "yellow")


def _source(source: dict[str, Any]) -> list[str]:
    facts = [
        ("from", f"{source['address']} {source['name']}".rstrip()),
        ("state", style(source["state"], "green" if source["state"] == "streaming" else "yellow")),
        ("behind", f"{number(source['lag_records'])} records, {binary(source['lag_bytes'])}"),
        (
            "staleness",
            "not known" if source["staleness_s"] is None else f"at most {duration(source['staleness_s'])}",
        ),
    ]
    if source["bootstrap_bytes_total"]:
        facts.append(
            ("copy", f"{binary(source['bootstrap_bytes'])} of {binary(source['bootstrap_bytes_total'])}")
        )
    if source["problem"] and source["state"] != "streaming":
        facts.append(("problem", source["problem"]))
    return ["source", *("  " + line for line in key_values(facts))]


def _followers(followers: list[dict[str, Any]]) -> list[str]:
    headers = [
        "follower",
        "address",
        "state",
        "vote",
        "durability",
        "synced",
        "visible",
        "lag",
        "bytes",
        "seconds",
    ]
    rows = [
        (
            f["name"] or f["store_id"][:8],
            f["address"] or "-",
            f["state"],
            "yes" if f["voter"] else "no",
            f.get("durability") or "-",
            number(f["synced"]),
            number(f["visible"]),
            number(f["lag_records"]),
            binary(f["lag_bytes"]),
            f"{f['lag_s']:.3f}",
        )
        for f in followers
    ]
    return table(headers, rows, right=(5, 6, 7, 8, 9))
