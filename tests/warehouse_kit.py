"""What the tests of warehouses share: the same question asked with DuckDB, which knows nothing of kvrep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

EAGER = "?commit_s=0&refresh_s=0"
"""Options with which everything is done at once."""


def need_warehouse() -> None:
    """Skip the module where the packages are not installed."""
    for name in ("pyarrow", "deltalake", "duckdb"):
        pytest.importorskip(name, reason=f"{name} is not installed")


def files_of(table: Path) -> list[str]:
    """The Parquet files that are part of a Delta table now."""
    from deltalake import DeltaTable

    return sorted(DeltaTable(str(table)).file_uris())


def ask(folder: Path, question: str) -> list[tuple[Any, ...]]:
    """Put a question in SQL to a warehouse: ``history`` and every ``current_KEYSPACE`` are tables of it."""
    import duckdb

    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        tables = {"history": folder / "history"}
        tables |= {f"current_{path.name}": path for path in sorted(folder.glob("current/*"))}
        for name, path in tables.items():
            files = files_of(path)
            if files:
                connection.execute(f'CREATE VIEW "{name}" AS SELECT * FROM read_parquet({files!r})')
            else:
                connection.execute(f'CREATE TABLE "{name}" (key BLOB, value BLOB)')
        return connection.execute(question).fetchall()


def current(folder: Path) -> dict[str, dict[bytes, bytes]]:
    """What the tables of the current state hold, without empty ones; every key stands there once."""
    found = {}
    for path in sorted(folder.glob("current/*")):
        rows = ask(folder, f'SELECT key, value FROM "current_{path.name}"')
        assert len(dict(rows)) == len(rows), f"{path.name}: a key stands there twice"
        if rows:
            found[path.name] = dict(rows)
    return found


def replayed(folder: Path) -> dict[str, dict[bytes, bytes]]:
    """What the history adds up to."""
    rows = ask(
        folder,
        "SELECT keyspace, key, value FROM history"
        " WHERE number > coalesce((SELECT max(number) FROM history WHERE op = 'clear'), 0)"
        " QUALIFY row_number() OVER (PARTITION BY keyspace, key ORDER BY number DESC) = 1 AND op = 'put'",
    )
    found: dict[str, dict[bytes, bytes]] = {}
    for keyspace, key, value in rows:
        found.setdefault(keyspace, {})[key] = value
    return found
