"""SmoothQuant (arXiv 2211.10438): move the difficulty of quantizing activations into the weights.

A few channels of a large model's activations are a hundred times larger than the others. In INT8 with one scale per token (or one for the
whole tensor) they leave the others a few integer steps; the weights, with one scale per output row, have no such columns. So the input
channels are divided by s and the weights' columns multiplied (`methods.folding`):

    s_k = max|x_k|^a / max|W_k|^(1 - a)               a: migration strength, 0: weights flat, 1: activations flat

The paper takes a = 0.5 for the whole model and searches it by hand for some. Here it is searched for each group of linears that share an
input, against the very error that W8A8 will make of their outputs on a sample of the calibration tokens X [n, K]:

    sum over the linears of || Qx(X / s) Qw(W diag(s))^T - X W^T ||^2

No quadratic form describes that error: how coarse a token's scale is depends on its largest channel.

**Static scales.** A static format has one scale per tensor, fixed at calibration, so that nothing is computed at run time: the largest
value seen, or the clipping with the least squared error on the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewbit.errors import FormatError
from fewbit.formats.quantize import dequantize, fake_quantize
from fewbit.formats.scales import Observer, round_scale, scale_as_float, scale_divisor
from fewbit.formats.spec import QuantSpec
from fewbit.formats.static import check_static, fake_quantize_static
from fewbit.methods.folding import shared
from fewbit.methods.rtn import rtn
from fewbit.methods.statistics import InputStatistics

__all__ = ["SmoothQuantResult", "SmoothQuantSettings", "quantize_inputs", "smoothquant_scales", "static_input_scale"]

_SHRINK_FACTORS = tuple(0.1 ** (i / 60) for i in range(61))


@dataclass(frozen=True)
class SmoothQuantSettings:
    """How the scales are searched.

    Attributes:
        strengths: migration strengths that are tried; one alone is taken as it is.
        most_rows: rows of a group's weights, all together, that the error is taken over.
        static_observer: how a static scale of the inputs is chosen, `minmax` or `mse`.
    """

    strengths: tuple[float, ...] = tuple(i / 20 for i in range(21))
    most_rows: int = 2048
    static_observer: Observer = "minmax"


@dataclass(frozen=True)
class SmoothQuantResult:
    """What the search found.

    Attributes:
        scale: float32 [K]; W diag(scale) is to be quantized and x / scale to be fed.
        strength: the migration strength; None when leaving everything as it is was best.
        error_before, error_after: relative output error of the group without scaling and with it.
        errors: (strength, relative output error) of everything that was tried.
    """

    scale: torch.Tensor
    strength: float | None
    error_before: float
    error_after: float
    errors: tuple[tuple[float, float], ...]


def smoothquant_scales(
    weights: Sequence[torch.Tensor],
    weight_spec: QuantSpec,
    input_spec: QuantSpec,
    statistics: InputStatistics,
    settings: SmoothQuantSettings | None = None,
    *,
    channels: torch.Tensor | None = None,
) -> SmoothQuantResult:
    """Search the scale of the input channels of all linears that read the same input.

    Args:
        weights: [out_i, K] each, floating point; not changed.
        weight_spec, input_spec: the formats of weights and inputs; inputs dynamic or static per tensor.
        statistics: of the common input, with a sample.
        settings: see SmoothQuantSettings. With a single strength no other is considered, not even leaving everything as it is.
        channels: int64 [K]: columns with the same number get the same scale; None when each column has its own.

    Raises:
        FormatError: weights of other widths than the statistics, or statistics without a sample.
    """
    settings = settings or SmoothQuantSettings()
    if not weights or any(w.ndim != 2 or w.shape[1] != statistics.columns for w in weights):
        raise FormatError(f"the weights {[list(w.shape) for w in weights]} do not read an input of width {statistics.columns}")
    if statistics.sample.shape[0] == 0:
        raise FormatError("SmoothQuant needs a sample of the inputs", "gather statistics with sample_tokens")
    inputs = statistics.max_abs
    columns = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    if channels is not None:
        count = int(channels.max()) + 1
        inputs, columns = (shared(values, channels, count)[channels] for values in (inputs, columns))
    step = max(1, -(-sum(w.shape[0] for w in weights) // settings.most_rows))
    rows = torch.cat([w[step // 2 :: step] if w.shape[0] > step // 2 else w[:1] for w in weights]).float()
    if weight_spec.strategy in ("tensor", "block"):
        rows = torch.cat([w.float() for w in weights])
    before = _output_error(rows, torch.ones(statistics.columns), weight_spec, input_spec, statistics, settings)
    best = SmoothQuantResult(torch.ones(statistics.columns), None, before, before, ())
    errors = []
    for strength in settings.strengths:
        scale = _scale(inputs, columns, strength)
        error = _output_error(rows, scale, weight_spec, input_spec, statistics, settings)
        errors.append((strength, error))
        if error < best.error_after or len(settings.strengths) == 1:
            best = SmoothQuantResult(scale, strength, before, error, ())
    return SmoothQuantResult(best.scale, best.strength, before, best.error_after, tuple(errors))


def _scale(inputs: torch.Tensor, columns: torch.Tensor, strength: float) -> torch.Tensor:
    """The paper's equation (4); channels that are dead on either side keep scale 1."""
    alive = (inputs > 0) & (columns > 0)
    safe_inputs, safe_columns = torch.where(alive, inputs, 1.0), torch.where(alive, columns, 1.0)
    scale = (safe_inputs**strength / safe_columns ** (1 - strength)).clamp(1e-5, 1e5)
    # A common factor changes neither rounding: geometric mean 1 keeps the folded norms' gains near where they were.
    scale = scale / scale[alive].log().mean().exp() if bool(alive.any()) else scale
    return torch.where(alive, scale, 1.0)


