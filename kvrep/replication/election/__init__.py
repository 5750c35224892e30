"""Who tries to be primary, and when: the built-in quorum coordinator as a state machine.

Events in, actions out. It holds no clock, no thread and no chance of its own: ``now`` is an argument (seconds
of one monotonic clock), chance a function that the shell passes in. It gives liveness only. What is safe is
decided by promises alone (:mod:`kvrep.replication.promotion`), however wrong a clock or a timeout is.

::

    FOLLOWING ── silence, or news that the primary is gone ──> ASKING      would you promise? (binds nobody)
    ASKING ──── enough would, and nobody who answers is better ──> PROMISING  own promise first, then theirs
    PROMISING ─ F data voters and most voters promised ──> STARTING        the node fetches, begins its epoch
    STARTING ── the epoch start is in the log ──> LEADING                  asks every voter to confirm, always
    LEADING ─── most voters silent for T, or a newer epoch ──> FOLLOWING

* **Pre-vote.** Asking changes nothing, so a node that is cut off does not raise epochs meanwhile.
* **Stickiness.** Whoever has heard of the primary within the limit promises nobody else, and tells so.
* **News.** A broken connection that is refused on reconnect means that the process is gone. The others are
  asked at once; whoever is asked so, and still believes in that primary, looks for itself.
* **The best stands first**: the most up-to-date log, then priority, then the lower member number. The others
  give it ``patience_s``. A voter whose own log is ahead of the candidate's answers no.
* **A pause of our own** proves nothing about others: after one, everybody gets time to be heard.
* **A group is formed once**: see :mod:`kvrep.replication.election.founding`.
"""

from kvrep.replication.election.interface import (
    Action,
    Adopt,
    Ask,
    BecomePrimary,
    ElectionSettings,
    FollowPrimary,
    GivePromise,
    Peer,
    Phase,
    RequestPromises,
    Standing,
    StepDown,
    WhyGone,
)
from kvrep.replication.election.machine import Election

__all__ = [
    "Action",
    "Adopt",
    "Ask",
    "BecomePrimary",
    "Election",
    "ElectionSettings",
    "FollowPrimary",
    "GivePromise",
    "Peer",
    "Phase",
    "RequestPromises",
    "Standing",
    "StepDown",
    "WhyGone",
]
