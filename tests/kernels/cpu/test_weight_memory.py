"""The memory of packed weights: what belongs to a tile lies together, parts live on their own, pages go back."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.dlpack import from_dlpack

from fewbit import _native
from fewbit.kernels.cpu.extension import in_weight_memory


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4097, 3 << 20])
def test_memory_is_zeroed_and_aligned(size: int) -> None:
    memory = from_dlpack(_native.weight_memory(size))
    assert memory.shape == (size,) and memory.dtype == torch.uint8
    assert size == 0 or (memory.data_ptr() % 64 == 0 and not memory.any())


def test_parts_do_not_overlap_and_outlive_each_other() -> None:
    parts = [from_dlpack(_native.weight_memory(size)).fill_(i + 1) for i, size in enumerate([100, 5 << 20, 1, 64, 3 << 20])]
    first = parts.pop(0)
    for i, part in enumerate(parts):
        assert bool((part == i + 2).all())
    del parts
    gc.collect()
    assert bool((first == 1).all())


def test_freed_parts_are_no_longer_resident() -> None:
    kept = from_dlpack(_native.weight_memory(64))
    before = resident_bytes()
    part = from_dlpack(_native.weight_memory(64 << 20)).fill_(1)
    filled = resident_bytes()
    del part
    gc.collect()
    assert filled - before > 60 << 20
    assert resident_bytes() - before < 6 << 20
    assert not kept.any()


def test_a_tile_lies_together() -> None:
    scales = torch.randn(3, 5, 16, 2).bfloat16()
    zeros = torch.randint(-8, 8, (3, 5, 16), dtype=torch.int8)
    codes = torch.randint(0, 256, (3, 40, 64)).to(torch.uint8)
    packed = in_weight_memory({"scales": scales, "zeros": zeros, "codes": codes})
    for name, tensor in (("scales", scales), ("zeros", zeros), ("codes", codes)):
        assert torch.equal(packed[name], tensor) and packed[name].data_ptr() % 64 == 0
    stride = 5 * 64 + 128 + 40 * 64
    assert packed["codes"].stride(0) == packed["zeros"].stride(0) == stride
    assert packed["codes"].data_ptr() - packed["scales"].data_ptr() == 5 * 64 + 128
    assert packed["zeros"].untyped_storage().data_ptr() == packed["codes"].untyped_storage().data_ptr()


def test_tiles_of_a_view_that_are_apart() -> None:
    wide = torch.arange(4 * 3 * 16, dtype=torch.float32).view(4, 3, 16)[::2]
    assert torch.equal(in_weight_memory({"scales": wide})["scales"], wide)


def test_tables_are_copied_as_they_are() -> None:
    packed = {"tiles": torch.arange(16 * 64, dtype=torch.uint8).view(16, 64), "table": torch.randn(16)}
    copies = in_weight_memory(packed)
    assert copies["table"].is_contiguous() and all(torch.equal(copies[name], tensor) for name, tensor in packed.items())
