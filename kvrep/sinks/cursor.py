"""Where a publication keeps its place when the store itself does not: one small file, replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Protocol

from kvrep.errors import NotAStore

__all__ = ["Cursor", "FileCursor"]


class Cursor(Protocol):
    """A token that survives the process."""

    def load(self) -> str:
        """The token that was saved last; empty when none was."""

    def save(self, token: str) -> None:
        """Durably, when it returns."""


class FileCursor:
    """A cursor in a file; its folder is made if missing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def load(self) -> str:
        try:
            found = json.loads(self._path.read_text())
            token = found["token"]
            if not isinstance(token, str):
                raise TypeError("the token is no text")
        except FileNotFoundError:
            return ""
        except (ValueError, KeyError, TypeError) as error:
            raise NotAStore(
                f"{self._path} does not hold a place: {error}", path=str(self._path),
                hint="move the file away to begin anew with a snapshot",
            ) from error  # fmt: skip
        return token

    def save(self, token: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("w") as file:
            json.dump({"token": token}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
