"""Grids: the finite set of numbers that a format can hold, and rounding to it.

A grid is a format without its scale: INT4 is the integers -8 .. 7, FP8 E4M3 the 253 finite numbers that one sign, four exponent and three
mantissa bits spell, NF4 sixteen quantiles of a normal distribution. Quantization divides by a scale and takes the nearest grid point; all
the rest of this layer is about choosing the scale.

    minifloat, bias = 2**(E-1) - 1, code = sign | exponent | mantissa:
        exponent > 0   (-1)**sign * 2**(exponent - bias) * (1 + mantissa / 2**M)          normal
        exponent = 0   (-1)**sign * 2**(1 - bias)        * (mantissa / 2**M)              subnormal, down to zero
    E4M3 (FN)   spends only the all-ones code on NaN and has no infinity: maximum 448       (arXiv 2209.05433, OCP OFP8)
    E5M2        is IEEE-like: exponent 31 is infinity and NaN: maximum 57,344                (the same)
    E2M1        has neither: 0, 0.5, 1, 1.5, 2, 3, 4, 6 with both signs                      (OCP Microscaling 1.0)
    NF4         the sixteen values of QLoRA's NormalFloat, in [-1, 1], with an exact zero    (arXiv 2305.14314, appendix E)

Floats round to the nearest with ties to the even code, as the hardware's converters do, and saturate: a cast of our own never makes an
infinity. (torch's plain cast saturates or overflows depending on the format and on the release, so values are clamped before it.)
Integers round half to even. Codes of the small tables are the number of midpoints below the value: no [values x grid points] table
of distances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from fewbit.errors import FormatError
from fewbit.formats.spec import NumberType, QuantSpec

__all__ = [
    "GRIDS",
    "NF4_VALUES",
    "Grid",
    "NativeSupport",
    "decode_values",
    "encode_values",
    "get_grid",
    "grid_maximum",
    "round_to_grid",
    "value_dtype",
]

# Fixed by the checkpoints that use them, so they are data and not recomputed; the tests derive them again from normal quantiles.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NativeSupport:
    """Hardware that multiplies a format without converting it first, and the document that says so."""

    hardware: str
    source: str


@dataclass(frozen=True)
class Grid:
    """The numbers a format can hold.

    Attributes:
        name: as `QuantSpec.grid_name` gives it, for example `fp8_e4m3`.
        label: for a person.
        type: as in QuantSpec; `float` also for the 16- and 32-bit formats, which are described and never quantized to.
        num_bits: bits of one code.
        minimum, maximum: the range of finite values, before any scale.
        smallest: smallest positive value.
        epsilon: distance from 1 to the next larger value (machine epsilon) of a float; None for the other types.
        codes: the value of each code in code order (integers: from the smallest), NaN and infinity included; empty above eight bits.
        native: who multiplies it in hardware; empty: nobody, it is a format for storage.
    """

    name: str
    label: str
    type: NumberType
    num_bits: int
    minimum: float
    maximum: float
    smallest: float
    epsilon: float | None
    codes: tuple[float, ...]
    native: tuple[NativeSupport, ...]

    def code_points(self) -> torch.Tensor:
        """The distinct finite values in ascending order, float32."""
        finite = sorted({c + 0.0 for c in self.codes if math.isfinite(c)})  # -0.0 and 0.0 are one point
        return torch.tensor(finite, dtype=torch.float32)


def _minifloat(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """The value of each code of E4M3FN, E5M2 or E2M1, by the equation in the header."""
    bias, fraction = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    positive = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, fraction)
        if exponent:
            positive.append(math.ldexp(1 + mantissa / fraction, exponent - bias))
        else:
            positive.append(math.ldexp(mantissa / fraction, 1 - bias))
    if exponent_bits == 4:
        positive[-1] = math.nan
    if exponent_bits == 5:
        positive[-fraction:] = [math.inf] + [math.nan] * (fraction - 1)
    return tuple(positive) + tuple(-p for p in positive)


_PTX = "NVIDIA PTX ISA, mma and tcgen05.mma data types"
_CDNA = "AMD CDNA 3 and CDNA 4 instruction set architecture, MFMA"
_X86 = "Intel Architecture Instruction Set Extensions Programming Reference"
_ARM = "Arm Architecture Reference Manual, FEAT_DotProd, FEAT_I8MM, FEAT_BF16"
_INT8_NATIVE = (
    NativeSupport("x86 CPUs with AVX-VNNI, AVX-512 VNNI or AMX-INT8", _X86),
    NativeSupport("Arm CPUs with DotProd or I8MM", _ARM),
    NativeSupport("NVIDIA Turing to Hopper tensor cores", _PTX),
    NativeSupport("AMD Instinct CDNA", _CDNA),
)
_INT4_NATIVE = (NativeSupport("NVIDIA Turing, Ampere and Ada tensor cores (4-bit weights AND activations only)", _PTX),)
_FP8_NATIVE = (
    NativeSupport("NVIDIA Ada, Hopper and Blackwell tensor cores", _PTX),
    NativeSupport("AMD Instinct MI350 (MI300 has the FNUZ variant with another bias)", _CDNA),
    NativeSupport("x86 CPUs with AMX-FP8", _X86),
)
_FP4_NATIVE = (
    NativeSupport("NVIDIA Blackwell tensor cores, with MXFP4 or NVFP4 block scales", _PTX),
    NativeSupport("AMD Instinct MI350, with MXFP4 block scales", _CDNA),
)
_BF16_NATIVE = (
    NativeSupport("x86 CPUs with AVX-512 BF16 or AMX-BF16", _X86),
    NativeSupport("Arm CPUs with BF16", _ARM),
    NativeSupport("NVIDIA Ampere and later tensor cores", _PTX),
    NativeSupport("AMD Instinct CDNA", _CDNA),
)
_FP16_NATIVE = (
    NativeSupport("x86 CPUs with AVX-512 FP16 or AMX-FP16", _X86),
    NativeSupport("NVIDIA Volta and later tensor cores", _PTX),
    NativeSupport("AMD Instinct CDNA", _CDNA),
)
_FP32_NATIVE = (NativeSupport("every CPU and GPU", "IEEE 754"),)


def _int_grid(num_bits: int, native: tuple[NativeSupport, ...]) -> Grid:
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    codes = tuple(float(v) for v in range(low, high + 1))
    return Grid(f"int{num_bits}", f"INT{num_bits}", "int", num_bits, low, high, 1.0, None, codes, native)


def _float_grid(num_bits: int, exponent_bits: int, native: tuple[NativeSupport, ...]) -> Grid:
    mantissa_bits = num_bits - 1 - exponent_bits
    codes = _minifloat(exponent_bits, mantissa_bits)
    finite = [c for c in codes if math.isfinite(c)]
    name = f"fp{num_bits}_e{exponent_bits}m{mantissa_bits}"
    smallest = min(c for c in finite if c > 0)
    label, epsilon = name.upper().replace("_", " "), 2.0**-mantissa_bits
    return Grid(name, label, "float", num_bits, min(finite), max(finite), smallest, epsilon, codes, native)


def _wide_grid(name: str, dtype: torch.dtype, smallest: float, native: tuple[NativeSupport, ...]) -> Grid:
    info = torch.finfo(dtype)
    return Grid(name, name.upper(), "float", info.bits, info.min, info.max, smallest, info.eps, (), native)


GRIDS: Mapping[str, Grid] = {
    grid.name: grid
    for grid in (
        _wide_grid("fp32", torch.float32, 2.0**-149, _FP32_NATIVE),
        _wide_grid("bf16", torch.bfloat16, 2.0**-133, _BF16_NATIVE),
        _wide_grid("fp16", torch.float16, 2.0**-24, _FP16_NATIVE),
        _float_grid(8, 4, _FP8_NATIVE),
        _float_grid(8, 5, _FP8_NATIVE),
        _float_grid(4, 2, _FP4_NATIVE),
        Grid("nf4", "NF4", "nf", 4, -1.0, 1.0, NF4_VALUES[8], None, NF4_VALUES, ()),
        _int_grid(8, _INT8_NATIVE),
        _int_grid(4, _INT4_NATIVE),
        _int_grid(3, ()),
        _int_grid(2, ()),
    )
}


def get_grid(name: str) -> Grid:
    """The grid of that name.

    Raises:
        FormatError: no such grid.
    """
    grid = GRIDS.get(name)
    if grid is None:
        raise FormatError(f"there is no number format '{name}'", f"choose one of {', '.join(GRIDS)}")
    return grid


_FP8_DTYPES = {4: torch.float8_e4m3fn, 5: torch.float8_e5m2}


def value_dtype(spec: QuantSpec) -> torch.dtype:
    """The dtype of `QuantizedTensor.values` for a spec: int8, a float8 dtype, or uint8 codes."""
    if spec.type == "int":
        return torch.int8
    if spec.type == "float" and spec.num_bits == 8:
        return _FP8_DTYPES[spec.exponent_bits or 0]
    return torch.uint8


def grid_maximum(spec: QuantSpec, codebook: torch.Tensor | None = None) -> float:
    """Largest magnitude on the positive side of the spec's grid; of a codebook its largest magnitude.

    Raises:
        FormatError: type `codebook` without a codebook, or an unknown grid.
    """
    if spec.type == "codebook":
        return float(_codebook(spec, codebook).abs().max())
    return get_grid(spec.grid_name).maximum


def _codebook(spec: QuantSpec, codebook: torch.Tensor | None) -> torch.Tensor:
    if codebook is None or codebook.ndim != 1 or not 2 <= codebook.numel() <= 2**spec.num_bits:
        got = "none" if codebook is None else f"one of shape {list(codebook.shape)}"
        raise FormatError(f"a {spec.num_bits}-bit codebook format got {got}", f"give a 1-D codebook of 2 to {2**spec.num_bits} values")
    return codebook


def _middles(ascending: torch.Tensor) -> torch.Tensor:
    return (ascending[1:] + ascending[:-1]) / 2


def _e2m1_boundaries() -> tuple[float, ...]:
    """Above which magnitudes the E2M1 code goes up by one. A value on a boundary stays below it; where a tie has to go up (to the even
    code) the boundary is the next float32 below the midpoint."""
    middle = _middles(torch.tensor(GRIDS["fp4_e2m1"].codes[:8]))
    tie_goes_up = torch.arange(7) % 2 == 1
    return tuple(torch.where(tie_goes_up, torch.nextafter(middle, torch.zeros(())), middle).tolist())


_E2M1_BOUNDARIES = _e2m1_boundaries()
_NF4_BOUNDARIES = tuple(_middles(torch.tensor(NF4_VALUES)).tolist())


@cache
def _table(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(GRIDS[name].codes, dtype=dtype, device=device)


def _count_below(x: torch.Tensor, boundaries: tuple[float, ...]) -> torch.Tensor:
    """How many boundaries lie below each value, uint8. For 7 or 15 of them, comparing takes a third of `torch.bucketize`'s time."""
    count = torch.gt(x, boundaries[0]).to(torch.uint8)
    above = torch.empty_like(count, dtype=torch.bool)
    for boundary in boundaries[1:]:
        count.add_(torch.gt(x, boundary, out=above).view(torch.uint8))
    return count


