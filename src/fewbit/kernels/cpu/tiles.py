"""How integer weights lie in memory for the dot product kernels (src/native/cpu/int_dot.hpp): tiles of 16 rows, lines of 64 bytes.

    INT8    byte 4 r + j of line l: code[r, 4 l + j]                                4 columns of 16 rows
    INT4    byte 4 r + j of line l: code[r, 8 l + j] | code[r, 8 l + 4 + j] << 4    8 columns of 16 rows

Codes are offset binary, q + 2**(b-1). Rows are padded to whole tiles, columns to whole groups.
"""

from __future__ import annotations

import torch

__all__ = ["LINE_BYTES", "TILE_ROWS", "tile_codes", "tile_rows", "untile_codes"]

TILE_ROWS = 16
LINE_BYTES = 64
_LANE = 4  # columns whose products one 32-bit lane adds


def tile_codes(values: torch.Tensor, num_bits: int, columns: int) -> torch.Tensor:
    """Lines of codes.

    Args:
        values: int8 [out, in], signed, of `num_bits` 4 or 8.
        columns: `in` rounded up to whole groups; a multiple of 8.

    Returns:
        uint8 [tiles, lines, 64].
    """
    codes = (values + (-128 if num_bits == 8 else 8)).view(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, columns - values.shape[1], 0, -values.shape[0] % TILE_ROWS))
    if num_bits == 4:
        halves = codes.view(-1, TILE_ROWS, columns // (2 * _LANE), 2, _LANE)
        codes = halves[..., 0, :] | (halves[..., 1, :] << 4)  # [tiles, 16, lines, 4]
    else:
        codes = codes.view(-1, TILE_ROWS, columns // _LANE, _LANE)
    return codes.transpose(1, 2).contiguous().view(codes.shape[0], -1, LINE_BYTES)


def untile_codes(lines: torch.Tensor, num_bits: int, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `tile_codes`: int8 [rows, columns]."""
    codes = lines.view(lines.shape[0], lines.shape[1], TILE_ROWS, _LANE).transpose(1, 2)  # [tiles, 16, lines, 4]
    if num_bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=3)
    codes = codes.reshape(lines.shape[0] * TILE_ROWS, -1)[:rows, :columns]
    return codes.view(torch.int8) - (-128 if num_bits == 8 else 8)


def tile_rows(x: torch.Tensor) -> torch.Tensor:
    """Scales or zero points [out, groups] as [tiles, groups, 16], padded with zeros."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % TILE_ROWS))
    return padded.view(-1, TILE_ROWS, x.shape[1]).transpose(1, 2).contiguous()
