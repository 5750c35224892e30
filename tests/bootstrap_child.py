"""A follower in a process of its own: ``python bootstrap_child.py PATH SOURCE OPTIONS``.

Ends when the follower has joined and its copy is verified.
"""

from __future__ import annotations

import ast
import sys

from replication_kit import until

import kvrep


def main() -> None:
    path, source, options = sys.argv[1:]
    with kvrep.open(path, follow=source, **ast.literal_eval(options)) as store:
        until(lambda: store.status().source.connected, what=f"a join: {store.status().source}")
        until(lambda: store.status().verified_through > 0, what="the copy's digest")


if __name__ == "__main__":
    main()
