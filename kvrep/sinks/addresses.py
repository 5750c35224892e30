"""Sources and secondaries by their addresses.

==================================  ==================================================================
``amqp://…``, ``kafka://…``          a broker: events of one topic (see :mod:`kvrep.brokers`)
``host:port,…``                      running nodes of one group: their feed, or (as a secondary) what its primary
                                     holds, found through any of them
a path                               a store that no process has open; as a secondary ``kvrep:PATH``
``postgresql://…?schema=kvrep``      a schema of a PostgreSQL database
``sqlite:PATH``, ``sqlite:///PATH``  a SQLite file
``delta:PATH``, ``delta:///PATH``    a folder of Delta tables; ``delta+s3://…`` and the like for what deltalake reaches
==================================  ==================================================================

Packages add secondaries by an entry point of the group ``kvrep.sinks``: its name is the scheme, its object is
called with the address and ``tables=``, and returns a :class:`~kvrep.sinks.interface.Sink`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Unpack

from kvrep import brokers
from kvrep.errors import ConfigurationMismatch, OpenError
from kvrep.sinks.interface import Sink
from kvrep.sinks.source import Source
from kvrep.sinks.tables import Table
from kvrep.sinks.upstream import Local, Remote, Upstream, Wanted

__all__ = ["is_broker", "sink_at", "source_at", "upstream_at"]

ENTRY_POINTS = "kvrep.sinks"
_BROKERS = ("amqp", "amqps", "amqp+stream", "amqps+stream", "kafka", "kafkas", "memory")


def _scheme(address: str) -> str:
    head, colon, rest = address.partition(":")
    return (
        head.lower()
        if colon and (rest.startswith("/") or head.lower() in ("sqlite", "kvrep", "delta"))
        else ""
    )


def is_broker(address: str) -> bool:
    """Whether an address is a broker's, by its scheme."""
    scheme = _scheme(address)
    return scheme in _BROKERS or bool(scheme and entry_points(group=brokers.ENTRY_POINTS, name=scheme))


def _are_nodes(addresses: str) -> bool:
    return all(map(_is_node, addresses.split(",")))


def _is_node(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return (
        bool(host)
        and "/" not in address
        and port.isascii()
        and port.isdecimal()
        and not Path(address).exists()
    )


def sink_at(
    address: str,
    *,
    tables: Mapping[str, Table] | None = None,
    tls: Any = None,
    token: str | None = None,
) -> Sink:
    """The secondary at ``address``, not yet connected. ``OpenError`` for what is not understood."""
    scheme = _scheme(address)
    if scheme in ("postgresql", "postgres"):
        from kvrep.sinks.postgres import PostgresSink

        return PostgresSink(address, tables=tables)
    if scheme == "sqlite":
        from kvrep.sinks.sqlite import SqliteSink

        return SqliteSink(_path(address), tables=tables)
    if scheme == "delta" or scheme.startswith("delta+"):
        from kvrep.sinks.warehouse import WarehouseSink

        return WarehouseSink(address, tables=tables)
    if scheme in ("", "kvrep"):
        if tables:
            raise ConfigurationMismatch(
                "tables are for PostgreSQL and SQLite databases and for warehouses",
                option="table",
                given=sorted(tables),
            )
        return _store_at(address.removeprefix("kvrep:").removeprefix("//"), tls, token)
    for point in entry_points(group=ENTRY_POINTS, name=scheme):
        made: Sink = point.load()(address, tables=tables)
        return made
    raise OpenError(
        f"no secondary is known for {scheme}:",
        hint=f"known are postgresql://, sqlite:, delta:, kvrep: and what packages add as entry points {ENTRY_POINTS!r}",
    )


def _path(address: str) -> str:
    """``sqlite:PATH``, ``sqlite:///PATH`` (absolute)."""
    rest = address.partition(":")[2]
    return rest.removeprefix("//") if rest.startswith("//") else rest


def _store_at(address: str, tls: Any, token: str | None) -> Sink:
    from kvrep.sinks.store import LocalStore, RemoteStore, StoreSink

    if _are_nodes(address):
        return StoreSink(f"kvrep://{address}", lambda **_: RemoteStore(address, tls=tls, token=token))
    if not address:
        raise OpenError("kvrep: needs a path or host:port")
    return StoreSink(f"kvrep:{address}", lambda **options: LocalStore(address, **options))


def upstream_at(address: str, *, feed: str = "", tls: Any = None, token: str | None = None) -> Upstream:
    """The store at an address or path, connected or opened; one of a group is not opened alone."""
    address = address.removeprefix("kvrep:").removeprefix("//")
    if _are_nodes(address):
        return Remote(address, tls=tls, token=token)
    import kvrep
    from kvrep.runtime.offline import check_alone

    if "://" in address:
        raise OpenError(f"{address.partition(':')[0]}:// is nothing to read changes from")
    check_alone(address)
    return Local(kvrep.open(address, create=False), feed=feed, close_store=True)


def source_at(
    address: str,
    *,
    topic: str = "",
    group: str = "agent",
    feed: str = "",
    tls: Any = None,
    token: str | None = None,
    **selection: Unpack[Wanted],
) -> Source:
    """A broker's topic, a running node's feed, or that of a store at a path."""
    if is_broker(address):
        from kvrep.sinks.broker import BrokerSource

        if any(selection.values()):
            raise ConfigurationMismatch(
                "what a stream shows is chosen where it is published", option="keyspace", given=selection
            )
        return BrokerSource(brokers.connect(address), topic=topic, group=group)
    from kvrep.sinks.feed import FeedSource

    return FeedSource(upstream_at(address, feed=feed, tls=tls, token=token), **selection)
