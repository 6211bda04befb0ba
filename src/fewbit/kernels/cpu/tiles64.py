"""How weights lie in memory for products with exact inputs (src/native/cpu/digit_dot.hpp, table_dot.hpp): one stream of bytes, tiles of 64
outputs.

    tile     for each group of columns: header, then its blocks
    header   64 scales; affine: 64 zero points, as unsigned codes
    block    [planes, vectors, 64 outputs, 4 columns] bytes; codes narrower than a byte share it with others of the block ("sets")

    INT8          1 set    the byte
    INT4, E2M1    2 sets   a | b << 4
    INT2          4 sets   a | b << 2 | c << 4 | d << 6
    INT3          8 sets   three planes: a0 | b0 << 3 | c[1:0] << 6     a1 | b1 << 3 | d[1:0] << 6     a2 | b2 << 3 | c[2] << 6 | d[2] << 7

FP8 has bytes [columns, 64 outputs] behind the scales; NF4 and codebooks lie as INT4 does with blocks of 8 columns.

Set s of a block of n columns holds the columns s * n / sets and following. Rows are padded to whole tiles with scales of zero, columns to
whole groups; what is multiplied with these is zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["TILE", "Columns", "pack_bytes", "pack_tiles"]

TILE = 64
_ROWS_AT_ONCE = 64 * TILE  # temporaries stay at some tens of megabytes
_SETS = {8: 1, 4: 2, 3: 8, 2: 4}


class Columns(NamedTuple):
    """`groups` of `blocks` of `block` columns each; together at least as many as the weight has."""

    block: int
    blocks: int
    groups: int

    @property
    def padded(self) -> int:
        """All columns."""
        return self.block * self.blocks * self.groups


def pack_tiles(codes: torch.Tensor, num_bits: int, columns: Columns, scale: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """Codes and what belongs to them in one stream.

    Args:
        codes: uint8 [out, in], unsigned codes of `num_bits` 2, 3, 4 or 8.
        columns: how the columns are divided.
        scale: [out, groups], any dtype; its bytes are stored.
        zeros: uint8 [out, groups], codes of zero; None for symmetric formats.

    Returns:
        uint8 [ceil(out / 64), bytes of a tile].
    """
    parts = []
    for start in range(0, codes.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        blocks = _pack_blocks(codes[rows], num_bits, columns)
        headers = [_by_tile(scale[rows])] if zeros is None else [_by_tile(scale[rows]), _by_tile(zeros[rows])]
        parts.append(torch.cat([*headers, blocks], dim=2).flatten(1))
    return torch.cat(parts)


def pack_bytes(codes: torch.Tensor, columns: Columns, scale: torch.Tensor) -> torch.Tensor:
    """The same for codes of a byte that lie column after column.

    Args:
        codes: uint8 [out, in]. columns: with one block per group. scale: [out, groups].

    Returns:
        uint8 [ceil(out / 64), bytes of a tile].
    """
    parts = []
    for start in range(0, codes.shape[0], _ROWS_AT_ONCE):
        rows = codes[start : start + _ROWS_AT_ONCE]
        padded = torch.nn.functional.pad(rows, (0, columns.padded - codes.shape[1], 0, -rows.shape[0] % TILE))
        by_column = padded.view(-1, TILE, columns.groups, columns.block).permute(0, 2, 3, 1).flatten(2)
        parts.append(torch.cat([_by_tile(scale[start : start + _ROWS_AT_ONCE]), by_column], dim=2).flatten(1))
    return torch.cat(parts)


def _by_tile(x: torch.Tensor) -> torch.Tensor:
    """[out, groups] as bytes [tiles, groups, 64 * itemsize]."""
    padded = torch.nn.functional.pad(x.contiguous().view(torch.uint8), (0, 0, 0, -x.shape[0] % TILE))
    return padded.view(-1, TILE, x.shape[1], x.element_size()).transpose(1, 2).flatten(2)


def _pack_blocks(codes: torch.Tensor, num_bits: int, columns: Columns) -> torch.Tensor:
    """uint8 [tiles, groups, bytes of a group's blocks]."""
    sets = _SETS[num_bits]
    padded = torch.nn.functional.pad(codes, (0, columns.padded - codes.shape[1], 0, -codes.shape[0] % TILE))
    parts = padded.view(-1, TILE, columns.groups, columns.blocks, sets, columns.block // sets // 4, 4)
    a = parts.permute(4, 0, 2, 3, 5, 1, 6)  # [sets, tiles, groups, blocks, vectors, outputs, 4]
    if num_bits == 8:
        planes = [a[0]]
    elif num_bits == 4:
        planes = [a[0] | a[1] << 4]
    elif num_bits == 2:
        planes = [a[0] | a[1] << 2 | a[2] << 4 | a[3] << 6]
    else:
        c, d = a[6], a[7]
        planes = [a[0] | a[3] << 3 | (c & 3) << 6, a[1] | a[4] << 3 | (d & 3) << 6, a[2] | a[5] << 3 | (c >> 2) << 6 | (d >> 2) << 7]
    return torch.stack(planes, dim=3).flatten(2)
