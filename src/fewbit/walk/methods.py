"""The methods that a walk can carry out, one row each: what a method must know of the inputs, and the function that applies it.

The functions of `fewbit.methods` know tensors; a walk knows blocks. Between them stand the small adapters of this file, all with one
signature. To add a rounding: its function in `fewbit.methods`, an adapter here, a row in `ROUNDING_STEPS` and its name in `walk.settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fewbit.formats.scales import Observer
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.methods.awq import AWQSettings, awq_scales
from fewbit.methods.clipping import ClipSettings, clip
from fewbit.methods.gptq import gptq
from fewbit.methods.hqq import hqq
from fewbit.methods.rtn import rtn
from fewbit.methods.smoothquant import SmoothQuantSettings, smoothquant_scales
from fewbit.methods.statistics import InputStatistics
from fewbit.walk.settings import WalkSettings

__all__ = ["ROUNDING_STEPS", "TRANSFORM_STEPS", "Needs", "Rounded", "RoundingStep", "Scaling", "TransformStep", "retries"]

_HESSIAN_COLUMNS = 2048  # up to this width AWQ's error is taken over the exact second moments, beyond over a sample of tokens
_SAMPLE_TOKENS = 2048


@dataclass(frozen=True)
class Needs:
    """What a method must know of the inputs of a linear.

    Attributes:
        inputs: anything at all. hessian, cross, sample_tokens: as in `InputStatistics`.
    """

    inputs: bool = False
    hessian: bool = False
    cross: bool = False
    sample_tokens: int = 0

    def statistics(self, columns: int) -> InputStatistics:
        """Empty statistics of an input of that width."""
        return InputStatistics(columns, hessian=self.hessian, cross=self.cross, sample_tokens=self.sample_tokens)


@dataclass(frozen=True)
class Rounded:
    """One rounded weight and what is to be reported of it."""

    quantized: QuantizedTensor
    method: str
    dampening: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RoundingStep:
    """A row of the table.

    Attributes:
        needs: for given settings.
        apply: (weights [out_i, K] that share an input, spec, statistics, settings) -> one result each. Statistics are None where the step
            needs none and nothing is known.
    """

    needs: Callable[[WalkSettings], Needs]
    apply: Callable[[Sequence[torch.Tensor], QuantSpec, InputStatistics | None, WalkSettings], list[Rounded]]


@dataclass(frozen=True)
class Scaling:
    """What a transform found: scale [K], columns are multiplied by it; relative output errors before and after, as the search saw them."""

    scale: torch.Tensor
    error_before: float
    error_after: float
    what: str


@dataclass(frozen=True)
class TransformStep:
    """A row of the table.

    Attributes:
        needs: for an input of a given width.
        apply: (weights, scheme, statistics, settings, channels) -> Scaling, `channels` as in `methods.awq.awq_scales`.
    """

    needs: Callable[[int], Needs]
    apply: Callable[[Sequence[torch.Tensor], Scheme, InputStatistics, WalkSettings, torch.Tensor | None], Scaling]


# ------------------------------------------------------------------------------------------------------------------ rounding


def _clips(settings: WalkSettings) -> bool:
    """AWQ's own way to round: the range of each group searched against the output error; a named observer takes its place."""
    return settings.recipe.transform == "awq" and settings.observer is None


def _rtn_needs(settings: WalkSettings) -> Needs:
    return Needs(inputs=settings.recipe.transform == "awq", hessian=_clips(settings))


def _rtn(weights: Sequence[torch.Tensor], spec: QuantSpec, statistics: InputStatistics | None, settings: WalkSettings) -> list[Rounded]:
    if _clips(settings) and statistics is not None and statistics.tokens:
        chosen = ClipSettings(seed=settings.seed)
        return [Rounded(clip(weight, spec, statistics, chosen), "clip") for weight in weights]
    observer: Observer = settings.observer or "minmax"
    importance = statistics.mean_square if statistics is not None and statistics.tokens and observer == "mse" else None
    return [Rounded(rtn(weight, spec, observer=observer, importance=importance), "rtn") for weight in weights]


def _gptq_needs(settings: WalkSettings) -> Needs:
    return Needs(inputs=True, hessian=True, cross=settings.gptq.compensation > 0)


def _gptaq_settings(settings: WalkSettings) -> WalkSettings:
    """GPTAQ is GPTQ with full compensation, unless the settings name a share of their own."""
    return settings if settings.gptq.compensation else replace(settings, gptq=replace(settings.gptq, compensation=1.0))


