"""``kvrep rescue``: records that a node had to drop."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrep.cli.arguments import add_security, add_timeout, count, is_address
from kvrep.cli.console import binary, number, table
from kvrep.cli.exits import Exit, UsageError
from kvrep.cli.forms import TEXT, pair_to_json
from kvrep.errors import CorruptionError, LineageMismatch, NotAStore, NotPrimary, ProtocolError
from kvrep.model.record import is_system, messages_in, writes_in

if TYPE_CHECKING:
    from kvrep.model.record import Op, Record
    from kvrep.storage.rescue import RescueFile

__all__ = ["configure", "run"]

Call = Callable[[str, dict[str, Any]], dict[str, Any]]

BATCH_KEYS = 500
BATCH_BYTES = 1 << 20
_EPILOG = """\
A node that finds records in its log that the group's history does not contain saves them to a file in the
folder 'rescue' of its store before it drops them. They were never acknowledged under a synchronous rule; in
asynchronous mode they may have been.

examples:
  kvrep rescue list ./a                                     the files of a store, open or not
  kvrep rescue show ./a/rescue/records-101-200-….kvrescue
  kvrep rescue export FILE > lost.jsonl                     as 'kvrep load' takes it; deletes are left out
  kvrep rescue reapply FILE 127.0.0.1:7400 --dry-run        what could be written again
  kvrep rescue reapply FILE 127.0.0.1:7400                  write it, where the key has not changed since

'reapply' writes the last state of each key in the file, and only where nobody has written or deleted that
key since the histories parted; the others are listed. With --force it writes all of them."""


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    del name
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=("list", "show", "export", "reapply"))
    parser.add_argument("file", metavar="FILE", help="a rescue file; for 'list' the path of a store")
    parser.add_argument("target", metavar="TARGET", nargs="?",
                        help="reapply: host:port of a node, or the path of a closed store")  # fmt: skip
    parser.set_defaults(optional_last="target")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    parser.add_argument("--limit", metavar="N", type=count, help="show: at most so many operations")
    parser.add_argument("--dry-run", action="store_true", help="reapply: write nothing, say what would be")
    parser.add_argument("--force", action="store_true", help="reapply: also where the key has changed since")
    add_timeout(parser, 10.0, "how long to wait for an answer")
    add_security(parser)


def run(args: argparse.Namespace) -> int:
    if (args.action == "reapply") != (args.target is not None):
        raise UsageError("TARGET is for 'reapply', and needed there")
    if args.action == "list":
        return _list(args)
    from kvrep.storage.rescue import load_rescue

    found = load_rescue(Path(args.file))
    if args.action == "show":
        return _show(args, found)
    if args.action == "export":
        return _export(found)
    return _reapply(args, found)


# -- looking ---------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    from kvrep.storage.rescue import UNFINISHED, load_rescue

    folder = Path(args.file)
    if not (folder / "STORE").is_file():
        raise NotAStore(f"there is no store at {folder}", path=str(folder), hint="check the path")
    rows = []
    damaged = False
    files = [path for path in (folder / "rescue").glob("*") if path.suffix != UNFINISHED]
    for path in sorted(files, key=lambda p: p.stat().st_mtime):
        size = path.stat().st_size
        try:
            found = load_rescue(path)
            rows.append({"file": str(path), "bytes": size, **_facts(found)})
        except CorruptionError as error:
            # What was cut off the end of a log after a crash is kept, too, byte for byte: no records.
            whole = path.suffix != ".kvrescue"
            damaged = damaged or not whole
            what = "an unfinished write, cut after a crash" if whole else f"DAMAGED: {error.message}"
            rows.append({"file": str(path), "bytes": size, "first": 0, "last": 0, "writes": 0, "reason": what,
                         "time_s": path.stat().st_mtime})  # fmt: skip
    if args.json:
        for row in rows:
            print(json.dumps(row))
    elif not rows:
        print("nothing was ever dropped here")
    else:
        shown = [
            (
                Path(row["file"]).name,
                f"{number(row['first'])} to {number(row['last'])}" if row["last"] else "-",
                number(row["writes"]),
                binary(row["bytes"]),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time_s"])),
                row["reason"],
            )
            for row in rows
        ]
        print("\n".join(table(("file", "records", "writes", "size", "when", "why"), shown, right=(2, 3))))
    return Exit.DAMAGED if damaged else Exit.OK


def _facts(found: RescueFile) -> dict[str, Any]:
    writes = [r for r in found.records if writes_in(r.kind, r.payload) or messages_in(r.kind, r.payload)]
    return {"first": found.first, "last": found.last, "writes": len(writes), "reason": found.reason,
            "time_s": found.time_s, "lineage": found.lineage}  # fmt: skip


def _show(args: argparse.Namespace, found: RescueFile) -> int:
    left = args.limit
    if not args.json:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.time_s))
        print(f"records {found.first} to {found.last}, dropped at {when}: {found.reason}")
    for record in found.records:
        for line in _lines(record, as_json=args.json):
            if left == 0:
                return Exit.OK
            left = None if left is None else left - 1
            print(line)
    return Exit.OK


def _lines(record: Record, *, as_json: bool) -> Iterator[str]:
    """One line for each operation and each message of a record; kvrep's own are left out."""
    for name, key, value in _ops(record):
        fields = json.loads(pair_to_json(key, value or b"", keyspace=name))
        if value is None:
            fields = {k: v for k, v in fields.items() if not k.startswith("value")} | {"deleted": True}
        what = "deleted" if value is None else TEXT.encode(value)
        yield _line(record, fields, (name, TEXT.encode(key), what), as_json=as_json)
    for topic, payload, _ in messages_in(record.kind, record.payload):
        fields = json.loads(pair_to_json(b"", payload))
        del fields["key"]
        parts = ("(message)", topic, TEXT.encode(payload))
        yield _line(record, {"topic": topic, **fields}, parts, as_json=as_json)


