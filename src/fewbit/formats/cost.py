"""What a quantized tensor really costs: values, scales, zero points, group index, tables; all of it. `sizes.py` has the arithmetic."""

from __future__ import annotations

import torch

from fewbit.formats.sizes import packed_length, storage_bytes
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["effective_bits", "packed_bytes", "storage_bytes"]


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
