"""What happens to a row of activations between two products, in one pass: add, normalize, quantize.

    h = x + residual                         written back: the residual stream
    n = h / sqrt(mean(h**2) + epsilon) * w   RMSNorm (arXiv 1910.07467)
    s = max |n| / D,  q = round(n / s)       one scale per token, D = 127.5 for INT8, 448 for FP8 E4M3; or a static s

A W8A8 linear that quantizes its inputs in a kernel of its own reads and writes every activation twice more than one whose codes come out of
the norm. x may be the parts of a split-K product, float32 [parts, M, K]; they are added up here, so that no kernel has to do only that.

Values are rounded to the model's dtype where transformers rounds them: after the sum, after the division and after the weight. Codes are
those of `formats.quantize.quantize_dynamic`: division and rounding are IEEE's. A row with a NaN or an infinity gets the scale NaN, and with
it NaN as its product: codes alone could not show it.
"""

# ruff: noqa: SIM108 - branches on constants are taken when the kernel is compiled, and only as statements
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fewbit.formats.scales import SMALLEST_SCALE, scale_divisor
from fewbit.formats.spec import QuantSpec
from fewbit.kernels.triton.gpu_kernel import Rows

__all__ = ["finish", "process_rows", "silu_product"]

_LONGEST = 16384  # columns of a row that one program holds: 32 numbers in each of 512 threads
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken away it rounds a float32 to an integer, ties to even


@triton.jit
def _round(x):  # type: ignore[no-untyped-def]
    return (x + _MAGIC) - _MAGIC


