"""What `import kvrep` offers is written down once, and is what it says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

import kvrep
from kvrep import errors
from kvrep.options import OpenOptions, Options


def test_all_names_exist() -> None:
    """Every name of __all__ can be had, and stands there once."""
    for name in kvrep.__all__:
        assert getattr(kvrep, name) is not None
    assert len(kvrep.__all__) == len(set(kvrep.__all__))


def test_every_error_is_public() -> None:
    """Every exception class of errors.py is exported, and drawn in the tree at its top."""
    classes = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.Error)}

    assert classes == set(errors.__all__)
    assert classes <= set(kvrep.__all__)
    for name in classes:
        assert name in (errors.__doc__ or "")


def test_open_options_are_the_fields_of_options() -> None:
    """The keyword arguments that a type checker sees are those that open() takes."""
    assert set(OpenOptions.__annotations__) == {f.name for f in fields(Options)}


def test_import_is_light() -> None:
    """`import kvrep` starts no thread and imports neither grpc nor asyncio."""
    code = (
        "import sys, threading, kvrep\n"
        "assert threading.active_count() == 1\n"
        "heavy = {'grpc', 'asyncio', 'google.protobuf', 'zstandard', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )

    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", sorted(kvrep.errors.__all__))
def test_every_error_says_what_to_do_next(name: str) -> None:
    """Each kind that is raised as such has a hint; a closed store needs none."""
    kind = getattr(kvrep.errors, name)
    if any(sub.__name__ in kvrep.errors.__all__ for sub in kind.__subclasses__()):
        return
    assert kind.hint
    assert kind.hint in str(kind("what happened"))


def test_errors_survive_pickling() -> None:
    """An error that crosses a process boundary keeps its fields, its hint and its text."""
    import pickle

    error = kvrep.AckTimeout("late", position=kvrep.Position(1001, 7), reached=1, needed=2)

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is kvrep.AckTimeout
    assert (copy.position, copy.reached, copy.needed) == (kvrep.Position(1001, 7), 1, 2)
    assert str(copy) == str(error)
