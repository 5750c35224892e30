"""Arguments that several subcommands share, and the text forms of sizes, times and options."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvrep.cli.exits import UsageError
from kvrep.model.position import Position

if TYPE_CHECKING:
    from kvrep.transport.security import TLS, Security

__all__ = [
    "OPTION_FLAGS",
    "add_options",
    "add_security",
    "add_target",
    "add_timeout",
    "count",
    "is_address",
    "options_of",
    "position",
    "seconds",
    "security",
    "size",
]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])i?)?B?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size(text: str) -> int:
    """A number of bytes: ``67108864``, ``64MiB``, ``64M``, ``1.5GiB`` (powers of 1024)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size (such as 65536, 64KiB or 1.5GiB)")
    return int(float(match[1]) * 1024 ** _POWERS[(match[2] or "").lower()])


def seconds(text: str) -> float:
    """A time in seconds, above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds")
    return value


def count(text: str) -> int:
    """A whole number, 0 or more."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def acks(text: str) -> int | str:
    """``0``, a number of followers, ``majority`` or ``all``."""
    if text in ("majority", "all"):
        return text
    try:
        return count(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not an ack rule: 0, a number of followers, "majority" or "all"'
        ) from None


def position(text: str) -> Position:
    """``epoch:offset``, as ``put`` prints it."""
    try:
        return Position.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def is_address(text: str) -> bool:
    """Whether a target is ``host:port`` rather than a path: a numeric port, and no such directory."""
    host, _, port = text.rpartition(":")
    return bool(host) and "/" not in text and port.isascii() and port.isdecimal() and not Path(text).exists()


def add_target(parser: argparse.ArgumentParser, *, many: bool = False) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="+" if many else None,
        help="host:port of a running node, or the path of a store that nobody has open",
    )


def add_timeout(parser: argparse.ArgumentParser, default: float, what: str) -> None:
    parser.add_argument(
        "--timeout-s", "--timeout", dest="timeout_s", metavar="SECONDS", type=seconds, default=default,
        help=f"{what} (default {default:g})",
    )  # fmt: skip