def _gptq(weights: Sequence[torch.Tensor], spec: QuantSpec, statistics: InputStatistics | None, settings: WalkSettings) -> list[Rounded]:
    assert statistics is not None
    rounded = []
    for result in gptq(weights, spec, statistics, settings.gptq):
        notes = (f"{result.dead_columns} dead input columns",) if result.dead_columns else ()
        rounded.append(Rounded(result.quantized, "gptq", result.dampening, notes))
    return rounded


def _hqq(weights: Sequence[torch.Tensor], spec: QuantSpec, statistics: InputStatistics | None, settings: WalkSettings) -> list[Rounded]:
    return [Rounded(hqq(weight, spec), "hqq") for weight in weights]


def _llm_int8(
    weights: Sequence[torch.Tensor], spec: QuantSpec, statistics: InputStatistics | None, settings: WalkSettings
) -> list[Rounded]:
    """The weights are plain INT8: what the method does, it does to the inputs, at run time (scheme LLM-INT8)."""
    return [Rounded(rtn(weight, spec), "llm_int8") for weight in weights]


def _gptaq(weights: Sequence[torch.Tensor], spec: QuantSpec, statistics: InputStatistics | None, settings: WalkSettings) -> list[Rounded]:
    return [replace(one, method="gptaq") for one in _gptq(weights, spec, statistics, _gptaq_settings(settings))]


ROUNDING_STEPS: Mapping[str, RoundingStep] = {
    "rtn": RoundingStep(_rtn_needs, _rtn),
    "gptq": RoundingStep(_gptq_needs, _gptq),
    "gptaq": RoundingStep(lambda settings: _gptq_needs(_gptaq_settings(settings)), _gptaq),
    "hqq": RoundingStep(lambda settings: Needs(), _hqq),
    "llm_int8": RoundingStep(lambda settings: Needs(), _llm_int8),
}


def retries(settings: WalkSettings) -> list[tuple[str, str, WalkSettings]]:
    """What is tried, in turn, for a layer that fails its check: (what, rounding, settings). The last resort is high precision."""
    rounding = settings.recipe.rounding
    tried = [("clip" if rounding == "rtn" and _clips(settings) else rounding, rounding, settings)]
    if rounding in ("gptq", "gptaq"):
        for times in (10, 100):
            stronger = replace(settings.gptq, dampening=settings.gptq.dampening * times)
            tried.append((f"{rounding} with dampening {stronger.dampening:g}", rounding, replace(settings, gptq=stronger)))
    if rounding != "rtn" or _clips(settings):
        tried.append(("rtn", "rtn", replace(settings, observer="mse")))
    return tried


# ---------------------------------------------------------------------------------------------------------------- transforms


def _awq_needs(columns: int) -> Needs:
    exact = columns <= _HESSIAN_COLUMNS
    return Needs(inputs=True, hessian=exact, sample_tokens=0 if exact else _SAMPLE_TOKENS)


def _awq(
    weights: Sequence[torch.Tensor], scheme: Scheme, statistics: InputStatistics, settings: WalkSettings, channels: torch.Tensor | None
) -> Scaling:
    assert scheme.weights is not None
    result = awq_scales(weights, scheme.weights, statistics, AWQSettings(seed=settings.seed), channels=channels)
    what = "awq: no scale is better than none" if result.form == "none" else f"awq: {result.form}, exponent {result.exponent:g}"
    return Scaling(result.scale, result.error_before, result.error_after, what)


def _smoothquant_needs(columns: int) -> Needs:
    return Needs(inputs=True, sample_tokens=512)


def _smoothquant(
    weights: Sequence[torch.Tensor], scheme: Scheme, statistics: InputStatistics, settings: WalkSettings, channels: torch.Tensor | None
) -> Scaling:
    assert scheme.weights is not None and scheme.input_activations is not None
    fixed = settings.migration_strength
    chosen = SmoothQuantSettings() if fixed is None else SmoothQuantSettings(strengths=(fixed,))
    result = smoothquant_scales(weights, scheme.weights, scheme.input_activations, statistics, chosen, channels=channels)
    what = "smoothquant: left as it is" if result.strength is None else f"smoothquant: strength {result.strength:g}"
    return Scaling(result.scale, result.error_before, result.error_after, what)


TRANSFORM_STEPS: Mapping[str, TransformStep] = {
    "awq": TransformStep(_awq_needs, _awq),
    "smoothquant": TransformStep(_smoothquant_needs, _smoothquant),
}