def encode_values(x: torch.Tensor, spec: QuantSpec, codebook: torch.Tensor | None = None) -> torch.Tensor:
    """Round scaled values to the grid: nearest, ties to even, saturating at the ends.

    Args:
        x: float32, any shape, already divided by the scale (integers with a zero point: already shifted by it and rounded). May be
        overwritten. codebook: [entries] for type `codebook`, in any order.

    Returns:
        The same shape in `value_dtype(spec)`. NaN has no code of its own in the integer and table formats: callers refuse it before.

    Raises:
        FormatError: an unknown grid, or a codebook that does not fit.
    """
    if spec.type == "int":
        low, high = -(2 ** (spec.num_bits - 1)), 2 ** (spec.num_bits - 1) - 1
        return x.round_().clamp_(low, high).to(torch.int8)
    if spec.type == "codebook":
        ascending, order = _codebook(spec, codebook).to(x).sort()
        return order.to(torch.uint8)[torch.bucketize(x, _middles(ascending))]
    grid = get_grid(spec.grid_name)
    if spec.type == "nf":
        return _count_below(x, _NF4_BOUNDARIES)
    if spec.num_bits == 8:
        return x.clamp_(grid.minimum, grid.maximum).to(value_dtype(spec))
    return _count_below(x.abs(), _E2M1_BOUNDARIES).add_(torch.signbit(x), alpha=8)