def _line(record: Record, fields: dict[str, Any], parts: tuple[str, str, str], *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"position": str(record.position), **fields}, ensure_ascii=False)
    return "\t".join((str(record.position), *parts))


def _ops(record: Record) -> list[Op]:
    """What users wrote: the places of feeds are never written again."""
    return [op for op in record.ops() if not is_system(op[0])]


def _export(found: RescueFile) -> int:
    """JSON lines of what the keys held last; deletes have no such line and are counted on stderr."""
    final = _final(found)
    for name, key, value in final:
        if value is not None:
            print(pair_to_json(key, value, keyspace=name))
    deleted = sum(value is None for _, _, value in final)
    if deleted:
        print(f"kvrep rescue: {number(deleted)} deleted keys are left out", file=sys.stderr)
    return Exit.OK


def _final(found: RescueFile) -> list[Op]:
    """The last operation on each key, in the order of the last ones."""
    last: dict[tuple[str, bytes], bytes | None] = {}
    for record in found.records:
        for name, key, value in _ops(record):
            last.pop((name, key), None)
            last[name, key] = value
    return [(name, key, value) for (name, key), value in last.items()]


# -- writing again ---------------------------------------------------------------------------------


def _reapply(args: argparse.Namespace, found: RescueFile) -> int:
    with _target(args) as call:
        _check_lineage(call, found)
        changed, checked = (set(), 0) if args.force else _changed_since(call, found)
        ops = _final(found)
        wanted = [op for op in ops if (op[0], op[1]) not in changed]
        written = 0
        if not args.dry_run:
            written, late = _write_all(call, wanted, checked, force=args.force)
            changed |= late
    messages = sum(len(messages_in(r.kind, r.payload)) for r in found.records)
    if messages:
        print(
            f"{number(messages)} messages are not sent again; 'kvrep rescue show' shows them", file=sys.stderr
        )
    skipped = [(name, key) for name, key, _ in ops if (name, key) in changed]
    for name, key in skipped:
        print(f"changed since, left alone: {name} {TEXT.encode(key)}", file=sys.stderr)
    count_ = len(wanted) if args.dry_run else written
    verb = "would be written" if args.dry_run else "written"
    if args.json:
        print(json.dumps({"written": written, "would_write": len(wanted), "changed": len(skipped)}))
    else:
        print(f"{number(count_)} keys {verb}, {number(len(skipped))} have changed since and are left alone")
    return Exit.OK


def _check_lineage(call: Call, found: RescueFile) -> None:
    lineage = call("status", {})["status"]["lineage"]
    if found.lineage and lineage != found.lineage:
        raise LineageMismatch("the file was saved by another store", ours=lineage, theirs=found.lineage)


def _changed_since(call: Call, found: RescueFile) -> tuple[set[tuple[str, bytes]], int]:
    """(the keys touched since the histories parted, the record through which that is known)."""
    after, end = found.first - 1, False
    changed: set[tuple[str, bytes]] = set()
    while not end:
        page = call("changes", {"after": after})
        if after == found.first - 1 and page["running"] != found.running_before:
            raise ProtocolError(
                f"the node's history is not that of the file before record {found.first}",
                hint="look at the keys by hand; --force writes them whatever they hold now",
            )
        changed |= {(name, bytes(key)) for name, key in page["keys"]}
        after, end = page["through"], page["end"]
    return changed, after


def _write_all(call: Call, ops: list[Op], checked: int, *, force: bool) -> tuple[int, set[tuple[str, bytes]]]:
    """Write in batches; (keys written, those that somebody else wrote meanwhile).

    Each key is written once, so what is written here never stands in the way of the rest.
    """
    late: set[tuple[str, bytes]] = set()
    written = 0
    for batch in _batches(ops):
        left = batch
        while left:
            answer = call("reapply", {"ops": left, "checked": checked, "force": force})
            if not answer["changed"]:
                written += len(left)
                break
            clash = {(name, bytes(key)) for name, key in answer["changed"]}
            late |= clash
            left = [op for op in left if (op[0], op[1]) not in clash]
    return written, late


def _batches(ops: list[Op]) -> Iterator[list[Op]]:
    batch: list[Op] = []
    size = 0
    for op in ops:
        batch.append(op)
        size += len(op[1]) + len(op[2] or b"")
        if len(batch) >= BATCH_KEYS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _target(args: argparse.Namespace) -> Iterator[Call]:
    """How to ask the node, or the closed store, that is written to; a follower names its primary."""
    from kvrep.cli.target import connect

    if not is_address(args.target):
        with _opened(args) as call:
            yield call
        return
    node = connect(args, args.target)
    try:
        primary = node.status()["primary_address"]
    finally:
        node.close()
    if not primary:
        raise NotPrimary("the node knows no primary", primary_address=None, epoch=None)
    with connect(args, primary) as remote:
        yield remote.call


@contextmanager
def _opened(args: argparse.Namespace) -> Iterator[Call]:
    import kvrep
    from kvrep.cli.target import check_alone
    from kvrep.runtime.service import NodeService

    check_alone(args.target)
    with kvrep.open(args.target, create=False) as store:
        service = NodeService(store._node)
        yield lambda method, request: dict(service.call(method, {"timeout_s": args.timeout_s, **request}))
