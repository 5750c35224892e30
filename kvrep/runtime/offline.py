"""A store on disk that no process has open, without a role: looked at before anybody opens it as a node."""

from __future__ import annotations

from pathlib import Path

from kvrep.errors import NotAStore, NotPrimary, StoreInUse
from kvrep.options import Options
from kvrep.storage.engine import Engine

__all__ = ["CLOSE_S", "check_alone", "has_peers", "open_engine"]

CLOSE_S = 30.0


def open_engine(path: str) -> Engine:
    """The store at ``path``; reading it begins no epoch. ``NotAStore`` or ``StoreInUse``, each with a hint."""
    if not (Path(path) / "STORE").is_file():
        raise NotAStore(f"there is no store at {path}", path=path, hint="check the path")
    try:
        return Engine.open(Path(path), Options(create=False), lineage=b"")
    except StoreInUse as error:
        error.hint = "ask the node that has it open, by its address"
        raise


def check_alone(path: str) -> None:
    """Refuse a store that belongs to a group: opened alone it would take itself for the primary."""
    engine = open_engine(path)
    try:
        if has_peers(engine):
            raise NotPrimary(
                f"the store at {path} belongs to a group of nodes, so it is not written alone",
                hint="start it with 'kvrep serve' and write to the primary's address",
                primary_address=None,
                epoch=None,
            )
    finally:
        engine.close(CLOSE_S)


def has_peers(engine: Engine) -> bool:
    """Whether somebody else may have a say in what this store holds."""
    configuration = engine.configuration
    if not configuration.voters:
        return not engine.home.lineage  # empty: either new, or a follower that has not joined yet
    others = [voter for voter in configuration.voters if voter.store_id != engine.home.store_id]
    return bool(others) or configuration.synchronous
