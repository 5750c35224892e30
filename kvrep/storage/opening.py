"""Opening a store directory: the parts of an engine, brought to one state after any end."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from kvrep.errors import ConfigurationMismatch, OpenError
from kvrep.model.codec import decode
from kvrep.model.record import DEFAULT_KEYSPACE, Record, is_system, writes_in
from kvrep.options import Options
from kvrep.storage.history import History
from kvrep.storage.home import Home
from kvrep.storage.log import Log, Run
from kvrep.storage.log_file import fsync_directory
from kvrep.storage.recovery import recover
from kvrep.storage.tree import Tree

__all__ = ["Parts", "open_parts"]

log = logging.getLogger("kvrep.storage")


@dataclass(slots=True)
class Parts:
    home: Home
    tree: Tree
    log: Log
    history: History
    pending: list[Record]
    """The records of the log that LMDB does not hold."""
    committed: int
    """Through which record they are known to be committed."""
    rescued: list[Path]

    def close(self) -> None:
        """They are not needed after all."""
        self.log.abandon()
        self.tree.close(1.0)
        self.home.close()


def open_parts(path: Path, options: Options, *, lineage: bytes) -> Parts:
    """Open or create the store at ``path``; ``lineage`` is for a new one (empty: adopted later)."""
    try:
        home = Home.open(path, create=options.create, name=options.name, lineage=lineage)
        try:
            return _open_in(home, options)
        except BaseException:
            home.close()
            raise
    except OSError as error:
        raise OpenError(f"cannot open the store at {path}: {error.strerror}") from error


def _open_in(home: Home, options: Options) -> Parts:
    data = home.generation / "data"
    if home.suspected:
        log.warning("%s: the disk failed under this store; its digests are recomputed", home.path)
        _drop_cached(data / "data.mdb")
    tree = Tree.open(
        data,
        home.lineage,
        map_bytes=options.map_bytes,
        keyspaces_max=options.keyspaces_max,
        readers_max=options.readers_max,
        create=home.created or (not (data / "data.mdb").exists() and not home.lineage),
    )
    try:
        parts = _recover(home, tree, options)
        if home.created:  # the marker comes last: a creation that ends before is begun anew
            fsync_directory(data)
            home.finish_creation()
    except BaseException:
        tree.close(1.0)
        raise
    return parts


def _drop_cached(path: Path) -> None:
    """Have the next reads of a file come from the disk: the kernel keeps pages that it failed to write."""
    if path.exists():
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _recover(home: Home, tree: Tree, options: Options) -> Parts:
    state = tree.state
    history, pending = History.of(state), list[Record]()
    running, tail_epoch = state.applied.running, state.applied.epoch

    def replay(run: Run) -> None:
        nonlocal history, running, tail_epoch
        records, running = decode(run.data, run.first, running)
        for record in records:
            history = history.note(record)
        tail_epoch = records[-1].epoch
        pending.extend(records)

    found = recover(
        home.generation / "log",
        home.lineage,
        state.applied,
        file_bytes=options.log_file_bytes,
        rescue=home.rescue,
        replay=replay,
        epoch_of=lambda run: tail_epoch,
        expected=state.logged_in == home.copy_id,
    )
    rescued = []
    if found.rescue_path is not None:
        log.warning("%s: an unfinished write of %d bytes was cut from the log and saved to %s",
                    home.path, found.unfinished_bytes, found.rescue_path)  # fmt: skip
        rescued.append(found.rescue_path)
    names = {name for record in pending for name in writes_in(record.kind, record.payload)[::2]}
    try:
        _check_keyspaces(names.union(tree.keyspaces), options.keyspaces_max)
    except ConfigurationMismatch:
        found.log.abandon()
        raise
    committed = max(state.applied.offset, min(found.committed, found.log.tail.offset))
    return Parts(home, tree, found.log, history, pending, committed, rescued)


def _check_keyspaces(names: Collection[str], most: int) -> None:
    names = {name for name in names if not is_system(name)}
    if len(names | {DEFAULT_KEYSPACE}) > most:
        raise ConfigurationMismatch(
            f"the store has {len(names | {DEFAULT_KEYSPACE})} keyspaces, keyspaces_max allows {most}",
            option="keyspaces_max",
            given=most,
            stored=len(names),
        )
