"""Freed memory goes back to the system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbit.walk import heap

_STATM = Path("/proc/self/statm")


def _resident_pages() -> int:
    return int(_STATM.read_text(encoding="ascii").split()[1])


@pytest.mark.skipif(heap._malloc_trim is None or not _STATM.exists(), reason="only glibc on Linux returns pages on demand")
def test_scattered_pieces_are_returned() -> None:
    pieces = [torch.ones(15_000) for _ in range(4_000)]  # 60 kB each, below the mmap threshold: 240 MB of heap
    pins = pieces[::500]  # what is still held keeps the heap's top from sinking by itself
    del pieces
    before = _resident_pages()
    heap.trim_heap()
    assert before - _resident_pages() > 20_000  # pages of 4 KiB: 80 MB
    assert all(float(pin[0]) == 1 for pin in pins)
