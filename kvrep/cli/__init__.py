"""The ``kvrep`` command.

One module per subcommand, each with ``configure(parser, name)`` and ``run(args)``. Modules import what they
need inside ``run``, so that ``kvrep --help`` stays quick: storage and gRPC cost more than all the rest.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from kvrep.cli.exits import EXIT_HELP, Exit, exit_code
from kvrep.errors import Error

__all__ = ["describe", "main"]

_COMMANDS = {
    "demo": "show kvrep at work: three nodes, real data, a crash, and the proof that nothing was lost",
    "serve": "run a primary or a follower as a process",
    "status": "where a node and its followers stand",
    "get": "print a value",
    "put": "store a value",
    "delete": "remove a key",
    "scan": "list keys and values in order",
    "load": "store many pairs: from a directory, a JSON-lines file, or standard input",
    "dump": "write all pairs to a JSON-lines file or a directory",
    "verify": "check one store on disk, or running nodes against each other",
    "members": "who votes in a group, and what each of them is now",
    "agent": "keep a secondary system up to date from a store or a broker, or publish to a broker",
    "drill": "rehearse a disaster: bring up a scratch copy at the far site, verify it, measure",
    "publish": "ship a store's log into a message broker, for followers far away",
    "promote": "make a node the primary of its group",
    "switchover": "hand over from the primary to another voter, without losing a write",
    "changes": "watch what is written, as it is written",
    "feed": "list, pause, resume, move or drop the named feeds of a store",
    "rescue": "look at, export and write again what a node had to drop",
}
_MODULES = {
    "changes": "feeds",
    "feed": "feeds",
    "get": "data",
    "put": "data",
    "delete": "data",
    "scan": "data",
    "members": "group",
    "promote": "group",
    "switchover": "group",
}

_EPILOG = """\
A TARGET is the address of a running node (host:port), or the path of a store that nobody has open.

examples:
  kvrep demo                                              the whole of it in half a minute
  kvrep serve ./a --name a --acks 1                       a primary at 127.0.0.1:7400
  kvrep serve ./b --name b --listen 127.0.0.1:7401 --follow 127.0.0.1:7400
  kvrep put 127.0.0.1:7400 greeting hello
  kvrep get 127.0.0.1:7401 greeting
  kvrep status 127.0.0.1:7400 --watch 1

"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def _parser(command: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser, and that of ``command``. Only its module is imported; the others show their one line."""
    parser = argparse.ArgumentParser(
        prog="kvrep",
        description="A key-value store inside your Python application, replicated to other machines.",
        epilog=_EPILOG + EXIT_HELP,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    parser.add_argument("--debug", action="store_true", help="show tracebacks (also after the subcommand)")
    chosen = parser
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, line in _COMMANDS.items():
        sub = commands.add_parser(
            name, help=line, description=line[0].upper() + line[1:] + ".", formatter_class=_Formatter,
            allow_abbrev=False,
        )  # fmt: skip
        if name == command:
            module = importlib.import_module(f"kvrep.cli.{_MODULES.get(name, name)}")
            module.configure(sub, name)
            # Its default must not undo one that came before the subcommand.
            sub.add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
            )
            sub.set_defaults(run=module.run)
            chosen = sub
            sub.epilog = f"{sub.epilog or ''}\n\n{EXIT_HELP}".lstrip()
    return parser, chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (see ``kvrep --help``)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        if "--debug" in arguments:
            raise
        print("interrupted", file=sys.stderr)
        return Exit.INTERRUPTED


def _main(arguments: list[str]) -> int:
    args = _parse(arguments)
    if args.version:
        from importlib import metadata

        print(f"kvrep {metadata.version('kvrep')}")
        return Exit.OK
    if args.command is None:
        print("kvrep: name a command; 'kvrep --help' lists them", file=sys.stderr)
        return Exit.USAGE
    return _run(args)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse. ``argparse`` takes no optional positional behind a flag: that one is put in its place here."""
    command = next((a for a in arguments if not a.startswith("-")), None)
    parser, chosen = _parser(command)
    args, rest = parser.parse_known_args(arguments)
    last = getattr(args, "optional_last", None)
    plain = len(rest) == 1 and (rest[0] == "-" or not rest[0].startswith("-"))
    if last is not None and plain and getattr(args, last) is None:
        setattr(args, last, rest.pop())
    if rest:
        chosen.error(f"not understood: {' '.join(rest)}")
    return args


def _run(args: argparse.Namespace) -> int:
    """Every way a subcommand can fail becomes an exit code and one line on stderr."""
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; the flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except (Error, OSError, ValueError, TypeError) as error:
        if args.debug:
            raise
        print(f"kvrep {args.command}: {describe(error)}", file=sys.stderr)
        return exit_code(error)
    return code


def describe(error: BaseException) -> str:
    """An error as one line, its hint included."""
    if isinstance(error, Error):
        text = error.message or (type(error).__doc__ or type(error).__name__).partition("\n")[0]
        text = f"{text} ({error.hint})" if error.hint else text
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
