"""Network namespaces for the nodes of a cluster, joined by a bridge; packets between them are cut by nftables.

::

    node a ── eth0 ─────────┐
    node b ── eth0 ─────────┤  a bridge, in a namespace of its own
    this process ── kvrepN ─┘

Nodes talk to each other without a proxy between them: what is lost is lost by the kernel, packet by packet,
half-open connections, retransmissions and all. This process is never cut off: it sees every node.

No namespace has a name. Each lives as long as a process is in it: the nodes', and one (``cat``) that holds it
and ends when its standard input does. So the kernel takes back namespaces, cables and rules when this process
ends, in whichever way. Needs root, and ``ip``, ``nft``, ``nsenter`` and ``unshare``.

All methods block for some milliseconds, and belong to one thread at a time.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from dataclasses import dataclass, field

__all__ = ["Namespace", "Namespaces", "NotPrivileged", "why_not"]

TOOLS = ("ip", "nft", "nsenter", "unshare")
NODES_MAX = 200
COMMAND_S = 10.0
BRIDGE = "bridge"
_HERE = 254
"""The last number of this process's address; nodes have 1, 2, 3 …"""


class NotPrivileged(Exception):
    """This fault needs rights, or programs, that are missing on this machine. The text says which."""


def why_not() -> str:
    """Why namespaces cannot be made here, for people; empty if nothing is known to be missing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in TOOLS if _which(name) is None]
    return f"network namespaces need {' and '.join(missing)}" if missing else ""


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(command: list[str], text: str = "") -> None:
    """Run a program of :data:`TOOLS`; ``OSError`` with what it said if it fails."""
    program = _which(command[0]) or command[0]
    done = subprocess.run(
        [program, *command[1:]], input=text, capture_output=True, text=True, timeout=COMMAND_S, check=False
    )
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


class _Holder:
    """An unnamed network namespace, and the process that keeps it alive."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            # The empty line says that the namespace is there; anything else is what went wrong.
            [_which("unshare") or "unshare", "--net", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then ends it in order
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if said != "\n":
            self.close()
            raise NotPrivileged(f"network namespaces cannot be made here: {said.strip() or 'no answer'}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def prefix(self) -> list[str]:
        """What to put before a command to have it run in there, in the same process."""
        return [_which("nsenter") or "nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]

    def run(self, command: list[str], text: str = "") -> None:
        _run([*self.prefix, _which(command[0]) or command[0], *command[1:]], text)

    def ip(self, *lines: str) -> None:
        """Run commands of ``ip`` in there."""
        self.run(["ip", "-batch", "-"], "\n".join(lines) + "\n")

    def close(self) -> None:
        """End the process; the namespace goes with the last process in it. Idempotent."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(eq=False)
class Namespace:
    """Where one node lives."""

    name: str
    address: str
    """Its IP address; every port there is free."""
    _holder: _Holder
    _rules: dict[tuple[str, str], str] = field(default_factory=dict)
    """By (address of the sender, kind of the rule): what happens to packets that arrive."""

    @property
    def prefix(self) -> list[str]:
        """What to put before a command to have it run in there, in the same process."""
        return self._holder.prefix

    def _load(self) -> None:
        """Put the rules into the kernel, all at once."""
        rules = "\n".join(self._rules.values())
        chain = f"chain arriving {{\ntype filter hook input priority 0; policy accept;\n{rules}\n}}"
        self._holder.run(["nft", "-f", "-"], f"flush ruleset\ntable inet kvrep {{\n{chain}\n}}\n")


class Namespaces:
    """Namespaces by name, all on one bridge. Use it in a ``with`` block, or call :meth:`close`.

    Raises :class:`NotPrivileged` where they cannot be made.
    """

    def __init__(self) -> None:
        reason = why_not()
        if reason:
            raise NotPrivileged(reason)
        self._spaces: dict[str, Namespace] = {}
        self._cable = ""
        """The interface in this process's own namespace."""
        self._hub = _Holder()
        try:
            self._hub.ip(f"link add {BRIDGE} type bridge", f"link set {BRIDGE} up")
            self._subnet = self._claim()
            self.address = f"{self._subnet}.{_HERE}"
            """This process's own address, as nodes see it."""
            _run(["ip", "addr", "add", f"{self.address}/24", "dev", self._cable])
            _run(["ip", "link", "set", self._cable, "up"])
            self._hub.ip(f"link set here master {BRIDGE} up")
        except OSError as error:
            self.close()
            raise NotPrivileged(f"network namespaces cannot be joined here: {error}") from None
        except BaseException:
            self.close()
            raise

    def _claim(self) -> str:
        """Lay the cable between this process and the bridge; the first three numbers of a free subnet.

        198.18.0.0/15 is set aside for tests of networks. The kernel refuses a second interface of the same
        name, so two processes cannot take the same subnet.
        """
        error: OSError | None = None
        for number in random.sample(range(256), 32):
            name = f"kvrep{number}"
            try:
                _run(["ip", "link", "add", name, "type", "veth", "peer", "name", "here",
                      "netns", str(self._hub.pid)])  # fmt: skip
            except OSError as refused:
                error = refused
                continue
            self._cable = name
            return f"198.18.{number}"
        raise error or OSError("no free subnet")

    def add(self, name: str) -> Namespace:
        """A new namespace for the node ``name``, with nothing cut."""
        if name in self._spaces:
            raise ValueError(f"there is a namespace {name!r} already")
        number = len(self._spaces) + 1
        if number > NODES_MAX:
            raise ValueError(f"at most {NODES_MAX} nodes")
        space = Namespace(name, f"{self._subnet}.{number}", _Holder())
        self._spaces[name] = space
        _run(["ip", "link", "add", "eth0", "netns", str(space._holder.pid), "type", "veth",
              "peer", "name", f"node{number}", "netns", str(self._hub.pid)])  # fmt: skip
        self._hub.ip(f"link set node{number} master {BRIDGE} up")
        space._holder.ip("link set lo up", f"addr add {space.address}/24 dev eth0", "link set eth0 up")
        return space

    # -- rules: all of what ``start`` sends to ``end`` ---------------------------------------------

    def drop(self, start: str, end: str) -> None:
        """Lose every packet, silently."""
        self._rule(start, end, "drop", "drop")

    def reject(self, start: str, end: str) -> None:
        """Answer every packet by RST, as a firewall does: connections break, new ones are refused.

        Such an RST passes itself even where both ways are rejected.
        """
        self._rule(start, end, "drop", "tcp flags & rst == 0 reject with tcp reset")

    def lose(self, start: str, end: str, percent: int) -> None:
        """Lose so many of 100 packets, at random."""
        if not 0 <= percent <= 100:
            raise ValueError(f"a percentage is 0 to 100, not {percent}")
        self._rule(start, end, "lose", f"numgen random mod 100 < {percent} drop")

    def throttle(self, start: str, end: str, bytes_per_s: float) -> None:
        """Lose packets above this rate, as a thin line does. About a second's worth may pass at once."""
        rate = max(1, round(bytes_per_s))
        # A burst takes in one packet at the least, however large the kernel makes it.
        burst = max(rate // 8, 128 << 10)
        self._rule(start, end, "rate", f"limit rate over {rate} bytes/second burst {burst} bytes drop")

    def heal(self, start: str, end: str) -> None:
        """Forget every rule on what ``start`` sends to ``end``."""
        sender, space = self._spaces[start].address, self._spaces[end]
        kept = {key: rule for key, rule in space._rules.items() if key[0] != sender}
        if kept != space._rules:
            space._rules = kept
            space._load()

    def _rule(self, start: str, end: str, kind: str, what: str) -> None:
        sender, space = self._spaces[start].address, self._spaces[end]
        space._rules[sender, kind] = f"ip saddr {sender} {what}"
        space._load()

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Take everything back. Processes that still run in a namespace keep it, without a cable. Idempotent."""
        cable, self._cable = self._cable, ""
        try:
            if cable:
                _run(["ip", "link", "del", cable])
        finally:
            for space in self._spaces.values():
                space._holder.close()
            self._hub.close()

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
