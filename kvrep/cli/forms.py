"""Keys and values as text: on the command line, on a terminal, and in JSON lines."""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from kvrep.cli.exits import UsageError

__all__ = ["BASE64", "HEX", "TEXT", "Form", "add_form", "form_of", "pair_from_json", "pair_to_json"]


class Form(NamedTuple):
    """A way to write bytes as text. ``decode`` raises :class:`UsageError`."""

    name: str
    encode: Callable[[bytes], str]
    decode: Callable[[str], bytes]


def _unhex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise UsageError(
            f"{_short(text)} is not hexadecimal", hint="two digits 0-9 a-f for each byte"
        ) from None


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{_short(text)} is not base64") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def visible(data: bytes) -> str:
    """Any bytes as one line of text: control characters, backslashes and what is no UTF-8 as escapes."""
    text = (
        data.decode("utf-8", errors="backslashreplace") if b"\\" not in data else _escaped_backslashes(data)
    )
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _escaped_backslashes(data: bytes) -> str:
    return data.replace(b"\\", b"\\\\").decode("utf-8", errors="backslashreplace")


TEXT = Form("text", visible, os.fsencode)
HEX = Form("hex", bytes.hex, _unhex)
BASE64 = Form("base64", lambda data: base64.b64encode(data).decode(), _unbase64)


def add_form(parser: argparse.ArgumentParser, what: str) -> None:
    """The flags ``--hex`` and ``--base64``."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--hex", dest="form", action="store_const", const=HEX, default=TEXT,
                        help=f"{what} as hexadecimal")  # fmt: skip
    either.add_argument("--base64", dest="form", action="store_const", const=BASE64, help=f"{what} as base64")


def form_of(args: argparse.Namespace) -> Form:
    form: Form = args.form
    return form


def pair_to_json(
    key: bytes, value: bytes, *, keyspace: str | None = None, always_base64: bool = False
) -> str:
    """One JSON line: ``key`` and ``value``, or ``key_base64`` and ``value_base64`` where they are no text."""
    fields: dict[str, str] = {} if keyspace is None else {"keyspace": keyspace}
    for name, data in (("key", key), ("value", value)):
        try:
            if always_base64:
                raise UnicodeDecodeError("utf-8", data, 0, 1, "")
            fields[name] = data.decode("utf-8")
        except UnicodeDecodeError:
            fields[f"{name}_base64"] = BASE64.encode(data)
    return json.dumps(fields, ensure_ascii=False)


def pair_from_json(line: str | bytes, *, is_base64: bool = False) -> tuple[str | None, bytes, bytes]:
    """(keyspace or ``None``, key, value) of a JSON line; :class:`UsageError` when it is something else."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UsageError('not an object {"key": …, "value": …}')
    known = {"keyspace", "key", "value", "key_base64", "value_base64"}
    if unknown := sorted(fields.keys() - known):
        raise UsageError(f"unknown field {unknown[0]!r}", hint=f"known are {', '.join(sorted(known))}")
    if "keyspace" in fields and not isinstance(fields["keyspace"], str):
        raise UsageError("keyspace must be text")
    return fields.get("keyspace"), _field(fields, "key", is_base64), _field(fields, "value", is_base64)


def _field(fields: dict[str, Any], name: str, is_base64: bool) -> bytes:
    if (name in fields) == (f"{name}_base64" in fields):
        raise UsageError(f"exactly one of {name!r} and '{name}_base64' is needed")
    encoded = name not in fields
    text = fields[f"{name}_base64" if encoded else name]
    if not isinstance(text, str):
        raise UsageError(f"{name} must be text, not {type(text).__name__}")
    if encoded or is_base64:
        return BASE64.decode(text)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{name} is not valid text") from None
