"""Dense bit packing: element i of the last dimension occupies bits i*b .. i*b + b - 1 of a little-endian bit stream.

    b = 4   byte 0 = v0 | v1 << 4                                     two nibbles a byte, low first
    b = 2   byte 0 = v0 | v1 << 2 | v2 << 4 | v3 << 6
    b = 3   bytes 0..2 = v0 | v1 << 3 | ... | v7 << 21                eight values in three bytes, none wasted

Each row is packed by itself and padded to whole bytes, so that rows stay addressable. Signed integers are stored in offset binary
(q + 2**(b-1)), which compressed-tensors and the INT4 kernels use too: its int32 words are this byte stream read four at a time.
"""

from __future__ import annotations

import math

import torch

from fewbit.errors import FormatError
from fewbit.formats.grids import value_dtype
from fewbit.formats.sizes import packed_length
from fewbit.formats.spec import QuantSpec

__all__ = ["pack_bits", "pack_values", "packed_length", "unpack_bits", "unpack_values"]


def _unit(num_bits: int) -> tuple[int, int, torch.dtype]:
    """The smallest run of values that fills whole bytes: (values, bytes, dtype of a word that holds it)."""
    if not 1 <= num_bits <= 8:
        raise FormatError(f"cannot pack values of {num_bits} bits", "num_bits is 1 to 8")
    values = 8 // math.gcd(8, num_bits)
    size = values * num_bits // 8
    return values, size, torch.uint8 if size == 1 else torch.int64


def pack_bits(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Pack codes densely along the last dimension.

    Args:
        values: uint8 [..., n], each below 2**num_bits (not checked: higher bits would spill into the neighbour).

    Returns:
        uint8 [..., ceil(n * num_bits / 8)].

    Raises:
        FormatError: num_bits outside 1 to 8, or values of another dtype.
    """
    per_word, size, dtype = _unit(num_bits)
    if values.dtype != torch.uint8:
        raise FormatError(f"pack_bits got {values.dtype}", "give unsigned codes in uint8; pack_values converts signed ones")
    if num_bits == 8:
        return values.clone()
    n = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -n % per_word))
    padded = padded.reshape(*padded.shape[:-1], -1, per_word)
    word: torch.Tensor = padded[..., 0].to(dtype, copy=True)
    for i in range(1, per_word):
        word |= padded[..., i].to(dtype) << (i * num_bits)
    if size == 1:
        return word
    in_bytes = torch.stack([(word >> (8 * j)).to(torch.uint8) for j in range(size)], dim=-1)
    return in_bytes.flatten(-2)[..., : packed_length(n, num_bits)].contiguous()


def unpack_bits(packed: torch.Tensor, num_bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack_bits`.

    Args:
        packed: uint8 [..., ceil(n * num_bits / 8)].
        n: number of values in the last dimension.

    Returns:
        uint8 [..., n].

    Raises:
        FormatError: num_bits outside 1 to 8, or a last dimension that does not hold n values.
    """
    per_word, size, dtype = _unit(num_bits)
    length = packed_length(n, num_bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != length:
        raise FormatError(
            f"packed is {packed.dtype} {list(packed.shape)}, {n} values of {num_bits} bits are uint8 with a last dimension of {length}"
        )
    if num_bits == 8:
        return packed.clone()
    in_bytes = torch.nn.functional.pad(packed, (0, -length % size))
    in_bytes = in_bytes.reshape(*packed.shape[:-1], -1, size)
    word = in_bytes[..., 0].to(dtype)
    for j in range(1, size):
        word = word | (in_bytes[..., j].to(dtype) << (8 * j))
    codes = torch.stack([((word >> (i * num_bits)) & (2**num_bits - 1)).to(torch.uint8) for i in range(per_word)], dim=-1)
    return codes.flatten(-2)[..., :n]


def pack_values(values: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Pack stored values of any type: integers in offset binary, FP8 as its bytes, codes as they are.

    Args:
        values: [..., n] in `value_dtype(spec)`.

    Returns:
        uint8 [..., ceil(n * num_bits / 8)].
    """
    if spec.type == "int":
        return pack_bits((values + (-128 if spec.num_bits == 8 else 2 ** (spec.num_bits - 1))).view(torch.uint8), spec.num_bits)
    return pack_bits(values.contiguous().view(torch.uint8), spec.num_bits)


def unpack_values(packed: torch.Tensor, spec: QuantSpec, n: int) -> torch.Tensor:
    """The inverse of `pack_values`: [..., n] in `value_dtype(spec)`."""
    codes = unpack_bits(packed, spec.num_bits, n)
    if spec.type == "int":
        return codes.view(torch.int8) - (-128 if spec.num_bits == 8 else 2 ** (spec.num_bits - 1))
    return codes.contiguous().view(value_dtype(spec))
