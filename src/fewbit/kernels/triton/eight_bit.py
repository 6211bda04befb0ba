"""y = (s_x q_x) (s_w q_w)^T with both sides in 8 bits, INT8 or FP8 E4M3: tensor cores multiply the codes as they are.

    y[m, n] = s_x[m] s_w[n] sum_k q_x[m, k] q_w[n, k]                      scales per channel or per tensor: applied once, at the end
    y[m, n] = s_x[m] sum_b s_w[n / 128, b] sum_{k in b} q_x q_w            128 x 128 blocks (DeepSeek-V3, arXiv 2412.19437): per block of K

Many tokens: torch's `_int_mm` and `_scaled_mm` (cuBLASLt, CUTLASS) are good, and are used. Few tokens: the weight's bytes bound the time,
`_int_mm` refuses M <= 16 and writes 32-bit sums; so a kernel of our own with K cut into parts, as for weights alone (`weight_only`).
"""

# ruff: noqa: SIM108 - branches on constants are taken when the kernel is compiled, and only as statements
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fewbit.kernels.triton.gpu_kernel import Rows

__all__ = ["multiply", "scaled_sums"]


@triton.jit(do_not_specialize=["M", "blocks"])
def _products(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, out_ptr, M, N, K, blocks, k_per_part, INTEGER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    rows, inside = m < M, n < N
    if INTEGER:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * k_per_part
    last = tl.minimum(first + k_per_part, K)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        here = k < last
        x = tl.load(x_ptr + m[:, None].to(tl.int64) * K + k[None, :], mask=rows[:, None] & here[None, :], other=0.0)
        w = tl.load(w_ptr + n[:, None].to(tl.int64) * K + k[None, :], mask=inside[:, None] & here[None, :], other=0.0)
        if INTEGER:
            sums = tl.dot(x, tl.trans(w), sums, out_dtype=tl.int32)
        elif BLOCK_COLUMNS > 0:
            at = (n // BLOCK_ROWS) * blocks + start // BLOCK_COLUMNS
            scale = tl.load(w_scale_ptr + at, mask=inside, other=0).to(tl.float32)
            sums += tl.dot(x, tl.trans(w), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale[None, :]
        else:
            sums = tl.dot(x, tl.trans(w), sums)
    y = sums.to(tl.float32) * tl.load(x_scale_ptr + m, mask=rows, other=0)[:, None]
    if BLOCK_COLUMNS == 0:
        y *= tl.load(w_scale_ptr + n, mask=inside, other=0).to(tl.float32)[None, :]
    at = (part * M + m[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=rows[:, None] & inside[None, :])


@triton.jit
def _scaled_sums(  # type: ignore[no-untyped-def]
    sums_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, N, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    y = tl.load(sums_ptr + row * N + n, mask=inside, other=0).to(tl.float32) * tl.load(x_scale_ptr + row)
    y *= tl.load(w_scale_ptr + n, mask=inside, other=0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + row * N + n, y.to(out_ptr.dtype.element_ty), mask=inside)


def multiply(
    x: Rows, values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, *, block_shape: tuple[int, int] | None = None, parts: int = 1
) -> torch.Tensor:
    """Products of codes by the kernel of our own.

    Args:
        x: codes [M, K] and their scales.
        values: [N, K] in x's code dtype, contiguous.
        scale: float32 [N], or [blocks of rows, blocks of columns] with `block_shape`.
        dtype: of the result where there is one part; several are float32.
        block_shape: rows and columns that share a scale; 128 divides the columns.
        parts: that K is cut into.

    Returns:
        [parts, M, N]; the parts add up to y.
    """
    assert x.scale is not None
    (rows, columns), outputs = x.values.shape, values.shape[0]
    block_k = 128
    k_per_part = triton.cdiv(triton.cdiv(columns, parts), block_k) * block_k
    parts = triton.cdiv(columns, k_per_part)
    out = torch.empty(parts, rows, outputs, dtype=dtype if parts == 1 else torch.float32, device=values.device)
    block_m = min(max(triton.next_power_of_2(rows), 16), 128)
    block_n = 32 if block_m == 16 else 64 if block_m <= 64 else 128
    grid = (triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n), parts)
    _products[grid](
        x.values, values, x.scale, scale, out, rows, outputs, columns, scale.shape[-1], k_per_part, INTEGER=values.dtype == torch.int8,
        BLOCK_ROWS=block_shape[0] if block_shape else 0, BLOCK_COLUMNS=block_shape[1] if block_shape else 0,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=8 if block_m == 128 else 4,
        num_stages=4 if block_m == 16 else 2,  # 99 KiB of shared memory are enough
    )  # fmt: skip
    return out


def scaled_sums(
    sums: torch.Tensor, x_scale: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """int32 sums [M, N] times the scales of rows and columns, plus the bias, in `dtype`."""
    rows, outputs = sums.shape
    out = torch.empty(rows, outputs, dtype=dtype, device=sums.device)
    grid = (rows, triton.cdiv(outputs, 1024))
    _scaled_sums[grid](sums, x_scale, scale, sums if bias is None else bias, out, outputs, BIAS=bias is not None, BLOCK=1024, num_warps=4)
    return out
