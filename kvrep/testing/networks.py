"""The networks of a test cluster, and their faults: links of a proxy, or network namespaces.

With the proxy every pair of nodes has a link of its own in each direction of connecting, so what passes
between any two can be cut, delayed or damaged. With namespaces nodes talk directly, and the kernel loses,
rejects or throttles packets. Nodes know each other by addresses that stay the same when they are restarted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvrep.testing.namespaces import Namespaces
from kvrep.testing.nodes import sockets_of, tcp_sockets
from kvrep.testing.proxy import Direction, Link, Proxy

__all__ = ["Fault", "Network", "PacketNetwork", "Place", "ProxyNetwork"]

PORT = 7400
"""Of nodes in namespaces, where every port is free."""

Fault = Callable[[str, str], None]
"""Does something to all that one node (by name) sends to another."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node is to live."""

    options: dict[str, Any]
    """What to open its store with, to be reached there."""
    prefix: Sequence[str] = ()
    """What goes before the command of its process."""


class Network(ABC):
    """Makes places for nodes and faults between them. A fault that it does not know is a ``ValueError``."""

    def __init__(self) -> None:
        self.advertised: dict[str, str] = {}
        """By what address others know each node."""

    @abstractmethod
    def add(self, name: str) -> Place:
        """A place for a new node."""

    @abstractmethod
    def lose(self) -> Fault:
        """Everything is lost, silently."""

    @abstractmethod
    def throttle(self, bytes_per_s: float) -> Fault: ...

    @abstractmethod
    def heal(self, start: str, end: str) -> None:
        """End every fault of what ``start`` sends to ``end``."""

    @abstractmethod
    def close(self) -> None: ...

    # What only a network of packets can do.

    def reject(self) -> Fault:
        """Everything is answered by RST."""
        raise ValueError("rejected: needs a cluster made with namespaces=True")

    # What only a proxy can do.

    def delay(self, seconds: float, jitter_s: float) -> Fault:
        """Everything arrives later, by a time and a random addition."""
        raise _needs_proxy(f"delay({seconds:g}, jitter_s={jitter_s:g})")

    def corrupt(self, bits: int) -> Fault:
        """One bit is flipped in each of the next ``bits`` chunks."""
        raise _needs_proxy(f"corrupt({bits})")

    def link(self, start: str, end: str) -> Link:
        """The link over which ``start`` connects to ``end``."""
        raise _needs_proxy(f"the link {start}-{end}")

    # What happens to nodes: only a proxy has to know.

    def route(self, name: str, address: str) -> str:
        """The address by which ``name``, in this process, reaches who advertises ``address``."""
        del name
        return address

    def started(self, name: str, address: str) -> None:
        """The node listens at ``address`` now."""
        del name, address

    def ended(self, name: str) -> None:
        """The node is about to end: connections from and to it break."""
        del name

    def freeze(self, name: str) -> None:
        """Nothing passes from and to the node; nothing is lost."""
        del name

    def thaw(self, name: str) -> None:
        """The end of :meth:`freeze`."""
        del name


def _needs_proxy(what: str) -> ValueError:
    return ValueError(f"{what}: needs the proxy, which a cluster made with namespaces=True has not")


class PacketNetwork(Network):
    """Network namespaces (needs root) on one bridge."""

    def __init__(self) -> None:
        super().__init__()
        self._spaces = Namespaces()

    def add(self, name: str) -> Place:
        space = self._spaces.add(name)
        address = self.advertised[name] = f"{space.address}:{PORT}"
        return Place({"listen": address}, space.prefix)

    def lose(self) -> Fault:
        return self._spaces.drop

    def reject(self) -> Fault:
        return self._spaces.reject

    def throttle(self, bytes_per_s: float) -> Fault:
        return lambda start, end: self._spaces.throttle(start, end, bytes_per_s)

    def heal(self, start: str, end: str) -> None:
        self._spaces.heal(start, end)

    def close(self) -> None:
        self._spaces.close()


class ProxyNetwork(Network):
    """Links of one :class:`Proxy` on the loopback.

    ``pids`` gives the process ids of the running nodes by name, if they are processes: all of them connect to
    the *front* of a node, and the proxy finds out by the port whose link to take.
    """

    def __init__(self, seed: int, pids: Callable[[], dict[str, int]] | None) -> None:
        super().__init__()
        self._proxy = Proxy(seed=seed)
        self._pids = pids
        self._fronts: dict[str, Link] = {}
        self._links: dict[tuple[str, str], Link] = {}
        """(who connects, to whom)"""

    def add(self, name: str) -> Place:
        front = self._proxy.link(name=name)
        for other in self._fronts:
            self._links[name, other] = self._proxy.link(name=f"{name}-{other}")
            self._links[other, name] = self._proxy.link(name=f"{other}-{name}")
            self._links[name, other].target = self._fronts[other].target
        self._fronts[name] = front
        if self._pids is not None:
            self._proxy.classify(front, lambda port: self._link_by_port(name, port))
        self.advertised[name] = front.address
        return Place({"listen": "127.0.0.1:0", "advertise": front.address})

    def _link_by_port(self, target: str, port: int) -> Link | None:
        """The link of the process that connects to ``target`` from this port."""
        assert self._pids is not None
        inodes = {inode for local, listens, inode in tcp_sockets() if local == port and not listens}
        for name, pid in self._pids().items():
            if name != target and inodes & sockets_of(pid):
                return self._links[name, target]
        return None

    def route(self, name: str, address: str) -> str:
        for other, front in self._fronts.items():
            if front.address == address and other != name:
                return self._links[name, other].address
        return address

    def link(self, start: str, end: str) -> Link:
        return self._links[start, end]

    def _links_of(self, name: str) -> Iterator[Link]:
        return (link for pair, link in self._links.items() if name in pair)

    # -- what happens to nodes ---------------------------------------------------------------------

    def started(self, name: str, address: str) -> None:
        self._fronts[name].target = address
        for (_, to), link in self._links.items():
            if to == name:
                link.target = address

    def ended(self, name: str) -> None:
        self.thaw(name)
        self.started(name, "")
        for link in self._links_of(name):
            link.reset()

    def freeze(self, name: str) -> None:
        for link in self._links_of(name):
            link.pause()

    def thaw(self, name: str) -> None:
        for link in self._links_of(name):
            link.resume()

    # -- faults ------------------------------------------------------------------------------------

    def _rule(self, rule: Callable[[Link, Direction], None]) -> Fault:
        """A fault by a rule for what carries bytes: a link on the way up, the opposite one on the way down."""

        def fault(start: str, end: str) -> None:
            rule(self._links[start, end], "up")
            rule(self._links[end, start], "down")

        return fault

    def lose(self) -> Fault:
        return self._rule(Link.drop)

    def throttle(self, bytes_per_s: float) -> Fault:
        return self._rule(lambda link, direction: link.throttle(bytes_per_s, direction))

    def delay(self, seconds: float, jitter_s: float) -> Fault:
        return self._rule(lambda link, direction: link.delay(seconds, jitter_s, direction))

    def corrupt(self, bits: int) -> Fault:
        return self._rule(lambda link, direction: link.corrupt(bits, direction))

    def heal(self, start: str, end: str) -> None:
        self._links[start, end].heal()

    def close(self) -> None:
        self._proxy.close()
