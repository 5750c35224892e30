"""``kvrep get``, ``put``, ``delete`` and ``scan``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvrep.cli.arguments import add_security, add_target, add_timeout, count, position
from kvrep.cli.exits import Exit, UsageError
from kvrep.cli.forms import TEXT, add_form, form_of, pair_to_json
from kvrep.errors import NotPrimary

if TYPE_CHECKING:
    from kvrep.cli.target import Op
    from kvrep.model.position import Position

__all__ = ["configure", "run", "write"]

HOPS_MAX = 3
"""How often a write goes on to the primary that was named."""

_EPILOGS = {
    "get": """\
The value is printed as it is, byte for byte (on a terminal followed by a line end).

examples:
  kvrep get 127.0.0.1:7400 greeting
  kvrep get 127.0.0.1:7401 greeting --at-least 1001:42    wait until this follower has that write
  kvrep get 127.0.0.1:7401 greeting --linearizable        no older than any write that had returned
  kvrep get ./orders 6b6579 --hex                         a binary key, of a store on disk
  kvrep get 127.0.0.1:7400 photo > photo.jpg""",
    "put": """\
It prints the write's position, which 'get --at-least' and 'scan --at-least' take on any node.

examples:
  kvrep put 127.0.0.1:7400 greeting hello
  kvrep put 127.0.0.1:7400 photo --value-file photo.jpg
  echo -n hello | kvrep put 127.0.0.1:7400 greeting -
  kvrep put ./orders greeting hello --create              into a store on disk, made if missing""",
    "delete": """\
The key need not exist. It prints the write's position.

examples:
  kvrep delete 127.0.0.1:7400 greeting
  kvrep delete 127.0.0.1:7400 user/1 user/2               several at once, all or none""",
    "scan": """\
Pairs are printed as 'key TAB value' in key order, as of one position; bytes that are no text are shown
as escapes (\\xff), so use --json, --hex or --base64 for other programs.

examples:
  kvrep scan 127.0.0.1:7400 --prefix user/ --limit 10
  kvrep scan 127.0.0.1:7400 --start b --stop d --reverse
  kvrep scan 127.0.0.1:7401 --keys-only --keyspace users
  kvrep scan ./orders --json > orders.jsonl""",
}


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    parser.epilog = _EPILOGS[name]
    add_target(parser)
    if name == "get":
        parser.add_argument("key", metavar="KEY")
    elif name == "put":
        parser.add_argument("key", metavar="KEY")
        parser.add_argument("value", metavar="VALUE", nargs="?", help="the value; - reads standard input")
        parser.set_defaults(optional_last="value")
        parser.add_argument("--value-file", metavar="FILE", help="take the value from a file, byte for byte")
    elif name == "delete":
        parser.add_argument("keys", metavar="KEY", nargs="+")
    else:
        _configure_scan(parser)
    parser.add_argument("--keyspace", metavar="NAME", default="default", help='keyspace (default "default")')
    add_form(parser, "keys and values")
    if name in ("put", "delete"):
        _configure_write(parser)
    else:
        parser.add_argument("--at-least", metavar="EPOCH:OFFSET", type=position,
                            help="wait until this node has that position")  # fmt: skip
        parser.add_argument("--linearizable", action="store_true",
                            help="show all that was acknowledged before, anywhere in the group")  # fmt: skip
    add_timeout(parser, 10.0, "how long to wait for the answer")
    add_security(parser)
    parser.set_defaults(command=name)


def _configure_write(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow-primary", action=argparse.BooleanOptionalAction, default=True,
                        help="if TARGET is a follower, write to its primary (default: yes)")  # fmt: skip
    parser.add_argument("--create", action="store_true", help="make the store if there is none at the path")


def _configure_scan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefix", metavar="KEY", help="only keys that begin with this")
    parser.add_argument("--start", metavar="KEY", help="from this key on")
    parser.add_argument("--stop", metavar="KEY", help="up to this key, without it")
    parser.add_argument("--reverse", action="store_true", help="in descending order")
    parser.add_argument("--limit", metavar="N", type=count, help="at most so many pairs")
    parser.add_argument("--keys-only", action="store_true", help="leave the values out")
    parser.add_argument("--json", action="store_true", help="print JSON lines, as 'kvrep load' takes them")


def run(args: argparse.Namespace) -> int:
    if args.command == "get":
        return _get(args)
    if args.command == "scan":
        return _scan(args)
    print(write(args, _ops(args)))
    return Exit.OK


def _get(args: argparse.Namespace) -> int:
    from kvrep.cli.target import open_reader

    form = form_of(args)
    key = form.decode(args.key)
    target = open_reader(args)
    try:
        value = target.get(args.keyspace, key, args.at_least)
    finally:
        target.close()
    if value is None:
        print(f"kvrep get: there is no key {form.encode(key)}", file=sys.stderr)
        return Exit.MISSING
    if form is not TEXT:
        print(form.encode(value))
        return Exit.OK
    if sys.stdout.isatty() and not value.endswith(b"\n"):
        value += b"\n"
    sys.stdout.flush()
    sys.stdout.buffer.write(value)
    sys.stdout.buffer.flush()
    return Exit.OK


def _ops(args: argparse.Namespace) -> list[Op]:
    form = form_of(args)
    if args.command == "delete":
        return [(args.keyspace, form.decode(key), None) for key in args.keys]
    return [(args.keyspace, form.decode(args.key), _value(args))]


def _value(args: argparse.Namespace) -> bytes:
    """From the argument, a file, or standard input; the last two byte for byte."""
    if (args.value is None) == (args.value_file is None):
        raise UsageError("give one value: VALUE, - for standard input, or --value-file FILE")
    if args.value_file is not None and args.value_file != "-":
        return Path(args.value_file).read_bytes()
    if args.value_file == "-" or args.value == "-":
        return sys.stdin.buffer.read()
    return form_of(args).decode(args.value)


def write(args: argparse.Namespace, ops: list[Op]) -> Position:
    """Write to TARGET; where that is a follower, to the primary that it names, which may name a newer one."""
    from kvrep.cli.target import connect, open_writer

    target = open_writer(args)
    for hop in range(HOPS_MAX + 1):
        try:
            return target.write(ops)
        except NotPrimary as error:
            if not (args.follow_primary and error.primary_address) or hop == HOPS_MAX:
                raise
            address = error.primary_address
        finally:
            target.close()
        print(
            f"kvrep {args.command}: {args.target} is a follower; writing to the primary at {address}",
            file=sys.stderr,
        )
        target = connect(args, address)
    raise AssertionError("the last hop returns or raises")


def _scan(args: argparse.Namespace) -> int:
    from kvrep.cli.target import Range, open_reader

    form = form_of(args)

    def key_of(text: str | None) -> bytes | None:
        return None if text is None else form.decode(text)

    wanted = Range(
        args.keyspace,
        key_of(args.prefix) or b"",
        key_of(args.start),
        key_of(args.stop),
        args.reverse,
        args.limit,
    )
    target = open_reader(args)
    try:
        for chunk in target.scan(wanted, args.at_least):
            sys.stdout.write("".join(_line(args, key, value) + "\n" for key, value in chunk))
    finally:
        target.close()
    return Exit.OK


def _line(args: argparse.Namespace, key: bytes, value: bytes) -> str:
    form = form_of(args)
    if args.json:
        return pair_to_json(key, value, always_base64=form.name == "base64")
    return form.encode(key) if args.keys_only else f"{form.encode(key)}\t{form.encode(value)}"
