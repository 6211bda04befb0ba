"""Codes of a KV cache as numbers, inside of a kernel.

INT8 and FP8 are read as 32-bit words of four codes: a tensor core wants pairs of tokens in a register, and values of 8 bits would come out
of shared memory one by one. BF16 numbers are made two at a time by a few instructions of PTX. Left to itself the compiler converts FP8 by
an instruction of which a multiprocessor does 16 in a clock, fewer than memory delivers.

    INT8   (128 + the low 7 bits) - (128, or 256 with the sign bit)
    FP8    sign and magnitude moved to where BF16 has them, times 2**120; subnormals too. NaN, which `append` never writes, becomes 480.

The interpreter has no assembler; tests/kernels/triton/test_cache_codes.py runs the PTX on every code.
"""

# ruff: noqa: SIM300 - constants of a kernel are written in capitals
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INT4_GROUP", "byte_numbers", "int4_half"]

INT4_GROUP = 32
_GROUP = tl.constexpr(INT4_GROUP)
# Constants of the PTX are operands: as immediates some would be loaded for each use. A selector takes the same byte of two words, twice.
_FIRST_BYTE, _NEXT_BYTE, _128 = tl.constexpr(0x4400), tl.constexpr(0x1111), tl.constexpr(0x43004300)
_INT8_LOW, _INT8_SIGN = tl.constexpr(0x007F007F), tl.constexpr(0x00800080)
_E4M3_LOW, _E4M3_SIGN = tl.constexpr(0x07F007F0), tl.constexpr(0x80008000 - (1 << 32))
# $0 two BF16; $1, $2 words; then, each given twice: $3 selector, $5 mask of the low bits, $7 128 in BF16, $9 mask of the signs
_INT8_TO_BF16 = tl.constexpr("""
{
.reg .b32 two, low, sign, minus;
mov.b32 minus, 0xBF80BF80;
prmt.b32 two, $1, $2, $3;
lop3.b32 low, two, $5, $7, 0xEA;
lop3.b32 sign, two, $9, $7, 0xEA;
fma.rn.bf16x2 $0, sign, minus, low;
}
""")
_E4M3_TO_BF16 = tl.constexpr("""
{
.reg .b32 two, magnitude, power, zero;
mov.b32 power, 0x7B807B80;
mov.b32 zero, 0x80008000;
prmt.b32 two, $1, $2, $3;
shr.b32 magnitude, two, 4;
and.b32 magnitude, magnitude, $5;
lop3.b32 two, two, $9, magnitude, 0xEA;
fma.rn.bf16x2 $0, two, power, zero;
}
""")


@triton.jit
def byte_numbers(words, which: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Byte `which` of each word, [tokens, DIM / 4], as the number that it stands for, without its scale."""
    if ASSEMBLER and DTYPE == tl.bfloat16:
        selector = tl.full(words.shape, _FIRST_BYTE + _NEXT_BYTE * which, tl.int32)
        low = tl.full(words.shape, _INT8_LOW if KIND == "int8" else _E4M3_LOW, tl.int32)
        sign = tl.full(words.shape, _INT8_SIGN if KIND == "int8" else _E4M3_SIGN, tl.int32)
        operands = [words, selector, low, tl.full(words.shape, _128, tl.int32), sign]
        program: tl.constexpr = _INT8_TO_BF16 if KIND == "int8" else _E4M3_TO_BF16
        numbers = tl.inline_asm_elementwise(program, "=r,r,r,r,r,r,r,r,r,r,r", operands, dtype=tl.bfloat16, is_pure=True, pack=2)
    elif KIND == "int8":
        numbers = (words >> (8 * which)).to(tl.int8).to(DTYPE)
    else:
        numbers = (words >> (8 * which)).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
    return numbers


@triton.jit
def int4_half(packed, scale_ptr, zero_ptr, row, inside, which: tl.constexpr, DIM: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One half of the channels of a tile of tokens, [tokens, DIM / 2]."""
    HALF: tl.constexpr = DIM // 2
    GROUPS: tl.constexpr = DIM // _GROUP
    TOKENS: tl.constexpr = packed.shape[0]
    g = which * (GROUPS // 2) + tl.arange(0, GROUPS // 2)
    at = row[:, None] * GROUPS + g[None, :]
    scale = tl.load(scale_ptr + at, mask=inside[:, None], other=0).to(tl.float32)
    zero = tl.load(zero_ptr + at, mask=inside[:, None], other=0).to(tl.float32) + 8.0
    code = tl.reshape(((packed >> (4 * which)) & 15).to(tl.float32), (TOKENS, GROUPS // 2, _GROUP))
    return tl.reshape((code - zero[:, :, None]) * scale[:, :, None], (TOKENS, HALF)).to(DTYPE)
