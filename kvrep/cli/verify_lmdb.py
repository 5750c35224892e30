"""``python -m kvrep.cli.verify_lmdb DATA LINEAGE``: the recomputed digests of one LMDB copy, as JSON.

A process of its own, because LMDB follows page numbers in the file without checking them: damage there can
end the process that reads it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvrep.errors import Error

__all__ = ["main"]


def main(data: str, lineage: str) -> int:
    """Print what was found, or ``{"error": …}``."""
    try:
        found = _read(Path(data), bytes.fromhex(lineage))
    except Error as error:
        found = {"error": error.message}
    except Exception as error:  # whatever damage made lmdb or msgpack raise
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))
    return 0


def _read(data: Path, lineage: bytes) -> dict[str, Any]:
    from kvrep.options import Options
    from kvrep.storage.tree import Tree

    options = Options(keyspaces_max=1024)
    tree = Tree.open(
        data, lineage, map_bytes=options.map_bytes, keyspaces_max=options.keyspaces_max,
        readers_max=options.readers_max, create=False,
    )  # fmt: skip
    try:
        state = tree.state
        spaces = {
            name: _keyspace(tree, name)
            for name in sorted({*tree.keyspaces, *state.digests, *(n for n, c in state.counts.items() if c)})
        }
        return {
            "applied": list(state.applied),
            "bytes": tree.file_bytes,
            "keyspaces": spaces,
            "verified": state.verified,
            "diverged": state.diverged,
        }
    finally:
        tree.close(1.0)


def _keyspace(tree: Any, name: str) -> dict[str, Any]:
    digest, count = tree.digest(name)
    return {
        "digest": f"{digest:032x}",
        "count": count,
        "stored": f"{tree.state.digests.get(name, 0):032x}",
        "stored_count": tree.state.counts.get(name, 0),
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
