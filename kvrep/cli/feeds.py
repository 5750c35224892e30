"""``kvrep changes`` and ``kvrep feed``."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvrep.cli.arguments import add_security, add_target, add_timeout, count, is_address
from kvrep.cli.console import number, table
from kvrep.cli.exits import Exit, UsageError
from kvrep.cli.forms import TEXT, add_form, form_of
from kvrep.errors import Error, NotPrimary

if TYPE_CHECKING:
    from kvrep.model.change import Change

__all__ = ["configure", "run"]

Call = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
ACTIONS = ("list", "show", "pause", "resume", "seek", "drop")
WAIT_S = 5.0

_EPILOGS = {
    "changes": """\
Of a running node it shows what is written from now on, until Ctrl-C; of a store on disk what its log still
holds. Only what no failover can take back is shown; with --committed all that reads show. Each line is
'POSITION.INDEX TAB KIND TAB KEYSPACE TAB KEY TAB VALUE' (of an emitted message: its topic in place of the
key).

examples:
  kvrep changes 127.0.0.1:7401 --keyspace orders
  kvrep changes 127.0.0.1:7400 --from oldest --no-wait --json > changes.jsonl
  kvrep changes 127.0.0.1:7400 --snapshot --keyspace users --events
  kvrep changes 127.0.0.1:7402 --from k1Kx0…                    go on behind a token of any node
  kvrep changes ./orders --from 1001:42""",
    "feed": """\
Named feeds keep the place of their reader in the store. 'seek' moves one: to a position, a token, 'now',
'oldest' (what the log still holds) or 'snapshot' (the reader gets the present state first). All but 'list' and
'show' are writes, sent on to the primary where TARGET is a follower.

