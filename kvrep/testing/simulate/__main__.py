"""``python -m kvrep.testing.simulate``."""

from kvrep.testing.simulate.command import main

raise SystemExit(main())
