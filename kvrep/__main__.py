"""``python -m kvrep`` is the ``kvrep`` command."""

from __future__ import annotations

import sys

from kvrep.cli import main

if __name__ == "__main__":
    sys.exit(main())