def round_to_grid(x: torch.Tensor, spec: QuantSpec, codebook: torch.Tensor | None = None) -> torch.Tensor:
    """The grid point nearest to each value: `decode_values(encode_values(x))` without the codes in between, several times as fast.

    A float with M mantissa bits steps by 2**(e - M) between 2**e and 2**(e+1). Adding 1.5 * 2**(23 - M + e) to a float32 and taking it away
    again rounds to multiples of just that step, ties to even.

    Args:
        x: float32, any shape, as for `encode_values`. May be overwritten.

    Returns:
        float32, x's shape.
    """
    if spec.type == "int":
        return x.round_().clamp_(-(2 ** (spec.num_bits - 1)), 2 ** (spec.num_bits - 1) - 1)
    if spec.type != "float":
        return decode_values(encode_values(x, spec, codebook), spec, codebook)
    grid, mantissa_bits = get_grid(spec.grid_name), spec.num_bits - 1 - (spec.exponent_bits or 0)
    x = x.clamp_(grid.minimum, grid.maximum)
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2**e: sign and mantissa cleared
    power.clamp_min_(grid.smallest * 2**mantissa_bits).mul_(1.5 * 2.0 ** (23 - mantissa_bits))
    return x.add_(power).sub_(power)


def decode_values(
    values: torch.Tensor, spec: QuantSpec, codebook: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The grid points that stored values stand for, before any zero point and scale; the inverse of `encode_values`.

    Args:
        values: any shape, in `value_dtype(spec)`.

    Returns:
        The same shape in `dtype`, contiguous for table formats; exact for int and float grids in BF16, FP16 and FP32.
    """
    if spec.type == "int":
        return values.to(dtype)
    if spec.type == "codebook":
        table = _codebook(spec, codebook).to(values.device, dtype)
    else:
        table = _table(get_grid(spec.grid_name).name, values.device, dtype)
    # FP8 too: torch's CPU cast from float8 takes six times as long as this look-up.
    codes = values.view(torch.uint8) if values.is_floating_point() else values
    return table.index_select(0, codes.reshape(-1).int()).view(values.shape)
