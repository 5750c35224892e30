"""A follower in a process of its own: ``python bootstrap_child.py PATH SOURCE OPTIONS``.

Ends when the follower has joined and its copy is verified, or with 1 when replication has ended for good.
"""

from __future__ import annotations

import ast
import sys

import kvrep
from tests.replication_kit import until


def main() -> None:
    path, source, options = sys.argv[1:]
    with kvrep.open(path, follow=source, **ast.literal_eval(options)) as store:

        def verified() -> bool:
            status = store.status()
            if status.source.state == "refused":
                sys.exit(1)
            return status.source.connected and status.verified_through > 0

        until(verified, what=lambda: f"a verified copy: {store.status().source}")


if __name__ == "__main__":
    main()
