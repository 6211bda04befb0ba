"""y = x W^T with W unpacked in registers and multiplied on tensor cores, for one token as for thousands.

`layout` says how two codes become two BF16 (FP16) numbers with a shift, a mask and a subtraction. What a code stands for is exact in 16
bits, so no weight is rounded; sums are float32, and scales multiply the sum of each group (groups of 16, NVFP4: the numbers, exactly).

    code -> number     int         code | 2**7's bits, minus 2**7 + 2**(b-1) + zero point    BF16; FP16: 2**10; 8 bits: 2**23 in FP32
                       e2m1, e4m3  sign, exponent and mantissa moved to where BF16 has them, times 2**126 or 2**120; subnormals too
                       table       looked up

A few tokens: one program owns BLOCK_N rows and one of several parts of K, so that small layers fill the GPU, too; a tensor core takes 16
tokens at the price of one, and the time is that of the bytes. Parts go out as float32 and are added in a fixed order by what comes next
(`rows.process_rows`), so results repeat bit by bit. Many tokens: SWAP computes (W x^T)^T; the weights are then the operand that a Hopper
tensor core takes from registers, and never see shared memory again.
"""

# ruff: noqa: SIM108, SIM300 - branches on constants are taken when the kernel is compiled, and only as statements
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fewbit.kernels.triton.environment import interpreted
from fewbit.kernels.triton.layout import Layout
from fewbit.kernels.triton.tuning import Tiles

__all__ = ["dequantize", "multiply"]


