"""What must be true in the demo, asked of the nodes themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrep.cli.demo.loading import KEYSPACE, Batch, File, Unknown
from kvrep.cli.target import Range, RemoteTarget
from kvrep.errors import Error
from kvrep.model.position import Position

__all__ = ["Resolved", "compare_with_files", "equal_digests", "resolve", "wait_writable"]

WAIT_S = 30.0
Tick = Callable[[], None]


@dataclass
class Resolved:
    """What became of the writes without an answer."""

    committed: list[Batch] = field(default_factory=list)
    absent: list[Batch] = field(default_factory=list)
    torn: list[Batch] = field(default_factory=list)
    """Partly there, which must never be."""


def wait_writable(address: str, tick: Tick) -> None:
    """Return once the primary takes writes. ``TimeoutError`` with its own reason if it does not."""
    deadline = time.monotonic() + WAIT_S
    reason = "it does not answer"
    with RemoteTarget(address, timeout_s=5.0) as primary:
        while time.monotonic() < deadline:
            try:
                reason = str(primary.status()["not_writable"])
                if not reason:
                    return
            except Error as error:
                reason = str(error)
            tick()
            time.sleep(0.02)
    raise TimeoutError(f"the primary takes no writes after {WAIT_S:g} s: {reason}")


def resolve(primary: RemoteTarget, unknown: list[Unknown], after: Position, tick: Tick) -> Resolved:
    """Find out what became of writes without an answer, for good.

    Where the primary could still say the position, it is asked about that. Where it was killed before, its
    log decides: ``after`` is the position of a write that it acknowledged since, and all that was logged
    before that one is committed with it, while what was not logged can never appear.
    """
    resolved = Resolved()
    for batch, position in unknown:
        tick()
        if position is not None and _outcome(primary, position, tick) == "rolled back":
            resolved.absent.append(batch)
            continue
        found = [_matches(primary.get(KEYSPACE, file.key, after), file) for file in batch.files]
        if all(found):
            resolved.committed.append(batch)
        elif not any(found):
            resolved.absent.append(batch)
        else:
            resolved.torn.append(batch)
    return resolved


def _outcome(primary: RemoteTarget, position: Position, tick: Tick) -> str:
    """``committed`` or ``rolled back``; waits while it is pending."""
    deadline = time.monotonic() + WAIT_S
    while (outcome := primary.resolve(position)) == "pending" and time.monotonic() < deadline:
        tick()
        time.sleep(0.02)
    return outcome


def _matches(value: bytes | None, file: File) -> bool:
    return value is not None and value == file.path.read_bytes()


def compare_with_files(
    node: RemoteTarget, files: dict[bytes, Path], *, exact: bool, tick: Tick
) -> tuple[int, list[str]]:
    """Read every pair of a node and compare it with its file, byte for byte.

    Returns how many are equal, and what is wrong: a value that differs, a file that is missing, and (if
    ``exact``) a key that belongs to no file.
    """
    wrong: list[str] = []
    seen: set[bytes] = set()
    for chunk in node.scan(Range(KEYSPACE)):
        for key, value in chunk:
            path = files.get(key)
            if path is None:
                if exact:
                    wrong.append(f"{_name(key)} should not be there")
            elif path.read_bytes() != value:
                wrong.append(f"{_name(key)} differs from its file")
            else:
                seen.add(key)
        tick()
    missing = files.keys() - seen
    wrong += [f"{_name(key)} is missing or differs" for key in sorted(missing)[:3]]
    return len(seen), wrong


def _name(key: bytes) -> str:
    return key.decode(errors="backslashreplace")


def equal_digests(nodes: dict[str, RemoteTarget], tick: Tick) -> tuple[bool, str]:
    """Have all nodes recompute their digests from LMDB at one position, and compare them."""
    deadline = time.monotonic() + WAIT_S
    answers: dict[str, dict[str, Any]] = {}
    while time.monotonic() < deadline:
        answers = {name: node.digests() for name, node in nodes.items()}
        positions = {answer["position"] for answer in answers.values()}
        if len(positions) == 1:
            return _equal_at(positions.pop(), answers)
        tick()
    where = ", ".join(f"{name} at {answer['position']}" for name, answer in answers.items())
    return False, f"the nodes did not come to one position: {where}"


def _equal_at(position: str, answers: dict[str, dict[str, Any]]) -> tuple[bool, str]:
    first = next(iter(answers.values()))
    for name, answer in answers.items():
        if _filled(answer["stored"]) != _filled(answer["digests"]):
            return False, f"what is on the disk of {name} does not add up to its digests on record"
        if (_filled(answer["digests"]), answer["counts"]) != (_filled(first["digests"]), first["counts"]):
            return False, f"{name} differs at {position}"
    return True, f"equal on {len(answers)} nodes at {position}, over {sum(first['counts'].values())} pairs"


def _filled(digests: dict[str, bytes]) -> dict[str, bytes]:
    """Without keyspaces that hold nothing."""
    return {name: digest for name, digest in digests.items() if any(digest)}
