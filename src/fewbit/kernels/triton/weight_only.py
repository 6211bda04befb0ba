"""y = x W^T with W dequantized in registers: a GEMV for few tokens, a tensor-core GEMM for many.

The GEMV is bound by the bytes of the codes. Each program owns BLOCK_N outputs and one of SPLIT parts of K (so that small layers fill the
GPU), walks its words and adds up in float32; the parts are summed by a second, tiny kernel in a fixed order, so results repeat bit by bit.

The GEMM multiplies tiles with `tl.dot`: for each lane of the words (see `layout`) one dot product of BLOCK_K words' worth of K.

An integer becomes a float without a conversion instruction: code | 0x4B000000 read as float32 is 2**23 + code. An E4M3 byte becomes a float
by moving its bits into those of a float16, whose exponent has one bit more: the value times 2**-8, subnormals included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fewbit.kernels.triton.layout import Layout
from fewbit.kernels.triton.tuning import Tiles

__all__ = ["matmul"]


@triton.jit
def _code(words, high, lane: tl.constexpr, odd, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    if BITS == 3:
        return ((words >> (2 * lane)) & 3) | (((high >> (lane + 16 * odd)) & 1) << 2)
    return (words >> (BITS * lane)) & ((1 << BITS) - 1)


@triton.jit
def _number(code, table_ptr, KIND: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes as float32, before zero point and scale."""
    if KIND == "int":
        return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1)))
    if KIND == "e4m3":
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.load(table_ptr + code)