def _output_error(
    rows: torch.Tensor,
    scale: torch.Tensor,
    weight_spec: QuantSpec,
    input_spec: QuantSpec,
    statistics: InputStatistics,
    settings: SmoothQuantSettings,
) -> float:
    """Relative error of the outputs [tokens, rows] with both sides quantized."""
    sample = statistics.sample
    scaled = statistics.scaled(scale)
    static = None if input_spec.dynamic else static_input_scale(scaled, input_spec, observer=settings.static_observer)
    exact = sample @ rows.T
    weight = dequantize(rtn(rows * scale, weight_spec))
    error = quantize_inputs(scaled.sample, input_spec, static) @ weight.T - exact
    return float(error.norm() / exact.norm().clamp_min(1e-30))


def quantize_inputs(x: torch.Tensor, spec: QuantSpec, scale: torch.Tensor | None = None) -> torch.Tensor:
    """What a format does to activations: quantized and dequantized, x's shape and dtype.

    Args:
        x: [..., K].
        spec: dynamic, or static with one scale per tensor.
        scale: float32 [1], the static scale; None for dynamic formats.

    Raises:
        FormatError: a static format without a scale, or one that is not per tensor and symmetric.
    """
    if spec.dynamic:
        return fake_quantize(x, spec)
    if scale is None:
        raise FormatError(f"{spec} of the inputs is static and has no scale", "compute it with static_input_scale")
    return fake_quantize_static(x, scale, spec)


def static_input_scale(statistics: InputStatistics, spec: QuantSpec, *, observer: Observer = "minmax") -> torch.Tensor:
    """The one scale of a static activation format.

    Args:
        statistics: of the inputs; `mse` reads their sample.
        spec: per tensor, symmetric.
        observer: `minmax` covers everything seen; `mse` clips where the squared error of the sample is least.

    Returns:
        float32 [1].

    Raises:
        FormatError: a format that is not per tensor and symmetric, or `mse` without a sample.
    """
    check_static(spec)
    largest = statistics.max_abs.max().reshape(1)
    full = _stored(largest / scale_divisor(spec), spec)
    if observer == "minmax" or float(largest) == 0:
        return full
    sample = statistics.sample
    if sample.shape[0] == 0:
        raise FormatError("the clipping of a static scale is searched on a sample of the inputs", "gather statistics with sample_tokens")
    best, least = full, float("inf")
    for factor in _SHRINK_FACTORS:
        candidate = _stored(full * factor, spec)
        error = float((quantize_inputs(sample, spec, candidate) - sample).square().sum(dtype=torch.float64))
        if error < least:
            best, least = candidate, error
    return best


def _stored(scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    return scale_as_float(round_scale(scale.float(), spec.scale_dtype), spec)
