"""``kvrep serve``: a primary or a follower as a process."""

from __future__ import annotations

import argparse
import json
import os
import signal
from typing import TYPE_CHECKING, Any

from kvrep.cli.arguments import add_options, add_security, options_of, tls_of, token_of
from kvrep.cli.console import log_to_stderr
from kvrep.cli.exits import Exit
from kvrep.cli.stopping import stoppable

if TYPE_CHECKING:
    from kvrep.store import Store

__all__ = ["configure", "run"]

_EPILOG = """\
examples:
  a primary whose writes wait for one follower, and two followers:
    kvrep serve ./a --name a --listen 127.0.0.1:7400 --acks 1
    kvrep serve ./b --name b --listen 127.0.0.1:7401 --follow 127.0.0.1:7400
    kvrep serve ./c --name c --listen 127.0.0.1:7402 --follow 127.0.0.1:7400
  on several machines: listen everywhere, say the name others can reach, encrypt, and share a secret:
    kvrep serve /var/lib/kvrep --name a --listen 0.0.0.0:7400 --advertise host-a:7400 \\
        --tls-cert node.pem --tls-key node.key --tls-ca ca.pem --token-file secret
  three nodes that elect a primary by themselves (the same on each, with its own name and address):
    kvrep serve ./a --name a --listen 127.0.0.1:7400 --acks majority \\
        --peer a=127.0.0.1:7400 --peer b=127.0.0.1:7401 --peer c=127.0.0.1:7402
  a copy for reading that has no vote:
    kvrep serve ./d --listen 127.0.0.1:7403 --follow 127.0.0.1:7400 --no-vote

When it is ready it prints one line with its address (with --json: one JSON object); the log goes to
stderr. SIGTERM and Ctrl-C close the store, within --close-timeout-s; a second signal ends at once,
which loses nothing that was acknowledged."""


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    del name
    parser.epilog = _EPILOG
    parser.add_argument("path", metavar="PATH", help="directory of the store (created if missing)")
    parser.add_argument("--name", help="this node's name; a follower needs one to have a vote")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", default="127.0.0.1:7400",
        help="where to listen (default 127.0.0.1:7400; port 0 picks a free one)",
    )  # fmt: skip
    parser.add_argument("--advertise", metavar="HOST:PORT", help="the address to tell others, if different")
    parser.add_argument(
        "--follow", metavar="HOST:PORT", action="append",
        help="be a follower of this primary (repeat it to name several to try)",
    )  # fmt: skip
    group = parser.add_argument_group("who is primary (the same on every node; by hand if none is given)")
    group.add_argument(
        "--peer", metavar="NAME=HOST:PORT", action="append",
        help="a node of the group, this one included; the nodes form the group and elect a primary",
    )  # fmt: skip
    group.add_argument("--etcd", metavar="HOST:PORT", action="append", help="let a key in etcd say who tries")
    group.add_argument("--cluster", metavar="NAME", help="with --etcd: the name of this group there")
    group.add_argument("--priority", type=int, default=0, help="of equals the highest becomes primary (0)")
    group.add_argument("--witness", action="store_true", help="with --peer: vote, but keep no data")
    parser.add_argument("--no-vote", action="store_true", help="never count for commits and promotions")
    parser.add_argument(
        "--forward-writes", action="store_true", help="while a follower, pass writes on to the primary"
    )
    parser.add_argument("--no-create", action="store_true", help="fail if there is no store at PATH")
    parser.add_argument("--json", action="store_true", help="print the ready line as JSON")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info",
        help="what goes to stderr (default info)",
    )  # fmt: skip
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when standard input ends, too")
    add_options(parser)
    add_security(parser)


def run(args: argparse.Namespace) -> int:
    import kvrep

    log_to_stderr(args.log_level)
    with stoppable(stdin=args.until_stdin_closes) as stop, kvrep.open(args.path, **_options(args)) as store:
        _say_ready(store, as_json=args.json)
        stop.wait()
    return Exit.INTERRUPTED if stop.signal == signal.SIGINT else Exit.OK


def _options(args: argparse.Namespace) -> Any:
    return {
        "name": args.name,
        "listen": args.listen,
        "advertise": args.advertise,
        "follow": tuple(args.follow) if args.follow else None,
        "voter": not args.no_vote,
        "create": not args.no_create,
        "forward_writes": args.forward_writes,
        "tls": tls_of(args),
        "token": token_of(args),
        "coordinator": _coordinator(args),
        **options_of(args),
    }


def _coordinator(args: argparse.Namespace) -> Any:
    """The coordinator that the flags describe; ``ConfigurationMismatch`` for a description that is none."""
    from kvrep.coordinators import Etcd, Quorum
    from kvrep.errors import ConfigurationMismatch

    if args.peer and args.etcd:
        raise ConfigurationMismatch(
            "--peer and --etcd exclude each other", option="coordinator", given=args.etcd
        )
    if args.etcd:
        return Etcd(endpoints=args.etcd, cluster=args.cluster or "", priority=args.priority)
    if not args.peer:
        return None
    peers = dict(peer.partition("=")[::2] for peer in args.peer)
    return Quorum(peers=peers, priority=args.priority, witness=args.witness)


def _say_ready(store: Store, *, as_json: bool) -> None:
    status = store.status()
    if as_json:
        ready = {
            "address": store.address, "role": str(status.role), "name": status.name,
            "path": status.path, "pid": os.getpid(),
        }  # fmt: skip
        line = json.dumps(ready)
    else:
        name = f" {status.name}" if status.name else ""
        line = f"ready: {status.role}{name} at {store.address}"
    print(line, flush=True)
