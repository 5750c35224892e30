"""How large messages are, and how large they may be."""

from __future__ import annotations

from kvrep.brokers.interface import Message
from kvrep.errors import ValueTooLarge

__all__ = ["MESSAGE_OVERHEAD_BYTES", "check_message", "message_bytes"]

MESSAGE_OVERHEAD_BYTES = 256
"""What a message is counted for besides its content: objects, frames, headers."""


def message_bytes(message: Message) -> int:
    """What ``message`` costs in a buffer."""
    size = len(message.body) + len(message.key) + len(message.id) + MESSAGE_OVERHEAD_BYTES
    if message.headers:
        size += sum(len(name) + len(value) for name, value in message.headers.items())
    return size


def check_message(message: Message, bytes_max: int) -> int:
    """The same, or ``ValueTooLarge`` when it can never fit; ``TypeError`` when it holds something else."""
    if type(message.body) is not bytes or type(message.key) is not bytes:
        raise TypeError("a message's body and key are bytes")
    size = message_bytes(message)
    if size > bytes_max:
        raise ValueTooLarge(f"a message of {size} bytes is above the buffer of {bytes_max}")
    return size
