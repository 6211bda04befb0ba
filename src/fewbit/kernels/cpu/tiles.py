"""How integer weights lie in memory for the dot product kernels (src/native/cpu/int_dot.hpp): tiles of 16 rows, lines of 64 bytes.

    INT8    byte 4 r + j of line l: code[r, 4 l + j]                                4 columns of 16 rows
    INT4    byte 4 r + j of line l: code[r, 8 l + j] | code[r, 8 l + 4 + j] << 4    8 columns of 16 rows
    INT2    likewise, four codes a byte                                             16 columns of 16 rows
    INT3    three lines hold 32 columns; with q_i = code[r, 32 l + 4 i + j], byte 4 r + j of them is
                q0 | q1 << 3 | (q6 >> 1) << 6      q2 | q3 << 3 | (q7 >> 1) << 6      q4 | q5 << 3 | (q6 & 1) << 6 | (q7 & 1) << 7
            so that a mask, or two shifts and masks for q6 and q7, bring each code to the same bits of its byte

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
        values: int8 [out, in], signed, of `num_bits` 2, 3, 4 or 8.
        columns: `in` rounded up to whole groups; a multiple of 32.

    Returns:
        uint8 [tiles, lines, 64].
    """
    codes = (values + (-128 if num_bits == 8 else 1 << (num_bits - 1))).view(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, columns - values.shape[1], 0, -values.shape[0] % TILE_ROWS))
    if num_bits == 3:
        q = codes.view(-1, TILE_ROWS, columns // (8 * _LANE), 8, _LANE).unbind(3)
        last = (q[4] | q[5] << 3) | ((q[6] & 1) << 6 | (q[7] & 1) << 7)
        lines = torch.stack([q[0] | q[1] << 3 | q[6] >> 1 << 6, q[2] | q[3] << 3 | q[7] >> 1 << 6, last], dim=3)
        codes = lines.view(-1, TILE_ROWS, 3 * columns // (8 * _LANE), _LANE)  # [tiles, 16, lines, 4]
    else:
        fields = codes.view(-1, TILE_ROWS, columns * num_bits // (8 * _LANE), 8 // num_bits, _LANE).unbind(3)
        codes = fields[0]
        for i, field in enumerate(fields[1:], 1):
            codes = codes | field << (i * num_bits)
    return codes.transpose(1, 2).contiguous().view(codes.shape[0], -1, LINE_BYTES)


def untile_codes(lines: torch.Tensor, num_bits: int, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `tile_codes`: int8 [rows, columns]."""
    codes = lines.view(lines.shape[0], lines.shape[1], TILE_ROWS, _LANE).transpose(1, 2)  # [tiles, 16, lines, 4]
    if num_bits == 3:
        a, b, c = codes.view(*codes.shape[:2], -1, 3, _LANE).unbind(3)
        sixth, seventh = (a >> 6 << 1) | (c >> 6 & 1), (b >> 6 << 1) | c >> 7
        codes = torch.stack([a & 7, a >> 3 & 7, b & 7, b >> 3 & 7, c & 7, c >> 3 & 7, sixth, seventh], dim=3)
    else:
        mask = (1 << num_bits) - 1
        codes = torch.stack([codes >> (i * num_bits) & mask for i in range(8 // num_bits)], dim=3)
    codes = codes.reshape(lines.shape[0] * TILE_ROWS, -1)[:rows, :columns]
    return codes.contiguous().view(torch.int8) - (-128 if num_bits == 8 else 1 << (num_bits - 1))


def tile_rows(x: torch.Tensor) -> torch.Tensor:
    """Scales or zero points [out, groups] as [tiles, groups, 16], padded with zeros."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % TILE_ROWS))
    return padded.view(-1, TILE_ROWS, x.shape[1]).transpose(1, 2).contiguous()