@triton.jit
def _as_float(bits, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of words [.., 16] as 16-bit floats: [.., 32]."""
    lower = bits.to(tl.int16).to(DTYPE, bitcast=True)
    upper = (bits >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(lower, upper), (bits.shape[0], 32))


@triton.jit
def _as_wide(bits):  # type: ignore[no-untyped-def]
    """Both halves of words [.., 16], BF16, as float32: [.., 32]."""
    lower = (bits << 16).to(tl.float32, bitcast=True)
    upper = (bits & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(lower, upper), (bits.shape[0], 32))


@triton.jit
def _masked(bits, MASK: tl.constexpr, MAGIC: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(bits & MASK) | MAGIC in one instruction; left to itself the assembler makes two, each with its constant as an immediate.

    The interpreter (WIDE) has no assembler."""
    if WIDE:
        return (bits & MASK) | MAGIC
    mask, magic = tl.full(bits.shape, MASK, tl.int32), tl.full(bits.shape, MAGIC, tl.int32)
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [bits, mask, magic], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _numbers(  # type: ignore[no-untyped-def]
    pair, zero, table_ptr, BITS: tl.constexpr, KIND: tl.constexpr, AFFINE: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr
):
    """The numbers [BLOCK_N, 32] in DTYPE that pairs of codes [BLOCK_N, 16] stand for, before the scale. WIDE: subtract and multiply in
    float32, with the same exact results: Triton's interpreter has no BF16 arithmetic, and float32 inputs want it so."""
    if KIND == "table":
        lower = tl.load(table_ptr + (pair & ((1 << BITS) - 1)))
        upper = tl.load(table_ptr + ((pair >> 16) & ((1 << BITS) - 1)))
        return tl.reshape(tl.join(lower, upper), (pair.shape[0], 32)).to(DTYPE)
    if KIND == "int":
        if BITS == 8 and DTYPE != tl.float16:  # 2**23 + code in float32: BF16 has too few bits
            lower = _masked(pair, 0xFF, 0x4B000000, WIDE).to(tl.float32, bitcast=True)
            upper = _masked(pair >> 16, 0xFF, 0x4B000000, WIDE).to(tl.float32, bitcast=True)
            y = tl.reshape(tl.join(lower, upper), (pair.shape[0], 32)) - 8388736.0
            return ((y - zero[:, None]) if AFFINE else y).to(DTYPE)
        if DTYPE == tl.float16:
            x = _as_float(_masked(pair, ((1 << BITS) - 1) * 0x00010001, 0x64006400, WIDE), tl.float16)
            shift = 1024.0 + (1 << (BITS - 1))
        else:
            x = _as_float(_masked(pair, ((1 << BITS) - 1) * 0x00010001, 0x43004300, WIDE), tl.bfloat16)
            shift = 128.0 + (1 << (BITS - 1))
        if WIDE:
            y = x.to(tl.float32) - shift
            return ((y - zero[:, None]) if AFFINE else y).to(DTYPE)
        if AFFINE:
            return (x - (zero + shift).to(x.dtype)[:, None]).to(DTYPE)
        return (x - tl.full(x.shape, shift, x.dtype)).to(DTYPE)  # every return has one type, taken or not
    half: tl.constexpr = DTYPE == tl.float16 and not WIDE
    if KIND == "e2m1":
        sign = (pair & 0x00080008) << 12
        bits = sign | ((pair & 0x00070007) << (9 if half else 6))
        factor = 16384.0 if half else 8.507059173023462e37  # 2**14, 2**126
    else:
        sign = (pair & 0x00800080) << 8
        bits = sign | ((pair & 0x007F007F) << (7 if half else 4))
        factor = 256.0 if half else 1.329227995784916e36  # 2**8, 2**120
    if WIDE:
        return (_as_wide(bits) * factor).to(DTYPE)
    x = _as_float(bits, tl.float16 if half else tl.bfloat16)
    return (x * tl.full(x.shape, factor, x.dtype)).to(DTYPE)


@triton.jit
def _scale(stored, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    if SCALE == "e8m0":
        bits = tl.maximum(stored.to(tl.int32) << 23, 1 << 22)  # 2**-127 is a subnormal float32
        return bits.to(tl.float32, bitcast=True)
    if SCALE == "e4m3":
        bits = stored.to(tl.int32) << 7
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return stored.to(tl.float32)


@triton.jit
def _pairs(word, high, step: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of one step, in the lower halves' and the upper halves' low bits; other bits above them."""
    if BITS == 3:
        odd = tl.arange(0, 16) % 2
        return ((word >> (2 * step)) & 0x00030003) | (((high >> (step + 8 * odd)[None, :]) & 0x00010001) << 2)
    return word >> (BITS * step)


@triton.jit(do_not_specialize=["M", "chunks", "groups", "chunks_per_part"])
def _multiply(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, high_ptr, scale_ptr, zero_ptr, table_ptr, global_ptr, out_ptr, M, N, K, chunks, groups, chunks_per_part,
    BITS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, AFFINE: tl.constexpr,
    GLOBAL: tl.constexpr, EVEN: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    CHUNK: tl.constexpr = LANES * 16
    STEPS: tl.constexpr = LANES // 2
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    NARROW: tl.constexpr = GROUP < 32  # two scales in a step
    # Steps after which a group's sum is scaled: at its end where groups and chunks fit into each other, else after each.
    FLUSH: tl.constexpr = (STEPS if GROUP >= CHUNK else GROUP // 32) if (GROUP % CHUNK == 0 or CHUNK % GROUP == 0) and GROUP >= 32 else 1
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    j = tl.arange(0, 16)
    k = tl.arange(0, 32)
    rows, inside = m < M, n < N
    row = tl.minimum(n, N - 1)
    block = (row // 16).to(tl.int64) * chunks
    codes_at = codes_ptr + (block * 256 + (row % 16) * 16)[:, None] + j[None, :]
    high_at = high_ptr + (block * 128 + (row % 16) * 8)[:, None] + (j // 2)[None, :]
    scale_at = scale_ptr + row * groups
    zero_at = zero_ptr + row * groups
    first = part * chunks_per_part
    last = tl.minimum(first + chunks_per_part, chunks)
    if SWAP:
        x_at = x_ptr + m[None, :].to(tl.int64) * K + k[:, None]
        there = rows[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        x_at = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
        there = rows[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for chunk in range(first, last):
        word = tl.load(codes_at + chunk * 256)
        high = word
        if BITS == 3:
            high = tl.load(high_at + chunk * 128)
        zero = tl.zeros((BLOCK_N,), tl.float32)
        for step in tl.static_range(STEPS):
            start = chunk * CHUNK + step * 32
            group = tl.minimum(start // GROUP, groups - 1)
            if step % FLUSH == 0:
                sums = tl.zeros_like(total)
                if AFFINE:
                    zero = tl.load(zero_at + group).to(tl.float32)
            w = _numbers(_pairs(word, high, step, BITS), zero, table_ptr, BITS, KIND, AFFINE, DTYPE, WIDE)
            if NARROW:
                second = tl.minimum(start // GROUP + 1, groups - 1)
                scales = tl.where(
                    k[None, :] < 16, _scale(tl.load(scale_at + group), SCALE)[:, None], _scale(tl.load(scale_at + second), SCALE)[:, None]
                )
                w = (w.to(tl.float32) * scales).to(DTYPE)
            if EVEN:
                x = tl.load(x_at + start, mask=there, other=0.0)
            elif SWAP:
                x = tl.load(x_at + start, mask=there & (k < K - start)[:, None], other=0.0)
            else:
                x = tl.load(x_at + start, mask=there & (k < K - start)[None, :], other=0.0)
            if SWAP:
                sums = tl.dot(w, x, sums, input_precision="ieee")
            else:
                sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
            if (step + 1) % FLUSH == 0:
                if NARROW:
                    total += sums
                elif SWAP:
                    total += sums * _scale(tl.load(scale_at + group), SCALE)[:, None]
                else:
                    total += sums * _scale(tl.load(scale_at + group), SCALE)[None, :]
    if SWAP:
        if GLOBAL:
            total *= tl.load(global_ptr + row)[:, None]
        out_at = out_ptr + (part * M + m[None, :]).to(tl.int64) * N + n[:, None]
        tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=there & inside[:, None])
    else:
        if GLOBAL:
            total *= tl.load(global_ptr + row)[None, :]
        out_at = out_ptr + (part * M + m[:, None]).to(tl.int64) * N + n[None, :]
        tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=there & inside[None, :])


@triton.jit(do_not_specialize=["chunks", "groups"])
def _dequantize(  # type: ignore[no-untyped-def]
    codes_ptr, high_ptr, scale_ptr, zero_ptr, table_ptr, global_ptr, out_ptr, N, K, chunks, groups,
    BITS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, AFFINE: tl.constexpr,
    GLOBAL: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(1)
    j = tl.arange(0, 16)
    k = tl.arange(0, 32)
    row = tl.minimum(n, N - 1)
    block = (row // 16).to(tl.int64) * chunks + chunk
    word = tl.load(codes_ptr + (block * 256 + (row % 16) * 16)[:, None] + j[None, :])
    high = word
    if BITS == 3:
        high = tl.load(high_ptr + (block * 128 + (row % 16) * 8)[:, None] + (j // 2)[None, :])
    for step in tl.static_range(LANES // 2):
        column = chunk * (LANES * 16) + step * 32 + k
        group = tl.minimum(column // GROUP, groups - 1)
        at = row[:, None] * groups + group[None, :]
        pairs = _pairs(word, high, step, BITS)
        w = _numbers(pairs, tl.zeros((BLOCK_N,), tl.float32), table_ptr, BITS, KIND, False, tl.float32, True)
        if AFFINE:
            w -= tl.load(zero_ptr + at).to(tl.float32)
        w *= _scale(tl.load(scale_ptr + at), SCALE)
        if GLOBAL:
            w *= tl.load(global_ptr + row)[:, None]
        out_at = out_ptr + n[:, None].to(tl.int64) * K + column[None, :]
        tl.store(out_at, w.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (column < K)[None, :])


def _operands(packed: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Pointers in the kernels' order; those that are never read point anywhere."""
    codes = packed["codes"]
    return tuple(packed.get(name, codes) for name in ("codes", "high", "scale", "zero_point", "table", "global_scale"))


def _constants(packed: dict[str, torch.Tensor], layout: Layout) -> dict[str, object]:
    return {
        "BITS": layout.bits, "LANES": layout.lanes, "GROUP": layout.group, "KIND": layout.kind, "SCALE": layout.scale,
        "AFFINE": layout.affine, "GLOBAL": "global_scale" in packed,
    }  # fmt: skip


def multiply(x: torch.Tensor, packed: dict[str, torch.Tensor], layout: Layout, tiles: Tiles) -> torch.Tensor:
    """x [M, K] times the packed weight, in parts that add up to it.

    Args:
        x: contiguous, float16, bfloat16 or float32.
        packed: what `layout.pack` returned.
        tiles: block sizes for this M; see `tuning`.

    Returns:
        [parts, M, N], in x's dtype when there is one part, else float32.
    """
    (rows, columns), outputs = x.shape, packed["scale"].shape[0]
    chunks_per_part = triton.cdiv(layout.chunks, tiles.split)
    parts = triton.cdiv(layout.chunks, chunks_per_part)
    out = torch.empty(parts, rows, outputs, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    grid = (triton.cdiv(rows, tiles.block_m), triton.cdiv(outputs, tiles.block_n), parts)
    _multiply[grid](
        x, *_operands(packed), out, rows, outputs, columns, layout.chunks, packed["scale"].shape[1], chunks_per_part,
        **_constants(packed, layout), EVEN=columns % layout.chunk == 0, SWAP=tiles.swap, WIDE=interpreted() or x.dtype == torch.float32,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


def dequantize(packed: dict[str, torch.Tensor], layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] in `dtype`, written to memory: what an unfused path multiplies with."""
    outputs, groups = packed["scale"].shape
    out = torch.empty(outputs, layout.columns, dtype=dtype, device=packed["codes"].device)
    _dequantize[(triton.cdiv(outputs, 64), layout.chunks)](
        *_operands(packed), out, outputs, layout.columns, layout.chunks, groups, **_constants(packed, layout),
        WIDE=True, BLOCK_N=64, num_warps=4,
    )  # fmt: skip
    return out
