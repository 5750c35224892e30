"""Other packages add brokers and secondaries: found by what their installation says, used by their scheme."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import kvrep
from kvrep import brokers
from kvrep.sinks.addresses import is_broker, sink_at, source_at
from kvrep.sinks.tables import Table

MODULE = """
from kvrep.brokers.memory import MemoryBrokers, connect as memory
from kvrep.sinks.memory import MemorySink

def broker(url, **options):
    made = memory(url, brokers=MemoryBrokers(), **options)
    made.found_as = url.scheme
    return made

def sink(address, *, tables=None):
    made = MemorySink()
    made.url, made.tables = address, tables
    return made
"""
POINTS = "[kvrep.brokers]\nacme-bus = acme_kvrep:broker\n[kvrep.sinks]\nacme = acme_kvrep:sink\n"


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package as pip leaves it: a module, and metadata with entry points."""
    (tmp_path / "acme_kvrep.py").write_text(MODULE)
    info = tmp_path / "acme_kvrep-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-kvrep\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "acme_kvrep", raising=False)


def test_a_broker_of_another_package() -> None:
    """Its scheme is a broker's, and an address with it leads to what the package makes."""
    assert is_broker("acme-bus://host/topic")
    broker = brokers.connect("acme-bus://host/orders")
    assert (broker.found_as, broker.topic) == ("acme-bus", "orders")  # type: ignore[attr-defined]
    source = source_at("acme-bus://host/orders")
    assert type(source).__name__ == "BrokerSource"
    source.end()
    broker.close()
    assert not is_broker("acme-other://host/orders")
    with pytest.raises(kvrep.OpenError, match="acme-other"):
        brokers.connect("acme-other://host/orders")


def test_a_secondary_of_another_package() -> None:
    """It is given the address and the tables; an unknown scheme names what would be looked at."""
    sink = sink_at("acme://host/x", tables={"orders": Table()})
    assert sink.url == "acme://host/x"
    assert list(sink.tables) == ["orders"]  # type: ignore[attr-defined]
    with pytest.raises(kvrep.OpenError, match=r"kvrep\.sinks"):
        sink_at("acme2://host/x")
