"""Scales: how wide one step of a grid is.

    symmetric   x ~ q * scale                      scale = max|x| / D
    affine      x ~ (q - zero_point) * scale       scale = (max - min) / (2**b - 1), zero_point = round(q_min - min / scale)

**The symmetric divisor D.** Three conventions are in use for integers. D = 2**(b-1) - 1 (7 for INT4) leaves the code -8 unused and wastes
1/16 of the range; with two bits it leaves three levels. D = 2**(b-1) (llama.cpp's Q4_0, with the sign of the largest value) hits one end
exactly and misses the other by a whole step. D = (2**b - 1) / 2 (7.5), which compressed-tensors, llm-compressor and so vLLM's checkpoints
use, spends half a step on each side: the largest value of either sign lies half a step outside the last code, so no value errs by more
than half a step, and the step is the smallest for which that holds. We take 7.5. For floats D is the largest value (448, 57,344, 6), for
NF4 it is 1.

**Rounding the scale.** The scale is rounded to the dtype in which it is stored before anything is quantized with it, so that what is
measured is what is stored. A BF16 scale is off by up to 2**-9, which costs up to 2**(b-1) * 2**-9 of a step at the ends of the range: 1/4
step for INT8.

**E8M0** (OCP Microscaling 1.0, section 6.3): the exponent is floor(log2(max|x|)) - floor(log2(D)), a power of two, and the largest values
may saturate (max|x| = 7.9 becomes 6).

**NVFP4**: global = max|W| / (448 * 6) in FP32, then the scales of 16 values fit E4M3; the largest block stores 448. The MSE observer
divides by 256 instead of 448, so that there is room above the largest block.

**E8M0 and E4M3 scales under MSE**: the stored codes around min-max are tried one by one (`scale_codes`), upwards too.

**MSE observer**: outliers set the step for everybody. Tries smaller ranges and keeps, per scale, the one with the least
(importance-weighted) squared error; min-max is the first candidate, so the result is never worse than it.

For symmetric integers each candidate is first moved to the best scale for its own codes: with q = round(x / s) fixed, the weighted least
squares scale is <q, x> / <q, q> (`scale_search`). Twenty such candidates beat eighty of a fixed series.

**Negative scales.** A symmetric integer grid is not symmetric: -8 to 7. A negative scale turns it over, so that the code of the larger end
serves the side that needs it. The MSE observer tries both signs at four bits and fewer, where a step more on one side counts (at three bits
it takes 5 to 7 % off the error); kernels multiply by a scale of either sign. Min-max scales are always positive.

Edges: an all-zero group gets scale 1 and values 0; a group whose scale would fall below the dtype's smallest value (`SMALLEST_SCALE`) gets
that one, its values shrink towards 0; a scale above the dtype's maximum saturates.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch

from fewbit.errors import FormatError
from fewbit.formats.grids import grid_maximum, round_to_grid
from fewbit.formats.grouping import CHUNK_ELEMENTS, check_matrix, row_chunks, to_groups
from fewbit.formats.native import native_extension
from fewbit.formats.scale_codes import HEADROOM, neighbouring_scales
from fewbit.formats.scale_search import scale_search
from fewbit.formats.spec import QuantSpec, ScaleDtype

__all__ = ["SMALLEST_SCALE", "Observer", "compute_scales", "round_scale", "scale_as_float", "scale_divisor", "zero_points"]

Observer: TypeAlias = Literal["minmax", "mse"]

# Smallest scale that is stored. BF16 and FP32 stop at the smallest normal number, because kernels flush subnormal ones to zero.
SMALLEST_SCALE: dict[ScaleDtype, float] = {
    "float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24, "float8_e4m3fn": 2.0**-9, "e8m0": 2.0**-127,
}  # fmt: skip
_TORCH_DTYPES: dict[ScaleDtype, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float8_e4m3fn": torch.float8_e4m3fn,
}  # fmt: skip
_E8M0_BIAS = 127
# 1 down to 0.1, 5.6 % apart: at most 2.9 % from the best, and around the best the error is flat.
_SHRINK_FACTORS = tuple(0.1 ** (i / 40) for i in range(41))


def scale_divisor(spec: QuantSpec, codebook: torch.Tensor | None = None) -> float:
    """D of the module's header: the magnitude, in grid units, that the largest value of a group is mapped to."""
    if spec.scale_dtype == "e8m0":
        return math.ldexp(1.0, math.frexp(grid_maximum(spec, codebook))[1] - 1)
    if spec.type == "int":
        return float(2**spec.num_bits - 1) / 2
    return grid_maximum(spec, codebook)