@triton.jit
def _to_e4m3(x):  # type: ignore[no-untyped-def]
    """Rounded to the grid in float32 (see `formats.grids.round_to_grid`), so that the cast is exact on every device."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.maximum(power, 0.015625) * 1572864.0  # 2**-6, and 1.5 * 2**(23 - 3)
    return ((x + power) - power).to(tl.float8e4nv)


@triton.jit
def _codes(x, scale, CODES: tl.constexpr):  # type: ignore[no-untyped-def]
    quotient = tl.div_rn(x, tl.zeros_like(x) + scale)
    if CODES == "int8":
        codes = _round(tl.minimum(tl.maximum(quotient, -128.0), 127.0)).to(tl.int8)
    else:
        codes = _to_e4m3(quotient)
    return codes


@triton.jit(do_not_specialize=["M"])
def _process(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, residual_ptr, weight_ptr, static_ptr, values_ptr, scale_ptr, M, K, epsilon, divisor, smallest,
    PARTS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, CODES: tl.constexpr, STATIC: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    at = row * K + k
    x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * M * K + at, mask=inside, other=0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + k, mask=inside, other=0).to(tl.float32)
    x = x.to(DTYPE).to(tl.float32)
    if RESIDUAL:
        x = (x + tl.load(residual_ptr + at, mask=inside, other=0).to(tl.float32)).to(DTYPE).to(tl.float32)
        tl.store(residual_ptr + at, x.to(DTYPE), mask=inside)
    if NORM:
        mean = tl.sum(x * x, axis=0) / K
        x = (x * (1.0 / tl.sqrt_rn(mean + epsilon))).to(DTYPE).to(tl.float32)
        x = (x * tl.load(weight_ptr + k, mask=inside, other=0).to(tl.float32)).to(DTYPE).to(tl.float32)
    if CODES == "none":
        tl.store(values_ptr + at, x.to(DTYPE), mask=inside)
    else:
        if STATIC:
            scale = tl.load(static_ptr)
        else:
            scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), axis=0), divisor), smallest)
        tl.store(values_ptr + at, _codes(x, scale, CODES), mask=inside)
        tl.store(scale_ptr + row, scale + tl.sum(x * 0.0, axis=0))  # NaN where the row is not finite


@triton.jit
def _quantize_long(  # type: ignore[no-untyped-def]
    x_ptr, static_ptr, values_ptr, scale_ptr, K, divisor, smallest, CODES: tl.constexpr, STATIC: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes alone of a row that registers cannot hold: it is read twice, the second time from a cache."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    spoiled = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * K + start + k, mask=k < K - start, other=0).to(DTYPE).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        spoiled += x * 0.0
    if STATIC:
        scale = tl.load(static_ptr)
    else:
        scale = tl.maximum(tl.div_rn(tl.max(largest, axis=0), divisor), smallest)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * K + start + k, mask=k < K - start, other=0).to(DTYPE).to(tl.float32)
        tl.store(values_ptr + row * K + start + k, _codes(x, scale, CODES), mask=k < K - start)
    tl.store(scale_ptr + row, scale + tl.sum(spoiled, axis=0))


@triton.jit(do_not_specialize=["M"])
def _silu_product(x_ptr, out_ptr, M, N, PARTS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        at = part * M * 2 * N + row * 2 * N + n
        gate += tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
        up += tl.load(x_ptr + at + N, mask=inside, other=0).to(tl.float32)
    gate, up = gate.to(DTYPE).to(tl.float32), up.to(DTYPE).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    tl.store(out_ptr + row * N + n, (gate * up).to(DTYPE), mask=inside)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    sums_ptr, bias_ptr, out_ptr, elements, N, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    y = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(sums_ptr + part * elements + at, mask=inside, other=0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + at % N, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def process_rows(
    x: torch.Tensor,
    dtype: torch.dtype,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    inputs: QuantSpec | None = None,
    static: torch.Tensor | None = None,
) -> Rows:
    """The pass of the module's header.

    Args:
        x: [M, K], or the parts of a sum, [parts, M, K]; contiguous, any floating dtype.
        dtype: of the model.
        bias: [K], added to the sum of parts.
        residual: [M, K] in `dtype`, contiguous: replaced by its sum with x.
        norm: RMSNorm's weight [K] and epsilon.
        inputs: INT8 or FP8 E4M3, symmetric, per token or static per tensor; None: nothing is quantized.
        static: float32 [1], the scale of a static format.
    """
    parts, (rows, columns) = (1 if x.ndim == 2 else x.shape[0]), x.shape[-2:]
    codes = "none" if inputs is None else "int8" if inputs.type == "int" else "e4m3"
    kind = dtype if inputs is None else torch.int8 if codes == "int8" else torch.float8_e4m3fn
    values = torch.empty(rows, columns, dtype=kind, device=x.device)
    scale = None if inputs is None else torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    if block > _LONGEST and inputs is not None and parts == 1 and bias is None and residual is None and norm is None:
        _quantize_long[(rows,)](
            x, _or(static, x), values, scale, columns, scale_divisor(inputs), SMALLEST_SCALE["float32"], CODES=codes,
            STATIC=static is not None, DTYPE=_TRITON_DTYPES[dtype], BLOCK=_LONGEST, num_warps=16,
        )  # fmt: skip
        return Rows(values, scale)
    _process[(rows,)](
        x, _or(bias, x), _or(residual, x), x if norm is None else norm[0], _or(static, x), values, _or(scale, x), rows, columns,
        0.0 if norm is None else norm[1], 1.0 if inputs is None else scale_divisor(inputs), SMALLEST_SCALE["float32"],
        PARTS=parts, BIAS=bias is not None, RESIDUAL=residual is not None, NORM=norm is not None, CODES=codes, STATIC=static is not None,
        DTYPE=_TRITON_DTYPES[dtype], BLOCK=block, num_warps=min(max(block // 1024, 4), 32),
    )  # fmt: skip
    return Rows(values, scale)


def silu_product(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """silu(gate) * up, [M, N] in `dtype`.

    Args:
        x: gate and up side by side, [M, 2 N], or the parts of their sums, [parts, M, 2 N]; contiguous.
    """
    parts, (rows, both) = (1 if x.ndim == 2 else x.shape[0]), x.shape[-2:]
    out = torch.empty(rows, both // 2, dtype=dtype, device=x.device)
    grid = (rows, triton.cdiv(both // 2, 512))
    _silu_product[grid](x, out, rows, both // 2, PARTS=parts, DTYPE=_TRITON_DTYPES[dtype], BLOCK=512, num_warps=4)
    return out


def finish(sums: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sum of parts [parts, M, N] plus the bias [N]: [M, N] in `dtype`."""
    parts, rows, outputs = sums.shape
    if parts == 1 and bias is None and sums.dtype == dtype:
        return sums[0]
    out = torch.empty(rows, outputs, dtype=dtype, device=sums.device)
    grid = (triton.cdiv(rows * outputs, 1024),)
    _finish[grid](sums, _or(bias, sums), out, rows * outputs, outputs, PARTS=parts, BIAS=bias is not None, BLOCK=1024, num_warps=4)
    return out


def _or(tensor: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """A pointer that is never read where there is none."""
    return instead if tensor is None else tensor
