"""The generated messages on the protobuf runtime that is installed (see `make protobuf-matrix`)."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

import kvrep._pb

NESTING_MAX = 4

INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: 2**31 - 1,
    FieldDescriptor.CPPTYPE_INT64: 2**63 - 1,
    FieldDescriptor.CPPTYPE_UINT32: 2**32 - 1,
    FieldDescriptor.CPPTYPE_UINT64: 2**64 - 1,
}


def generated_modules() -> list[ModuleType]:
    found = [info.name for info in pkgutil.iter_modules(kvrep._pb.__path__, "kvrep._pb.")]
    return [importlib.import_module(name) for name in found if name.endswith("_pb2")]


def classes_in(owner: Any, types_by_name: dict[str, Descriptor]) -> Iterator[type[Message]]:
    """Yield every message class below a module or a message class, map entries left out."""
    for name, descriptor in types_by_name.items():
        if not descriptor.GetOptions().map_entry:
            yield getattr(owner, name)
            yield from classes_in(getattr(owner, name), descriptor.nested_types_by_name)


MESSAGES = [
    message
    for module in generated_modules()
    for message in classes_in(module, module.DESCRIPTOR.message_types_by_name)
]


def scalar(field: FieldDescriptor) -> Any:
    """Return a value that is not the default, at the upper limit where there is one."""
    if field.type == FieldDescriptor.TYPE_BYTES:
        return b"\x00\xff bytes"
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return "text \N{SNOWMAN}"
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return field.enum_type.values[-1].number
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return True
    return INTEGERS.get(field.cpp_type, 0.5)


def set_field(message: Message, field: FieldDescriptor, nesting: int) -> None:
    """Give one field, of whatever shape, a value that survives only if it is carried."""
    value = getattr(message, field.name)
    if field.message_type is None:
        if hasattr(value, "extend"):
            value.extend([scalar(field)] * 2)
        else:
            setattr(message, field.name, scalar(field))
    elif field.message_type.GetOptions().map_entry:
        key, held = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        if held.message_type is None:
            value[scalar(key)] = scalar(held)
        else:
            fill(value[scalar(key)], nesting + 1)
    elif hasattr(value, "add"):
        fill(value.add(), nesting + 1)
    else:
        value.SetInParent()
        fill(value, nesting + 1)


def fill(message: Message, nesting: int = 0) -> None:
    if nesting < NESTING_MAX:
        for field in message.DESCRIPTOR.fields:
            set_field(message, field, nesting)


def test_there_are_generated_messages() -> None:
    """The discovery of messages finds some, so the tests below are not empty."""
    assert MESSAGES


@pytest.mark.parametrize("message_class", MESSAGES, ids=lambda cls: cls.DESCRIPTOR.full_name)
def test_a_filled_message_survives_a_round_trip(message_class: type[Message]) -> None:
    """A message with every field set is the same message after being serialized and parsed."""
    message = message_class()
    fill(message)

    parsed = message_class.FromString(message.SerializeToString())

    assert parsed == message
    assert {field.name for field, _ in parsed.ListFields()} == {
        field.name for field, _ in message.ListFields()
    }


@pytest.mark.parametrize("message_class", MESSAGES, ids=lambda cls: cls.DESCRIPTOR.full_name)
def test_every_field_survives_alone(message_class: type[Message]) -> None:
    """Each field is carried without the others, which also reaches every arm of a oneof."""
    for field in message_class.DESCRIPTOR.fields:
        message = message_class()
        set_field(message, field, nesting=0)

        parsed = message_class.FromString(message.SerializeToString())

        assert [carried.name for carried, _ in parsed.ListFields()] == [field.name]
        assert parsed == message