def round_scale(ideal: torch.Tensor, scale_dtype: ScaleDtype) -> torch.Tensor:
    """Round positive float32 scales to the stored dtype (E8M0: down to a power of two, as its uint8 exponent with bias 127); saturates."""
    if scale_dtype == "e8m0":
        exponent = torch.frexp(ideal).exponent - 1 + _E8M0_BIAS
        return exponent.clamp_(0, 254).to(torch.uint8)
    dtype = _TORCH_DTYPES[scale_dtype]
    return ideal.clamp(SMALLEST_SCALE[scale_dtype], torch.finfo(dtype).max).to(dtype)


def scale_as_float(scale: torch.Tensor, spec: QuantSpec, global_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Stored scales as the float32 numbers that values are multiplied with, the global scale included."""
    if spec.scale_dtype == "e8m0":
        # The exponent is the float's own bits, exact on every device; exponent 0 (2**-127) is a subnormal float32.
        as_float = (scale.to(torch.int32) << 23).clamp_min_(1 << 22).view(torch.float32)
    else:
        as_float = scale.to(torch.float32)
    return as_float if global_scale is None else as_float * global_scale.to(torch.float32)


def zero_points(low: torch.Tensor, scale: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Zero points, int8, for ranges that start at `low` <= 0: the code that stands for exactly 0.

    Args:
        scale: the float32 value of the stored scale, same shape as `low`.
    """
    q_min, q_max = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    zero_point: torch.Tensor = q_min - torch.round(low / scale)
    return zero_point.clamp_(q_min, q_max).to(torch.int8)


def _fit(
    low: torch.Tensor, high: torch.Tensor, spec: QuantSpec, divisor: float, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored scales and zero points for the ranges low <= 0 <= high, float32 of the scales' shape."""
    ideal = torch.maximum(-low, high) / divisor if spec.symmetric else (high - low) / (2**spec.num_bits - 1)
    if global_scale is not None:
        ideal = ideal / global_scale
    empty = low == high
    scale = round_scale(torch.where(empty, 1.0, ideal), spec.scale_dtype)
    if spec.symmetric:
        return scale, None
    return scale, zero_points(low, scale_as_float(scale, spec), spec.num_bits).masked_fill_(empty, 0)


def _squared_error(
    groups: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    weights: torch.Tensor | None,
    codebook: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """Sum over the last dimension of weights * (x - dequantized x)**2; `scale` is float32."""
    step = scale.unsqueeze(-1)
    scaled = groups / step
    if zero_point is not None:
        scaled = scaled.round_().add_(zero_point.unsqueeze(-1))
    decoded = round_to_grid(scaled, spec, codebook)
    if zero_point is not None:
        decoded -= zero_point.unsqueeze(-1)
    error = decoded.mul_(step).sub_(groups).square_()
    if weights is not None:
        error *= weights
    return error.sum(-1)


def _scales_of_rows(
    rows: torch.Tensor,
    spec: QuantSpec,
    observer: Observer,
    importance: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    codebook: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    groups = to_groups(rows, spec)
    low, high = groups.amin(-1), groups.amax(-1)  # two passes, which torch vectorizes; its aminmax takes two and a half times as long
    low, high = low.clamp_max_(0.0), high.clamp_min_(0.0)  # affine codes have an exact zero: padding, pruned weights and ReLU stay exact
    divisor = scale_divisor(spec, codebook)
    scale, zero_point = _fit(low, high, spec, divisor, global_scale)
    if observer == "minmax":
        return scale, zero_point
    coded = spec.symmetric and spec.scale_dtype in ("e8m0", "float8_e4m3fn")
    if spec.type == "int" and spec.symmetric and spec.scale_dtype != "e8m0":
        search = scale_search(rows, scale.shape, spec, importance)
        found = search.best(scale.float())
        rounded = round_scale(found.abs(), spec.scale_dtype) * torch.where(found < 0, -1.0, 1.0).to(scale.dtype)
        return torch.where(search.error(rounded.float()) < search.error(scale.float()), rounded, scale), None
    weights = None if importance is None else to_groups(importance.expand(rows.shape), spec)
    best = _squared_error(groups, scale_as_float(scale, spec, global_scale), zero_point, weights, codebook, spec)
    fits = (_fit(low * factor, high * factor, spec, divisor, global_scale) for factor in _SHRINK_FACTORS[1:])
    for candidate, candidate_zero in ((code, zero_point) for code in neighbouring_scales(scale, spec.scale_dtype)) if coded else fits:
        error = _squared_error(groups, scale_as_float(candidate, spec, global_scale), candidate_zero, weights, codebook, spec)
        better = error < best
        best = torch.where(better, error, best)
        # through float32: torch.where has no float8 kernel on every device
        scale = torch.where(better, candidate.float(), scale.float()).to(scale.dtype)
        if zero_point is not None and candidate_zero is not None:
            zero_point = torch.where(better, candidate_zero, zero_point)
    return scale, zero_point


def _chunk_elements(weight: torch.Tensor, spec: QuantSpec, observer: Observer) -> int:
    """Weights per chunk: many where nothing of their size is made, because each chunk starts threads several times."""
    nothing_made = weight.dtype == torch.float32 and spec.type == "int" and spec.symmetric and native_extension() is not None
    return CHUNK_ELEMENTS << 4 if nothing_made or (observer == "minmax" and weight.dtype == torch.float32) else CHUNK_ELEMENTS


def compute_scales(
    weight: torch.Tensor,
    spec: QuantSpec,
    *,
    observer: Observer = "minmax",
    importance: torch.Tensor | None = None,
    codebook: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Choose scales and zero points for a weight.

    Args:
        weight: [out, in], floating point.
        observer: `minmax` covers the whole range; `mse` searches for the range with the least squared error.
        importance: [in], non-negative weight of each column's squared error (for example the mean square of the inputs); only read by
        `mse`. codebook: [entries] for type `codebook`.

    Returns:
        scale in `spec.scale_dtype` (E8M0: uint8 exponents), shape by strategy as in `formats.grouping`; zero_point int8 of that shape or
        None; global_scale float32 [1] or None.

    Raises:
        FormatError: the weight or the importance does not fit (`check_matrix`), or an unknown observer.
    """
    check_matrix(weight, spec)
    if observer not in ("minmax", "mse"):
        raise FormatError(f"there is no observer '{observer}'", "choose minmax or mse")
    if importance is not None:
        if importance.shape != (weight.shape[1],):
            raise FormatError(f"importance has shape {list(importance.shape)}, the weight has {weight.shape[1]} input columns")
        importance = importance.to(weight.device, torch.float32)
    global_scale = None
    if spec.global_scale:
        largest = weight.abs().max().float().reshape(1)
        ideal = largest / (torch.finfo(torch.float8_e4m3fn).max * scale_divisor(spec, codebook))
        ideal = ideal * HEADROOM if observer == "mse" else ideal
        global_scale = torch.where(largest > 0, ideal.clamp_min(SMALLEST_SCALE["float32"]), 1.0)
    parts = [
        _scales_of_rows(weight[rows].float(), spec, observer, importance, global_scale, codebook)
        for rows in row_chunks(spec, weight.shape[0], weight.shape[1], _chunk_elements(weight, spec, observer))
    ]
    zeros = [zero_point for _, zero_point in parts if zero_point is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None, global_scale
