"""Optional zstd for segments: Python's own where it has one, else the ``zstandard`` package."""

from __future__ import annotations

import sys
from collections.abc import Callable

from kvrep.errors import OpenError, ProtocolError

__all__ = ["compressor", "decompressor", "have_zstd", "need_zstd"]


def have_zstd() -> bool:
    """Whether zstd can be had here."""
    try:
        _module()
    except ImportError:
        return False
    return True


def need_zstd() -> None:
    """Raise ``OpenError`` with the remedy unless zstd can be had."""
    if not have_zstd():
        raise OpenError('compression="zstd" needs a package', hint="pip install kvrep[zstd]")


def _module() -> object:
    if sys.version_info >= (3, 14):
        import compression.zstd as module
    else:
        import zstandard as module
    return module


def compressor() -> Callable[[bytes], bytes]:
    """A function that compresses one segment at a time."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return lambda data: zstd.compress(data, level=1)
    import zstandard

    return zstandard.ZstdCompressor(level=1).compress


def decompressor(bytes_max: int) -> Callable[[bytes], bytes]:
    """A function that undoes it; ``ProtocolError`` for bad data or more than ``bytes_max`` bytes."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        def decompress(data: bytes) -> bytes:
            engine = zstd.ZstdDecompressor()
            try:
                out: bytes = engine.decompress(data, bytes_max + 1)
            except zstd.ZstdError as error:
                raise ProtocolError(f"a segment does not decompress: {error}") from error
            return _checked(out, bytes_max)

        return decompress
    import zstandard

    context = zstandard.ZstdDecompressor()

    def decompress_package(data: bytes) -> bytes:
        try:
            size = zstandard.frame_content_size(data)
            if not 0 <= size <= bytes_max:
                raise ProtocolError(f"a segment would decompress to {size} bytes")
            return _checked(context.decompress(data, max_output_size=bytes_max), bytes_max)
        except zstandard.ZstdError as error:
            raise ProtocolError(f"a segment does not decompress: {error}") from error

    return decompress_package


def _checked(data: bytes, bytes_max: int) -> bytes:
    if len(data) > bytes_max:
        raise ProtocolError(f"a segment decompresses to more than {bytes_max} bytes")
    return data
