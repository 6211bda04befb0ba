"""What a format really costs: values, scales, zero points, group index, tables; all of it.

    effective bits per weight = 8 * bytes / weights
    INT4, group 128, BF16 scale, symmetric:   4 + 16/128          = 4.125
    the same, affine (4-bit zero points):     4 + 16/128 + 4/128  = 4.156
    NF4, group 64, BF16 scale:                4 + 16/64           = 4.25
    MXFP4:                                    4 + 8/32            = 4.25
    NVFP4:                                    4 + 8/16            = 4.5      (and 4 bytes per tensor)

Zero points count as densely packed at num_bits, as compressed-tensors, GPTQ and GGUF store them.
"""

from __future__ import annotations

import torch

from fewbit.formats.grouping import scale_shape
from fewbit.formats.packing import packed_length
from fewbit.formats.spec import QuantSpec, ScaleDtype
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["effective_bits", "packed_bytes", "storage_bytes"]

_SCALE_BYTES: dict[ScaleDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "e8m0": 1}


def storage_bytes(spec: QuantSpec, rows: int, columns: int, *, has_g_idx: bool = False) -> int:
    """Bytes that a [rows, columns] weight takes in this format, packed densely: arithmetic only, no tensor needed.

    Args:
        rows, columns: out and in.
        has_g_idx: a group index is stored (int32 per column).

    Raises:
        FormatError: `group_size` does not divide the columns.
    """
    tall, wide = scale_shape(spec, rows, columns)
    total = rows * packed_length(columns, spec.num_bits) + tall * wide * _SCALE_BYTES[spec.scale_dtype]
    if not spec.symmetric:
        total += packed_length(tall * wide, spec.num_bits)
    if spec.global_scale:
        total += 4
    if spec.type == "codebook":
        total += 4 * 2**spec.num_bits
    return total + (4 * columns if has_g_idx else 0)


def packed_bytes(q: QuantizedTensor) -> int:
    """Bytes that the tensors of `q` take once the values and zero points are packed; counted from the tensors themselves."""
    others = (q.scale, q.g_idx, q.global_scale, q.codebook)
    total = q.shape[0] * packed_length(q.shape[1], q.spec.num_bits)
    total += sum(t.numel() * t.element_size() for t in others if isinstance(t, torch.Tensor))
    if q.zero_point is not None:
        total += packed_length(q.zero_point.numel(), q.spec.num_bits)
    return total


def effective_bits(q: QuantizedTensor) -> float:
    """Bits per weight with everything counted that is needed to dequantize."""
    return 8 * packed_bytes(q) / (q.shape[0] * q.shape[1])
