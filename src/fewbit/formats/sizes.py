"""Bytes of a format from shapes alone, without torch: what a plan of a model with hundreds of billions of weights needs.

    effective bits per weight = 8 * bytes / weights
    INT4, group 128, BF16 scale, symmetric:   4 + 16/128          = 4.125
    the same, affine (4-bit zero points):     4 + 16/128 + 4/128  = 4.156
    NF4, group 64, BF16 scale:                4 + 16/64           = 4.25
    MXFP4:                                    4 + 8/32            = 4.25
    NVFP4:                                    4 + 8/16            = 4.5      (and 4 bytes per tensor)

Zero points of weights count as densely packed at num_bits, as compressed-tensors, GPTQ and GGUF store them; those of a cache take a byte.
"""

from __future__ import annotations

from fewbit.errors import FormatError
from fewbit.formats.spec import QuantSpec, ScaleDtype

__all__ = ["SCALE_BYTES", "bits_per_weight", "cached_bytes", "packed_length", "scale_shape", "storage_bytes"]

SCALE_BYTES: dict[ScaleDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "e8m0": 1}


def packed_length(n: int, num_bits: int) -> int:
    """Bytes that n values of num_bits take, packed densely."""
    return -(-n * num_bits // 8)


def scale_shape(spec: QuantSpec, rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of a [rows, columns] tensor.

    Raises:
        FormatError: `group_size` does not divide the columns.
    """
    if spec.strategy == "tensor":
        return (1, 1)
    if spec.strategy == "group":
        size = spec.group_size or columns
        if columns % size:
            divisors = [g for g in (256, 128, 64, 32, 16, 8) if columns % g == 0]
            remedy = f"use a group size that does: {', '.join(map(str, divisors))}" if divisors else "quantize per channel"
            raise FormatError(f"group size {size} does not divide the {columns} input columns of the weight", remedy)
        return (rows, columns // size)
    if spec.block_shape is not None:
        return (-(-rows // spec.block_shape[0]), -(-columns // spec.block_shape[1]))
    return (rows, 1)


def storage_bytes(spec: QuantSpec, rows: int, columns: int, *, has_g_idx: bool = False) -> int:
    """Bytes that a [rows, columns] weight takes in this format, packed densely: arithmetic only, no tensor needed.

    Args:
        rows, columns: out and in.
        has_g_idx: a group index is stored (int32 per column).

    Raises:
        FormatError: `group_size` does not divide the columns.
    """
    tall, wide = scale_shape(spec, rows, columns)
    total = rows * packed_length(columns, spec.num_bits) + tall * wide * SCALE_BYTES[spec.scale_dtype]
    if not spec.symmetric:
        total += packed_length(tall * wide, spec.num_bits)
    if spec.global_scale:
        total += 4
    if spec.type == "codebook":
        total += 4 * 2**spec.num_bits
    return total + (4 * columns if has_g_idx else 0)


def bits_per_weight(spec: QuantSpec) -> float:
    """Effective bits of a weight in a matrix that is large enough for scales per row or per tensor to vanish: where no shape is known."""
    shared = spec.group_size or (spec.block_shape[0] * spec.block_shape[1] if spec.block_shape is not None else None)
    if shared is None:
        return float(spec.num_bits)
    return spec.num_bits + (8 * SCALE_BYTES[spec.scale_dtype] + (0 if spec.symmetric else spec.num_bits)) / shared


def cached_bytes(spec: QuantSpec | None, values: int, high_precision_bytes: int = 2) -> float:
    """Bytes that `values` neighbours of a KV cache take: one token of one head, or one token's latent vector.

    Args:
        spec: None for high precision. Its scale is shared by `group_size` values, or by all of them; an affine zero point takes a byte.
        values: how many.
        high_precision_bytes: of a value in high precision.
    """
    if spec is None:
        return values * high_precision_bytes
    shared = spec.group_size if spec.group_size is not None else values
    overhead = SCALE_BYTES[spec.scale_dtype] + (0 if spec.symmetric else 1)
    return values * (spec.num_bits / 8 + overhead / shared)
