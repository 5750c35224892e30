"""``kvrep dump``: all pairs into a JSON-lines file, a directory, or standard output."""

from __future__ import annotations

import argparse
import gzip
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from kvrep.cli.arguments import add_security, add_target, add_timeout, position
from kvrep.cli.console import Progress, duration, megabytes, number
from kvrep.cli.exits import Exit, UsageError
from kvrep.cli.forms import pair_to_json, visible

if TYPE_CHECKING:
    from kvrep.cli.target import Reader

__all__ = ["configure", "run"]

_EPILOG = """\
DESTINATION is a file of JSON lines (packed if it ends in .gz), - for standard output (the default), or a
directory (one that exists, or a name that ends in /): then each key becomes a file, with the value as its
content. A JSON-lines file appears only when it is complete. Each keyspace is dumped as of one position.

examples:
  kvrep dump 127.0.0.1:7401 orders.jsonl.gz --keyspace orders
  kvrep dump 127.0.0.1:7401 all.jsonl.gz --all            all keyspaces; 'kvrep load' puts each pair back
  kvrep dump ./orders - | head
  kvrep dump 127.0.0.1:7400 ./documents/ --prefix docs/"""


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    del name
    parser.epilog = _EPILOG
    add_target(parser)
    parser.add_argument("destination", metavar="DESTINATION", nargs="?",
                        help="JSON-lines file (also .gz), directory, or - (default)")  # fmt: skip
    parser.set_defaults(optional_last="destination")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--keyspace", metavar="NAME", default="default", help='keyspace (default "default")')
    either.add_argument("--all", action="store_true", help="all keyspaces; lines (or folders) say which")
    parser.add_argument("--prefix", metavar="KEY", default="", help="only keys that begin with this")
    parser.add_argument("--base64", action="store_true", help="write all keys and values as base64")
    parser.add_argument("--at-least", metavar="EPOCH:OFFSET", type=position,
                        help="wait until this node has that position")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_timeout(parser, 10.0, "how long to wait for the first answer")
    add_security(parser)


def run(args: argparse.Namespace) -> int:
    from kvrep.cli.target import open_reader

    args.destination = args.destination or "-"
    target = open_reader(args)
    try:
        with Progress("dumped", None, quiet=args.quiet) as progress:
            _dump(args, target, progress)
    finally:
        target.close()
    if not args.quiet:
        print(
            f"dumped {number(progress.done_pairs)} pairs, {megabytes(progress.done_bytes)}"
            f" in {duration(progress.elapsed_s)} ({megabytes(progress.rate)}/s)",
            file=sys.stderr,
        )
    return Exit.OK


def _dump(args: argparse.Namespace, target: Reader, progress: Progress) -> None:
    if args.destination == "-":
        _lines(args, target, sys.stdout, progress)
    elif args.destination.endswith("/") or Path(args.destination).is_dir():
        _tree(args, target, Path(args.destination), progress)
    else:
        with _file(Path(args.destination)) as out:
            _lines(args, target, out, progress)


def _pairs(
    args: argparse.Namespace, target: Reader, progress: Progress
) -> Iterator[tuple[str, bytes, bytes]]:
    from kvrep.cli.target import Range

    for keyspace in target.keyspaces() if args.all else [args.keyspace]:
        for chunk in target.scan(Range(keyspace, prefix=os.fsencode(args.prefix)), args.at_least):
            for key, value in chunk:
                yield keyspace, key, value
            progress.add(sum(len(key) + len(value) for key, value in chunk), len(chunk))


def _lines(args: argparse.Namespace, target: Reader, out: IO[str], progress: Progress) -> None:
    for keyspace, key, value in _pairs(args, target, progress):
        named = keyspace if args.all else None
        out.write(pair_to_json(key, value, keyspace=named, always_base64=args.base64) + "\n")


@contextmanager
def _file(path: Path) -> Iterator[IO[str]]:
    """A file that gets its name when it is complete and on the disk; of a failure nothing stays."""
    fresh = path.with_name(path.name + ".part")
    try:
        with fresh.open("wb") as raw:
            if path.suffix == ".gz":
                with gzip.open(raw, "wt", encoding="utf-8", compresslevel=6) as packed:
                    yield cast(IO[str], packed)
            else:
                with os.fdopen(os.dup(raw.fileno()), "w", encoding="utf-8") as plain:
                    yield plain
            os.fsync(raw.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _tree(args: argparse.Namespace, target: Reader, top: Path, progress: Progress) -> None:
    for keyspace, key, value in _pairs(args, target, progress):
        path = (top / keyspace if args.all else top) / _relative(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise _impossible(key, "another key is a part of its path") from None


def _relative(key: bytes) -> Path:
    """The path below the directory that a key stands for; refuses every key that would lead out of it."""
    parts = key.split(b"/")
    if b"\0" in key or any(part in (b"", b".", b"..") or len(part) > 255 for part in parts):
        raise _impossible(key, "it has an empty, too long or dotted part")
    return Path(*map(os.fsdecode, parts))


def _impossible(key: bytes, why: str) -> UsageError:
    return UsageError(
        f"the key {visible(key)} cannot be a file: {why}", hint="dump to a JSON-lines file instead"
    )
