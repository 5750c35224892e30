"""The documents point at things that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page leads to a file of the project."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())

    missing = [link for link in links if not (page.parent / link).exists()]

    assert not missing


def test_modules_that_the_architecture_names_exist() -> None:
    """The modules that docs/architecture.md tells people to read are there."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", text)

    assert len(named) > 8
    assert [path for path in named if not (ROOT / "kvrep" / path).exists()] == []


def test_layers_stand_in_the_order_that_is_checked() -> None:
    """docs/architecture.md and CONTRIBUTING.md show the layers from the top down as pyproject.toml has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["id"] == "layers"]
    place = {name: at for at, line in enumerate(layers) for name in re.findall(r"\w+", line)}
    table = re.search(
        r"^\| layer \|.*?\n\n", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE | re.DOTALL
    )
    chain = re.search(r"```\n(cli \| .*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert table is not None
    assert chain is not None
    rows = [re.findall(r"`(\w+)`", row.split("|")[0]) for row in table[0].split("\n|")[2:]]

    for named in ([name for row in rows for name in row], re.findall(r"\w+", chain[1])):
        assert set(place) - {"__main__"} == set(named)
        assert [place[name] for name in named] == sorted(place[name] for name in named)