examples:
  kvrep feed list 127.0.0.1:7400
  kvrep feed show 127.0.0.1:7400 billing
  kvrep feed pause 127.0.0.1:7400 billing
  kvrep feed seek 127.0.0.1:7400 billing --to 1001:42
  kvrep feed drop ./orders billing""",
}


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    parser.epilog = _EPILOGS[name]
    if name == "feed":
        parser.add_argument("action", metavar="ACTION", choices=ACTIONS, help=", ".join(ACTIONS))
        add_target(parser)
        parser.add_argument("name", metavar="NAME", nargs="?", help="the feed (not with list)")
        parser.add_argument("--to", metavar="PLACE", help="with seek: where to")
        parser.add_argument("--json", action="store_true", help="print JSON")
    else:
        add_target(parser)
        _configure_changes(parser)
    add_timeout(parser, 10.0, "how long to wait for an answer")
    add_security(parser)
    parser.set_defaults(command=name)


def _configure_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="place", metavar="PLACE",
                        help="now, oldest, a position or a token")  # fmt: skip
    parser.add_argument("--snapshot", action="store_true", help="the present state first, between two marks")
    parser.add_argument("--keyspace", metavar="NAME", action="append", help="only this one (repeat for more)")
    parser.add_argument("--prefix", metavar="KEY", help="only keys that begin with this")
    parser.add_argument("--topic", metavar="TOPIC", action="append", help="only messages of this topic")
    parser.add_argument("--committed", action="store_true", help="all that is committed")
    parser.add_argument("--before", action="store_true", help="with former values, where they are kept")
    parser.add_argument("--limit", metavar="N", type=count, help="end after so many changes")
    parser.add_argument("--no-wait", action="store_true", help="end when there is no more")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--json", action="store_true", help="JSON lines, each with its token")
    either.add_argument("--events", action="store_true", help="CloudEvents as JSON lines")
    either.add_argument("--debezium", action="store_true", help="envelopes as Debezium writes them")
    add_form(parser, "keys and values")


def run(args: argparse.Namespace) -> int:
    return _feed(args) if args.command == "feed" else _changes(args)


# -- changes ---------------------------------------------------------------------------------------


def _changes(args: argparse.Namespace) -> int:
    from kvrep.feeds.serving import RemoteChanges

    if args.snapshot and args.place is not None:
        raise UsageError("--snapshot begins with the present state: leave --from out")
    running = is_address(args.target)
    place = "" if args.snapshot else args.place or ("now" if running else "oldest")
    if args.limit == 0:
        return Exit.OK
    with _target(args, args.target) as (call, lineage):
        changes = RemoteChanges(
            call,
            token=place,
            keyspaces=args.keyspace,
            prefix=form_of(args).decode(args.prefix) if args.prefix else b"",
            topics=args.topic,
            committed=args.committed or not running,
            before=args.before,
        )
        try:
            return _show(args, changes, lineage, wait=running and not args.no_wait)
        except (Error, KeyboardInterrupt):
            if running and changes.token.startswith("k1"):
                print(f"kvrep changes: to go on: --from {changes.token}", file=sys.stderr)
            raise


def _show(args: argparse.Namespace, changes: Any, lineage: str, *, wait: bool) -> int:
    """Print until the end; the last line is on its way before the next is waited for."""
    left = args.limit
    while True:
        found = changes.poll(WAIT_S if wait else 0.0)
        if not found and not wait and not changes.in_snapshot:
            return Exit.OK
        if left is not None:
            found = found[:left]
            left -= len(found)
        for change in found:
            sys.stdout.write(_line(args, change, lineage) + "\n")
        sys.stdout.flush()
        if left == 0:
            return Exit.OK


def _line(args: argparse.Namespace, change: Change, lineage: str) -> str:
    if args.events or args.debezium:
        from kvrep.model.event import Event

        event = Event.from_change(lineage, change)
        if args.events:
            return event.to_json().decode()
        if change.kind in ("begin", "end"):
            return json.dumps({"op": change.kind})
        return event.to_debezium()[1].decode()
    if args.json:
        return json.dumps(_fields(args, change))
    form = form_of(args)
    value = "" if change.value is None else form.encode(change.value)
    name = change.topic if change.kind == "emit" else form.encode(change.key)
    return f"{change.position}.{change.index}\t{change.kind}\t{change.keyspace}\t{name}\t{value}"


def _fields(args: argparse.Namespace, change: Change) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "position": str(change.position), "index": change.index, "kind": change.kind, "time": change.time,
        "last": change.last, "snapshot": change.snapshot, "resume": change.resume,
    }  # fmt: skip
    if change.kind in ("put", "delete"):
        fields["keyspace"] = change.keyspace
        fields |= _data(args, "key", change.key)
    if change.kind == "emit":
        fields |= {"topic": change.topic, "headers": change.headers}
    if change.value is not None:
        fields |= _data(args, "value", change.value)
    if change.before is not None:
        fields |= _data(args, "before", change.before)
    if change.created is not None:
        fields["created"] = change.created
    return fields


def _data(args: argparse.Namespace, name: str, data: bytes) -> dict[str, str]:
    if form_of(args) is not TEXT:
        return {f"{name}_{form_of(args).name}": form_of(args).encode(data)}
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}


# -- named feeds -----------------------------------------------------------------------------------


def _feed(args: argparse.Namespace) -> int:
    if (args.name is None) != (args.action == "list"):
        raise UsageError("'feed list' takes no NAME, everything else takes one")
    if (args.to is None) == (args.action == "seek"):
        raise UsageError("'feed seek' takes --to PLACE, nothing else does")
    if args.action in ("list", "show"):
        with _target(args, args.target) as (call, _):
            feeds = call("feed-list", {})["feeds"]
        return _show_feeds(args, feeds)
    request = {"name": args.name, "action": args.action, "to": args.to}
    try:
        with _target(args, args.target, write=True) as (call, _):
            answer = call("feed-change", request)
    except NotPrimary as error:
        if not (is_address(args.target) and error.primary_address):
            raise
        with _target(args, error.primary_address, write=True) as (call, _):
            answer = call("feed-change", request)
    if answer["feed"] is None:
        print(f"{args.name} is dropped")
        return Exit.OK
    return _show_feeds(args, [answer["feed"]])


def _show_feeds(args: argparse.Namespace, feeds: list[dict[str, Any]]) -> int:
    if args.action != "list":
        feeds = [feed for feed in feeds if feed["name"] == args.name]
        if not feeds:
            print(f"kvrep feed: there is no feed named {args.name}", file=sys.stderr)
            return Exit.MISSING
    if args.json:
        print(json.dumps(feeds if args.action == "list" else feeds[0]))
        return Exit.OK
    rows = [
        (f["name"], _state(f), f["position"], number(f["lag_records"]), number(f["lag_bytes"]),
         f"{f['lag_s']:.1f}", _selects(f))
        for f in feeds
    ]  # fmt: skip
    headers = ("feed", "state", "position", "behind", "bytes", "seconds", "selects")
    print("\n".join(table(headers, rows, right=(3, 4, 5))))
    if args.action == "show":
        print(f"token {feeds[0]['token'] or '(begins with a snapshot)'}")
    return Exit.OK


def _state(feed: dict[str, Any]) -> str:
    if not feed["held"] and not feed["in_snapshot"]:
        return "log trimmed"
    if feed["paused"]:
        return "paused"
    return "snapshot" if feed["in_snapshot"] else "ready"


def _selects(feed: dict[str, Any]) -> str:
    parts = [",".join(feed["keyspaces"]) if feed["keyspaces"] is not None else "all"]
    if feed["prefix"]:
        parts.append("prefix " + TEXT.encode(bytes.fromhex(feed["prefix"])))
    if feed["topics"] is not None:
        parts.append("topics " + ",".join(feed["topics"]))
    return " ".join(part for part in parts if part)


# -- where from ------------------------------------------------------------------------------------


@contextmanager
def _target(args: argparse.Namespace, target: str, *, write: bool = False) -> Iterator[tuple[Call, str]]:
    """How to ask the target, and its lineage."""
    from kvrep.cli import target as targets

    if is_address(target):
        with targets.connect(args, target) as remote:
            yield remote.call, remote.status()["lineage"]
        return
    if write:
        writer = targets.LocalWriter(target, create=False, timeout_s=args.timeout_s)
        try:
            node = writer.store._node
            yield _locally(node.calls), node.engine.home.lineage.hex()
        finally:
            writer.close()
        return
    reader = targets.LocalReader(target)
    try:
        from kvrep.feeds.named import Feeds
        from kvrep.feeds.serving import calls_of

        node = reader.node()
        yield _locally(calls_of(node, Feeds(node))), node.engine.home.lineage.hex()
    finally:
        reader.close()


def _locally(calls: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]]) -> Call:
    return lambda method, request: calls[method](request)
