"""How weights lie in GPU memory: codes in 32-bit words such that unpacking needs no shuffle.

A row of K weights is cut into chunks of C neighbours that share a scale. A word holds L = 32 / b codes of b bits. Lane i (bits i b ..) of
word j of a chunk is the weight

    k = chunk C + i J + j        with J = C / L words per chunk, j < J, i < L

so one shift and one mask, the same for all words of a tile, gives a tile of weights whose inputs are J neighbours: registers hold what the
multiplication wants, and nothing is moved between threads. Words of a row are neighbours in memory: loads are 16 bytes wide.

3-bit codes are two planes: the low two bits as above with b = 2, the high bits in words of 32 (word j // 2, lane i + 16 (j mod 2)).

Integers are offset binary (q + 2**(b-1)). Rows whose length is no multiple of C are padded; the padding meets inputs of zero.
Scales stay as stored (E8M0 and E4M3 as bytes), zero points are int8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fewbit.errors import FormatError
from fewbit.formats.grids import get_grid
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["Layout", "layout_of", "pack"]

_LARGEST_CHUNK = 128


@dataclass(frozen=True)
class Layout:
    """The constants that a kernel is compiled for.

    Attributes:
        bits: of a code. chunk: C of the module's header.
        kind: how a code becomes a number: `int`, `table` (a lookup) or `e4m3`.
        group: neighbours in a row that share a scale; a multiple of `chunk`.
        columns: K. words: per row, of the low plane.
        scale: how a scale is stored: `native`, `e8m0` or `e4m3`.
        affine: there are zero points.
    """

    bits: int
    chunk: int
    kind: str
    group: int
    columns: int
    words: int
    scale: str
    affine: bool

    @property
    def lanes(self) -> int:
        """Codes in a word of the low plane."""
        return 16 if self.bits == 3 else 32 // self.bits

    @property
    def words_per_chunk(self) -> int:
        """J of the module's header."""
        return self.chunk // self.lanes


def layout_of(spec: QuantSpec, columns: int) -> Layout:
    """The layout of rows of `columns` weights.

    Raises:
        FormatError: no chunk size suits the group size.
    """
    group = spec.group_size or -(-columns // _LARGEST_CHUNK) * _LARGEST_CHUNK
    smallest = 32 if spec.num_bits == 3 else 32 // spec.num_bits
    chunk = next((size for size in (128, 64, 32, 16) if group % size == 0 and size >= smallest), 0)
    if not chunk:
        raise FormatError(f"group size {group} suits no chunk of {smallest} or more weights", "use group sizes that are multiples of 32")
    kind = "int" if spec.type == "int" else "e4m3" if spec.num_bits == 8 else "table"
    scale = spec.scale_dtype if spec.scale_dtype == "e8m0" else "e4m3" if spec.scale_dtype == "float8_e4m3fn" else "native"
    lanes = 16 if spec.num_bits == 3 else 32 // spec.num_bits
    return Layout(spec.num_bits, chunk, kind, group, columns, -(-columns // chunk) * chunk // lanes, scale, not spec.symmetric)


def pack(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors that stay resident.

    Returns:
        `codes` int32 [out, words]; `high` int32 [out, columns / 32] for 3 bits; `scale` [out, groups] as stored (E4M3 as uint8);
        `zero_point` int8 [out, groups] when affine; `table` float32 [2**b] where codes are looked up; `global_scale` float32 [1].
    """
    spec = weight.spec
    layout = layout_of(spec, weight.shape[1])
    codes = _codes(weight)
    padded = F.pad(codes, (0, -codes.shape[1] % layout.chunk))
    packed: dict[str, torch.Tensor] = {}
    if layout.bits == 3:
        packed["codes"] = _words(padded & 3, 2, layout.chunk, layout.words_per_chunk)
        packed["high"] = _high_words(padded >> 2, layout)
    else:
        packed["codes"] = _words(padded, layout.bits, layout.chunk, layout.words_per_chunk)
    rows = weight.shape[0]
    scale = weight.scale.view(torch.uint8) if weight.scale.dtype == torch.float8_e4m3fn else weight.scale
    packed["scale"] = scale.expand(rows, -1).contiguous()
    if weight.zero_point is not None:
        packed["zero_point"] = weight.zero_point.expand(rows, -1).contiguous()
    if layout.kind == "table":
        table = torch.tensor(get_grid(spec.grid_name).codes) if weight.codebook is None else weight.codebook.float()
        packed["table"] = F.pad(table, (0, 2**spec.num_bits - len(table))).to(scale.device, torch.float32)
    if weight.global_scale is not None:
        packed["global_scale"] = weight.global_scale.to(torch.float32, copy=True)
    return packed


def _codes(weight: QuantizedTensor) -> torch.Tensor:
    """Non-negative codes [out, in] in int32."""
    spec = weight.spec
    if spec.type == "int":
        codes: torch.Tensor = weight.values.to(torch.int32) + 2 ** (spec.num_bits - 1)
        return codes
    bits = weight.values.view(torch.uint8) if weight.values.dtype == torch.float8_e4m3fn else weight.values
    return bits.to(torch.int32)


def _words(codes: torch.Tensor, bits: int, chunk: int, per_chunk: int) -> torch.Tensor:
    """int32 [rows, words] of codes [rows, columns]: lane i of word j is the chunk's weight i * per_chunk + j."""
    lanes = codes.reshape(codes.shape[0], -1, chunk // per_chunk, per_chunk)
    words: torch.Tensor = torch.zeros(codes.shape[0], lanes.shape[1], per_chunk, dtype=torch.int32, device=codes.device)
    for lane in range(lanes.shape[2]):
        words |= lanes[:, :, lane] << (bits * lane)
    return words.flatten(1)


def _high_words(bit: torch.Tensor, layout: Layout) -> torch.Tensor:
    """int32 [rows, columns / 32] of bits [rows, columns]: of word j and lane i of the low plane in word j // 2, lane i + 16 (j mod 2)."""
    rows, per_chunk = bit.shape[0], layout.words_per_chunk
    lanes = bit.reshape(rows, -1, layout.lanes, per_chunk // 2, 2)
    words = torch.zeros(rows, lanes.shape[1], per_chunk // 2, dtype=torch.int32, device=bit.device)
    for lane in range(layout.lanes):
        for odd in range(2):
            words |= lanes[:, :, lane, :, odd] << (lane + 16 * odd)
    return words.flatten(1)
