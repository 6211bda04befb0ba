"""Memory that was freed, given back to the system.

glibc keeps freed pieces below its mmap threshold in its heaps, and raises that threshold (up to 32 MiB) whenever a larger piece is freed:
after a block, hidden states of a few MiB lie scattered in pages that count as resident but hold nothing. One call per block brings
them back; it takes milliseconds, a block takes seconds to minutes.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

__all__ = ["trim_heap"]

_malloc_trim: Callable[[int], int] | None
try:
    _malloc_trim = ctypes.CDLL(None).malloc_trim
except (AttributeError, OSError, TypeError):  # musl, macOS, Windows: their allocators have no such call
    _malloc_trim = None


def trim_heap() -> None:
    """Return the heap's free pages to the system, where the C library can (glibc)."""
    gc.collect()
    if _malloc_trim is not None:
        _malloc_trim(0)
