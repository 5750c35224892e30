"""Memory that is free goes back to the system: for a command that handles large pieces all its life."""

from __future__ import annotations

import os

__all__ = ["be_frugal"]

_SETTINGS = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "_RJEM_MALLOC_CONF": "narenas:1,dirty_decay_ms:0,muzzy_decay_ms:0",
    "TOKIO_WORKER_THREADS": "2",
}
"""Of pyarrow and deltalake, which look at it when they are loaded."""
_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": (-3, 64 << 10), "MALLOC_TRIM_THRESHOLD_": (-1, 128 << 10)}
"""Of glibc: the variable that sets one, its number for mallopt, and bytes."""


def be_frugal() -> None:
    """For this process, before pyarrow and deltalake are loaded. What its environment says already stays so.

    glibc keeps large blocks that were freed for later, as soon as it has seen some; a value of 100 KB then leaves a
    hole in one of its arenas. With fixed thresholds every large block is the system's again when it is freed.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for name, (number, threshold) in _THRESHOLDS.items():
        if name not in os.environ:
            mallopt(number, threshold)
