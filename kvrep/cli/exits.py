"""What the command's exit codes mean, and which error leads to which."""

from __future__ import annotations

from enum import IntEnum

from kvrep import errors

__all__ = ["EXIT_HELP", "Exit", "UsageError", "exit_code"]


class Exit(IntEnum):
    """Exit codes of every subcommand."""

    OK = 0
    MISSING = 1
    """There is no such key, or no such feed."""
    USAGE = 2
    """The arguments make no sense, or no store is at the path."""
    REFUSED = 3
    """The other side refused, or holds another store; nothing was written, trying again is safe."""
    UNKNOWN = 4
    """The write may or may not survive."""
    UNAVAILABLE = 5
    """No answer: not reachable, in use by another process, or not as fresh as asked in time."""
    DAMAGED = 6
    """Damage or a difference was found, or a check could not be made."""
    FAILED = 7
    """Anything else."""
    INTERRUPTED = 130
    """Ctrl-C."""


EXIT_HELP = """\
exit codes: 0 done; 1 no such key or feed; 2 wrong usage; 3 refused, or another store: nothing was written;
4 unknown outcome; 5 unavailable; 6 damage or a difference was found, or a check could not be made;
7 another failure; 130 interrupted"""


class UsageError(errors.Error):
    """The arguments make no sense together."""


_CODES: tuple[tuple[type[BaseException], Exit], ...] = (
    (UsageError, Exit.USAGE),
    (errors.UnknownOutcome, Exit.UNKNOWN),
    (errors.StoreInUse, Exit.UNAVAILABLE),
    (errors.PeerUnavailable, Exit.UNAVAILABLE),
    (errors.ClosedError, Exit.UNAVAILABLE),
    (errors.Overloaded, Exit.UNAVAILABLE),
    (errors.NoSuchFeed, Exit.MISSING),
    (errors.InvalidToken, Exit.USAGE),
    (errors.Truncated, Exit.REFUSED),
    (errors.LogTrimmed, Exit.REFUSED),
    (errors.ReadError, Exit.UNAVAILABLE),
    (errors.CorruptionError, Exit.DAMAGED),
    (errors.StorageFailed, Exit.DAMAGED),
    (errors.OpenError, Exit.USAGE),
    (errors.RefusedError, Exit.REFUSED),
    (errors.AuthenticationFailed, Exit.REFUSED),
    (errors.LineageMismatch, Exit.REFUSED),
    (errors.PermissionDenied, Exit.REFUSED),
    (TimeoutError, Exit.UNAVAILABLE),
    (FileNotFoundError, Exit.USAGE),
    (FileExistsError, Exit.USAGE),
    (IsADirectoryError, Exit.USAGE),
    (NotADirectoryError, Exit.USAGE),
    (PermissionError, Exit.USAGE),
)


def exit_code(error: BaseException) -> Exit:
    """The exit code for an error that ended a subcommand."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Exit.FAILED)