@triton.jit
def _scale(stored, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    if SCALE == "e8m0":
        return (stored.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    if SCALE == "e4m3":
        half = stored.to(tl.int32) << 7
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return stored.to(tl.float32)


@triton.jit
def _step(scale_ptr, zero_ptr, n, group, groups, mask, SCALE: tl.constexpr, AFFINE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales and zero points of a tile of words [BLOCK_N, words]."""
    at = n[:, None] * groups + group[None, :]
    step = _scale(tl.load(scale_ptr + at, mask=mask, other=0), SCALE)
    zero = tl.load(zero_ptr + at, mask=mask, other=0).to(tl.float32) if AFFINE else 0.0
    return step, zero


@triton.jit
def _gemv(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, high_ptr, scale_ptr, zero_ptr, table_ptr, out_ptr, M, N, K, words, groups, words_per_split,
    BITS: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, PER_CHUNK: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    SCALE: tl.constexpr, AFFINE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    inside = n < N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * words_per_split
    for start in range(0, words_per_split, BLOCK_W):
        w = first + start + tl.arange(0, BLOCK_W)
        here = (w < words) & (w < first + words_per_split)
        mask = inside[:, None] & here[None, :]
        chunk = w // PER_CHUNK
        j = w % PER_CHUNK
        word = tl.load(codes_ptr + n[:, None] * words + w[None, :], mask=mask, other=0)
        high = 0
        if BITS == 3:
            high = tl.load(high_ptr + n[:, None] * (words // 2) + (w // 2)[None, :], mask=mask, other=0)
        step, zero = _step(scale_ptr, zero_ptr, n, chunk // (GROUP // CHUNK), groups, mask, SCALE, AFFINE)
        part = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_W), tl.float32)
        for lane in tl.static_range(LANES):
            k = chunk * CHUNK + lane * PER_CHUNK + j
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (here & (k < K))[None, :], other=0).to(tl.float32)
            value = _number(_code(word, high, lane, (w % 2)[None, :], BITS), table_ptr, KIND, BITS) - zero
            part += value[None, :, :] * x[:, None, :]
        total += tl.sum(part * step[None, :, :], axis=2)
    at = (split * M + m[:, None]) * N + n[None, :]
    tl.store(out_ptr + at, total, mask=(m < M)[:, None] & inside[None, :])


@triton.jit
def _gemm(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, high_ptr, scale_ptr, zero_ptr, table_ptr, global_ptr, bias_ptr, out_ptr, M, N, K, words, groups,
    BITS: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, PER_CHUNK: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    SCALE: tl.constexpr, AFFINE: tl.constexpr, GLOBAL: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, inside = m < M, n < N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, words, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        mask = inside[:, None] & (w < words)[None, :]
        chunk = w // PER_CHUNK
        j = w % PER_CHUNK
        word = tl.load(codes_ptr + n[:, None] * words + w[None, :], mask=mask, other=0)
        high = 0
        if BITS == 3:
            high = tl.load(high_ptr + n[:, None] * (words // 2) + (w // 2)[None, :], mask=mask, other=0)
        step, zero = _step(scale_ptr, zero_ptr, n, chunk // (GROUP // CHUNK), groups, mask, SCALE, AFFINE)
        for lane in tl.static_range(LANES):
            k = chunk * CHUNK + lane * PER_CHUNK + j
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=rows[:, None] & ((w < words) & (k < K))[None, :], other=0)
            value = (_number(_code(word, high, lane, (w % 2)[None, :], BITS), table_ptr, KIND, BITS) - zero) * step
            total = tl.dot(x, tl.trans(value.to(x.dtype)), total)
    if GLOBAL:
        total *= tl.load(global_ptr)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=inside, other=0).to(tl.float32)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], total.to(out_ptr.dtype.element_ty), mask=rows[:, None] & inside[None, :])


@triton.jit
def _sum_splits(  # type: ignore[no-untyped-def]
    part_ptr, global_ptr, bias_ptr, out_ptr, elements, N, SPLIT: tl.constexpr, GLOBAL: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(part_ptr + split * elements + at, mask=inside, other=0)
    if GLOBAL:
        total *= tl.load(global_ptr)
    if BIAS:
        total += tl.load(bias_ptr + at % N, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def matmul(x: torch.Tensor, packed: dict[str, torch.Tensor], bias: torch.Tensor | None, layout: Layout, tiles: Tiles) -> torch.Tensor:
    """x [M, K] times the packed weight, in x's dtype.

    Args:
        x: contiguous, float16, bfloat16 or float32.
        packed: what `layout.pack` returned.
        bias: [N] or None.
        tiles: block sizes for this M; see `tuning`.

    Returns:
        [M, N].
    """
    codes = packed["codes"]
    (rows, columns), outputs = x.shape, codes.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    nothing = codes  # a pointer that is never read
    operands = (codes, packed.get("high", nothing), packed["scale"], packed.get("zero_point", nothing), packed.get("table", nothing))
    overall, groups = packed.get("global_scale", nothing), packed["scale"].shape[1]
    constants = {
        "BITS": layout.bits, "LANES": layout.lanes, "CHUNK": layout.chunk, "PER_CHUNK": layout.words_per_chunk, "GROUP": layout.group,
        "KIND": layout.kind, "SCALE": layout.scale, "AFFINE": layout.affine, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "BLOCK_W": tiles.block_words, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
    }  # fmt: skip
    ends = {"GLOBAL": "global_scale" in packed, "BIAS": bias is not None}
    if not tiles.gemv:
        grid = (triton.cdiv(rows, tiles.block_m), triton.cdiv(outputs, tiles.block_n))
        _gemm[grid](
            x, *operands, overall, nothing if bias is None else bias, out, rows, outputs, columns, layout.words, groups, **constants, **ends
        )
        return out
    step = tiles.block_words
    words_per_split = triton.cdiv(triton.cdiv(layout.words, tiles.split), step) * step
    split = triton.cdiv(layout.words, words_per_split)
    parts = torch.empty(split, rows, outputs, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(outputs, tiles.block_n), split)
    _gemv[grid](x, *operands, parts, rows, outputs, columns, layout.words, groups, words_per_split, **constants)
    elements = rows * outputs
    _sum_splits[(triton.cdiv(elements, 1024),)](
        parts, overall, nothing if bias is None else bias, out, elements, outputs, SPLIT=split, BLOCK=1024, **ends
    )
    return out