def add_security(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("security")
    group.add_argument("--token-file", metavar="FILE", help="file with the secret that all nodes share")
    group.add_argument("--tls-cert", metavar="FILE", help="this side's certificate (PEM); turns TLS on")
    group.add_argument("--tls-key", metavar="FILE", help="the certificate's private key (PEM)")
    group.add_argument("--tls-ca", metavar="FILE", help="the authority to trust (PEM); turns TLS on")


def token_of(args: argparse.Namespace) -> str | None:
    """The content of ``--token-file`` without the line end."""
    if args.token_file is None:
        return None
    token = Path(args.token_file).read_text(encoding="utf-8").strip()
    if not token:
        raise UsageError(f"{args.token_file} is empty", hint="put the secret into it, in one line")
    return token


def tls_of(args: argparse.Namespace) -> TLS | None:
    if not (args.tls_cert or args.tls_key or args.tls_ca):
        return None
    from kvrep.transport.security import TLS

    for file in (args.tls_cert, args.tls_key, args.tls_ca):
        if file is not None and not Path(file).is_file():
            raise UsageError(f"{file} is not a file", hint="TLS files are given as paths of PEM files")
    try:
        return TLS(certificate=args.tls_cert or "", private_key=args.tls_key or "", ca=args.tls_ca)
    except ValueError as error:
        raise UsageError(str(error), hint="give --tls-cert and --tls-key together") from None


def security(args: argparse.Namespace) -> Security:
    """What :func:`add_security` collected."""
    from kvrep.transport.security import Security

    return Security(tls=tls_of(args), token=token_of(args))


class Flag(NamedTuple):
    """How a field of ``kvrep.Options`` is said on the command line."""

    field: str
    kind: Any
    help: str

    @property
    def names(self) -> tuple[str, ...]:
        """The field's name, which ends with its unit; ``--ack-timeout`` is short for ``--ack-timeout-s``."""
        name = f"--{self.field.replace('_', '-')}"
        return (name, "--ack-timeout") if self.field == "ack_timeout_s" else (name,)


OPTION_FLAGS: dict[str, tuple[Flag, ...]] = {
    "commit rule (seeds a new store; later changes are made on the primary)": (
        Flag("acks", acks, 'copies on followers that a write waits for: 0, a number, "majority" or "all"'),
        Flag("ack_timeout_s", seconds, "how long a write waits for them"),
        Flag("degrade_after_s", seconds, "without enough voters for so long, fewer copies do (0: never)"),
        Flag("lag_records_max", count, "with acks 0: records the furthest follower may lack (0: no bound)"),
    ),
    "durability": (
        Flag("durability", ("sync", "os"), "sync: on the disk before a write returns; os: with the system"),
        Flag("sync_interval_s", seconds, "with durability os: sync at least this often"),
    ),
    "limits": (
        Flag("keyspaces_max", count, "keyspaces"),
        Flag("value_bytes_max", size, "the largest value"),
        Flag("record_bytes_max", size, "the largest batch or transaction"),
        Flag("map_bytes", size, "the largest size LMDB may reach"),
        Flag("readers_max", count, "reads at once"),
        Flag("followers_max", count, "followers at once"),
        Flag("uncommitted_bytes_max", size, "log that may wait for acks; above it writes are refused"),
        Flag("snapshot_age_max_s", seconds, "the longest scan"),
        Flag("transaction_age_max_s", seconds, "the longest transaction"),
        Flag("close_timeout_s", seconds, "the longest close"),
    ),
    "log and flush": (
        Flag("log_file_bytes", size, "size of one log file"),
        Flag("memtable_bytes", size, "payload that starts a flush"),
        Flag("memtable_bytes_max", size, "unflushed memory at which writers wait"),
        Flag("flush_interval_s", seconds, "age of unflushed writes that starts a flush"),
        Flag("retention_bytes", size, "log kept beyond what followers need"),
        Flag("retention_bytes_max", size, "log kept at the most"),
        Flag("retention_age_s", seconds, "age at which unneeded log is trimmed"),
    ),
    "replication": (
        Flag("segment_bytes_max", size, "the largest message to a follower"),
        Flag("credit_bytes", size, "what this follower lets its primary send ahead"),
        Flag("heartbeat_interval_s", seconds, "time between heartbeats"),
        Flag("heartbeat_timeout_s", seconds, "silence after which a connection is dead"),
        Flag("reconnect_backoff_max_s", seconds, "the longest pause before connecting again"),
        Flag("compression", ("zstd",), "compress what followers are sent (needs kvrep[zstd])"),
    ),
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """One flag per field of ``kvrep.Options`` that a process can use; the unit is in its name."""
    from kvrep.options import Options

    defaults = Options()
    for title, flags in OPTION_FLAGS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            default = getattr(defaults, flag.field)
            said = flag.help if default is None else f"{flag.help} (default {_said(flag, default)})"
            if isinstance(flag.kind, tuple):
                group.add_argument(*flag.names, dest=flag.field, choices=flag.kind, help=said)
            else:
                group.add_argument(
                    *flag.names, dest=flag.field, type=flag.kind, help=said, metavar=_unit(flag)
                )


def _unit(flag: Flag) -> str:
    return {seconds: "SECONDS", size: "BYTES", acks: "RULE"}.get(flag.kind, "N")


def _said(flag: Flag, default: Any) -> str:
    if flag.kind is size:
        from kvrep.cli.console import binary

        return binary(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_options` collected: only the options that were given."""
    given: dict[str, Any] = {}
    for flags in OPTION_FLAGS.values():
        for flag in flags:
            value = getattr(args, flag.field)
            if value is not None:
                given[flag.field] = value
    return given
