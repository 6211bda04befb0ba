"""How weights lie in GPU memory: codes in 32-bit words such that one shift and one mask unpack two neighbours, ready for a tensor core.

A row of K weights is cut into chunks of 16 words. A word holds L = 32 / b codes of b bits, so a chunk is 16 L weights. Step i (i < L / 2)
of a chunk is 32 neighbours along K; their codes are bits b i .. of the lower and of the upper half of each word:

    k = 16 L chunk + 32 i + 2 j + h        word j < 16, half h < 2: bits 16 h + b i .. of word j

    pair = (word >> b i) & 0x000F000F      4 bits: both halves at once
    pair | 0x43004300                      two BF16 numbers, 128 + code each, in the order in which the tensor core takes them (k, k + 1)

So unpacking is 1.5 instructions a weight, no number is converted, and nothing moves between threads. (Walking the words of a row one
nibble after the other needs 7 to 9, above what the arithmetic units give while memory delivers 4 bits.)

Blocks of 16 rows and one chunk are contiguous, 1 KiB: codes [rows / 16, chunks, 16 rows, 16 words]; rows and chunks are padded.
3-bit codes are two planes: the low two bits as above with b = 2, the high bits [rows / 16, chunks, 16, 8], bit i + 8 (j mod 2) + 16 h of
word j // 2. Integers are offset binary (q + 2**(b-1)).

Scales stay as stored, [out, groups] (E8M0 and E4M3 as bytes), zero points are int8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fewbit.errors import FormatError
from fewbit.formats.grids import get_grid
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["ROWS", "STEP", "WORDS", "Layout", "layout_of", "pack"]

ROWS, WORDS = 16, 16  # of a block
STEP = 32  # neighbours that one shift and mask unpack, of all words of a row


@dataclass(frozen=True)
class Layout:
    """The constants that a kernel is compiled for.

    Attributes:
        bits: of a code. lanes: L of the module's header.
        kind: how a code becomes a number: `int`, `table` (a lookup), `e2m1` or `e4m3` (the bits are moved).
        group: neighbours in a row that share a scale: 16, or a multiple of 32; more than a row has for channels and tensors.
        columns: K.
        scale: how a scale is stored: `native`, `e8m0` or `e4m3`.
        affine: there are zero points.
    """

    bits: int
    kind: str
    group: int
    columns: int
    scale: str
    affine: bool

    @property
    def lanes(self) -> int:
        """Codes in a word of the low plane."""
        return 16 if self.bits == 3 else 32 // self.bits

    @property
    def chunk(self) -> int:
        """Weights of a row in 16 words."""
        return self.lanes * WORDS

    @property
    def chunks(self) -> int:
        """Of a row."""
        return -(-self.columns // self.chunk)


def layout_of(spec: QuantSpec, columns: int) -> Layout:
    """The layout of rows of `columns` weights.

    Raises:
        FormatError: the group size suits no step of 32 weights.
    """
    group = spec.group_size or 1 << 30
    if group != 16 and group % STEP:
        raise FormatError(f"group size {group} is neither 16 nor a multiple of {STEP}", "use groups of 32, 64 or 128")
    if group < STEP and not spec.symmetric:
        raise FormatError(f"groups of {group} are symmetric here, not affine", "use groups of 32, 64 or 128")
    kind = "int" if spec.type == "int" else "table" if spec.type != "float" else "e4m3" if spec.num_bits == 8 else "e2m1"
    scale = spec.scale_dtype if spec.scale_dtype == "e8m0" else "e4m3" if spec.scale_dtype == "float8_e4m3fn" else "native"
    return Layout(spec.num_bits, kind, group, columns, scale, not spec.symmetric)


def pack(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors that stay resident.

    Returns:
        `codes` int32 [out / 16, chunks, 16, 16]; `high` int32 [out / 16, chunks, 16, 8] for 3 bits; `scale` [out, groups] as stored (E4M3
        as uint8); `zero_point` int8 [out, groups] when affine; `table` float32 [2**b] where codes are looked up; `global_scale`
        float32 [out].
    """
    spec, (rows, columns) = weight.spec, weight.shape
    layout = layout_of(spec, columns)
    codes = F.pad(_codes(weight), (0, -columns % layout.chunk, 0, -rows % ROWS))
    # [row blocks, 16 rows, chunks, steps, 16 words, 2 halves] -> blocks of [16 rows, 16 words] with steps and halves last
    blocks = codes.view(-1, ROWS, layout.chunks, layout.lanes // 2, WORDS, 2).permute(0, 2, 1, 4, 3, 5)
    packed = {"codes": _words(blocks & 3 if layout.bits == 3 else blocks, 2 if layout.bits == 3 else layout.bits)}
    if layout.bits == 3:
        high = blocks >> 2  # [..., 16 words, 8 steps, 2]
        both = high.reshape(*high.shape[:3], WORDS // 2, 2, 8, 2).transpose(4, 5).flatten(4, 5)  # [..., 8 words, steps and odd words, 2]
        order = torch.arange(16, device=both.device).view(8, 2).t().reshape(-1)  # bit i + 8 odd
        packed["high"] = _words(both[:, :, :, :, order], 1)
    scale = weight.scale.view(torch.uint8) if weight.scale.dtype == torch.float8_e4m3fn else weight.scale
    packed["scale"] = scale.expand(rows, -1).contiguous()
    if weight.zero_point is not None:
        packed["zero_point"] = weight.zero_point.expand(rows, -1).contiguous()
    if layout.kind == "table":
        table = torch.tensor(get_grid(spec.grid_name).codes) if weight.codebook is None else weight.codebook.float()
        packed["table"] = F.pad(table, (0, 2**spec.num_bits - len(table))).to(scale.device, torch.float32)
    if weight.global_scale is not None:
        packed["global_scale"] = weight.global_scale.float().expand(rows).contiguous()
    return packed


def _codes(weight: QuantizedTensor) -> torch.Tensor:
    """Non-negative codes [out, in] in int32."""
    spec = weight.spec
    if spec.type == "int":
        codes: torch.Tensor = weight.values.to(torch.int32) + 2 ** (spec.num_bits - 1)
        return codes
    bits = weight.values.view(torch.uint8) if weight.values.dtype == torch.float8_e4m3fn else weight.values
    return bits.to(torch.int32)


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [row blocks, chunks, 16 rows, words] of codes [row blocks, chunks, 16 rows, words, places, 2 halves]."""
    words = torch.zeros(codes.shape[:-2], dtype=torch.int32, device=codes.device)
    for place in range(codes.shape[-2]):
        for half in range(2):
            words |= codes[..., place, half] << (bits * place + 16 * half)
    return words
