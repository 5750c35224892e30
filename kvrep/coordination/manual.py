"""The default: people, or something outside, decide. Nobody here tries to be primary by itself.

Questions and requests for promises are answered all the same, because ``promote()`` by hand asks them.
"""

from __future__ import annotations

from kvrep.coordination.voting import Voting

__all__ = ["ManualCoordinator"]


class ManualCoordinator(Voting):
    """See :class:`kvrep.coordination.interface.Coordinator`. No thread, no clock of its own."""
