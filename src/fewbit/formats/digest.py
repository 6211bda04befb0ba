"""A fingerprint of a quantized tensor's numbers, whatever layout stores them: two layouts hold the same tensor when the digests agree.

SHA-256 over the shape, the values (one byte each; floats as their bits), the scales as float32, zero points, group index, global scale and
codebook. Scales count by value, not by dtype: BF16 and FP16 that are the same number have the same digest.
"""

from __future__ import annotations

import hashlib

import torch

from fewbit.formats.tensor import QuantizedTensor

__all__ = ["digest"]


def digest(q: QuantizedTensor) -> str:
    """SHA-256 of the tensor's numbers, in hexadecimal."""
    found = hashlib.sha256(repr((q.shape, q.spec.grid_name, tuple(q.scale.shape))).encode())
    scale = q.scale if q.scale.dtype == torch.uint8 else q.scale.float()
    for tensor in (q.values, scale, q.zero_point, q.g_idx, q.global_scale, q.codebook):
        if tensor is None:
            found.update(b"-")
        else:
            found.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
