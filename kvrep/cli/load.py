"""``kvrep load``: many pairs from a directory, a file, or standard input."""

from __future__ import annotations

import argparse
import gzip
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from kvrep.cli.arguments import add_security, add_target, add_timeout, count, seconds, size
from kvrep.cli.console import Progress, duration, megabytes, number
from kvrep.cli.exits import Exit, UsageError
from kvrep.cli.forms import pair_from_json

if TYPE_CHECKING:
    from kvrep.cli.target import RemoteTarget, Writer

__all__ = ["configure", "run"]

_EPILOG = """\
SOURCE is a directory (each file becomes a pair: path below the directory -> content), a file of JSON lines
({"key": "…", "value": "…"}, one a line; .gz is unpacked), or - for JSON lines from standard input. Bytes
that are no text are written as "key_base64" and "value_base64"; with --base64 all keys and values are.

A pair is put whether or not it is there, so a load that was interrupted is simply run again. What a node
refuses for the moment, or leaves unknown because it restarts, is tried again for --retry-s.

examples:
  kvrep load 127.0.0.1:7400 ./documents
  kvrep load 127.0.0.1:7400 orders.jsonl.gz --keyspace orders
  kvrep scan ./old --json | kvrep load 127.0.0.1:7400 -
  kvrep load ./orders orders.jsonl --create               into a store on disk, made if missing"""


class Item(NamedTuple):
    """A pair to load; ``read`` is how many bytes of the source it used up, for the progress."""

    keyspace: str
    key: bytes
    value: bytes
    read: int


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    del name
    parser.epilog = _EPILOG
    add_target(parser)
    parser.add_argument("source", metavar="SOURCE", help="directory, JSON-lines file (also .gz), or -")
    parser.add_argument("--keyspace", metavar="NAME", default="default",
                        help='keyspace of lines that name none (default "default")')  # fmt: skip
    parser.add_argument("--prefix", metavar="TEXT", default="", help="put this before every key")
    parser.add_argument("--base64", action="store_true", help='"key" and "value" are base64')
    parser.add_argument(
        "--batch-pairs", metavar="N", type=count, default=500, help="pairs a write (default 500)"
    )
    parser.add_argument("--batch-bytes", metavar="BYTES", type=size, default=1 << 20,
                        help="bytes a write, or one larger pair (default 1 MiB)")  # fmt: skip
    parser.add_argument(
        "--connections", metavar="N", type=count, default=4, help="writers at once (default 4)"
    )
    parser.add_argument("--retry-s", metavar="SECONDS", type=seconds, default=30.0,
                        help="how long to try a write again (default 30)")  # fmt: skip
    parser.add_argument("--create", action="store_true", help="make the store if there is none at the path")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_timeout(parser, 10.0, "how long to wait for each answer")
    add_security(parser)


def run(args: argparse.Namespace) -> int:
    from kvrep.cli.bulk import BulkWriter

    items, total = _source(args)
    with (
        _writer_targets(args) as (open_writer, shared),
        Progress("loaded", total, quiet=args.quiet) as progress,
    ):
        writer = BulkWriter(
            open_writer,
            writers=args.connections,
            batch_pairs=args.batch_pairs,
            batch_bytes=args.batch_bytes,
            retry_s=args.retry_s,
            close_writers=not shared,
        )
        try:
            with writer:
                for item in items:
                    writer.put(item.keyspace, item.key, item.value)
                    _show(writer.take_done(), progress)
        finally:
            _show(writer.take_done(), progress)
    print(
        f"loaded {number(progress.done_pairs)} pairs, {megabytes(progress.done_bytes)}"
        f" in {duration(progress.elapsed_s)} ({megabytes(progress.rate)}/s)"
    )
    return Exit.OK


def _show(done: tuple[int, int], progress: Progress) -> None:
    if done[1]:
        progress.add(*done)


@contextmanager
def _writer_targets(args: argparse.Namespace) -> Iterator[tuple[Any, bool]]:
    """How a writer gets its target, and whether all writers share one (a store on disk)."""
    from kvrep.cli.arguments import security
    from kvrep.cli.target import RemoteTarget, open_writer

    first = open_writer(args)
    try:
        if not isinstance(first, RemoteTarget):
            yield (lambda _: first), True
            return
        address = _primary_of(first, args.target)
        secure = security(args)

        def connect(other: str | None) -> Writer:
            return RemoteTarget(other or address, secure, timeout_s=args.timeout_s)

        yield connect, False
    finally:
        first.close()


def _primary_of(node: RemoteTarget, address: str) -> str:
    status = node.status()
    primary = str(status["primary_address"])
    if status["role"] == "primary" or not primary:
        return address
    print(f"kvrep load: {address} is a follower; loading into the primary at {primary}", file=sys.stderr)
    return primary


# -- sources ---------------------------------------------------------------------------------------


def _source(args: argparse.Namespace) -> tuple[Iterator[Item], int | None]:
    """The pairs, and how many bytes they are if that is known before."""
    prefix = os.fsencode(args.prefix)
    if args.source == "-":
        return _lines(args, sys.stdin.buffer, "standard input", prefix), None
    path = Path(args.source)
    if path.is_dir():
        files = sorted(_files(path))
        return _contents(args, path, files, prefix), sum(file.stat().st_size for file in files)
    if not path.exists():
        raise UsageError(f"there is no {args.source}", hint="SOURCE is a directory, a file, or -")
    return _file_lines(args, path, prefix), None


def _files(top: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(top, onerror=fail):
        for name in names:
            path = Path(folder, name)
            if path.is_file():
                yield path


def _contents(args: argparse.Namespace, top: Path, files: list[Path], prefix: bytes) -> Iterator[Item]:
    for path in files:
        data = path.read_bytes()
        yield Item(args.keyspace, prefix + os.fsencode(path.relative_to(top)), data, len(data))


def _file_lines(args: argparse.Namespace, path: Path, prefix: bytes) -> Iterator[Item]:
    with path.open("rb") as raw:
        lines = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
        yield from _lines(args, lines, str(path), prefix)


def _lines(args: argparse.Namespace, lines: IO[bytes], where: str, prefix: bytes) -> Iterator[Item]:
    try:
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                keyspace, key, value = pair_from_json(line, is_base64=args.base64)
            except UsageError as error:
                raise UsageError(f"{where}, line {line_number}: {error.message}", hint=error.hint) from None
            yield Item(keyspace or args.keyspace, prefix + key, value, len(line))
    except (gzip.BadGzipFile, EOFError) as error:
        raise UsageError(f"{where}: {error}", hint="the file is damaged, or no gzip file") from None
