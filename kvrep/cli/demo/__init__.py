"""``kvrep demo``: three nodes, real data, a crash, and the proof that nothing was lost.

``story`` is the place to start reading; ``nodes`` are the processes, ``loading`` writes to them, ``checking``
reads everything back.
"""

from __future__ import annotations

import argparse

from kvrep.cli.arguments import count, seconds

__all__ = ["configure", "run"]

_EPILOG = """\
What happens:
  1. A primary and two followers start as processes of this machine, each with its own store in a
     temporary folder. A write returns when it is flushed to the disks of the primary and of one follower.
  2. The files of this Python's standard library are written, as path -> content, several files a batch,
     over several connections.
  3. In the middle of it the primary is killed with SIGKILL, and started again on the same port.
  4. Everything that was acknowledged must still be there. Writes that were under way have an unknown
     outcome: each is looked up, and must be wholly there or wholly absent. Then the load goes on.
  5. At the end all three nodes are compared: by digests recomputed from their disks at one position, and
     by reading every pair back from each of them and comparing it with its file.

It ends with 0 only if all of that was true.

examples:
  kvrep demo
  kvrep demo --files 200            a small one
  kvrep demo --acks all --keep      wait for both followers; leave the stores for a look"""


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    del name
    parser.epilog = _EPILOG
    parser.add_argument("--files", metavar="N", type=count, help="at most so many files (default: all)")
    parser.add_argument(
        "--acks",
        choices=("1", "2", "majority", "all"),
        default="1",
        help="copies on followers that a write waits for (default 1)",
    )
    parser.add_argument(
        "--connections", metavar="N", type=count, default=4, help="writers at once (default 4)"
    )
    parser.add_argument("--batch-files", metavar="N", type=count, default=8, help="files a write (default 8)")
    parser.add_argument(
        "--seconds",
        metavar="N",
        type=seconds,
        default=24.0,
        help="the most that loading may take; what is left then is left out (default 24)",
    )
    parser.add_argument("--data", metavar="DIR", help="files to load (default: the standard library)")
    parser.add_argument("--folder", metavar="DIR", help="where to make the temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the stores and logs there at the end")
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object, and no more"
    )


def run(args: argparse.Namespace) -> int:
    from kvrep.cli.demo.story import tell

    return tell(args)
