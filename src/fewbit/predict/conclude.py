"""What predictions mean, in sentences that a person can repeat: each with its figure, and with its reason where it disappoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fewbit.formats.spec import get_scheme
from fewbit.predict.prediction import MeasuredStep, Prediction, StepPoint, step_name
from fewbit.predict.predictor import Predictor

__all__ = ["conclusions"]

_OVERHEAD_SHARE = 0.5


def conclusions(predictor: Predictor, predictions: Sequence[Prediction], measured: Sequence[MeasuredStep]) -> list[str]:
    """What the measured points say of the device, then what each scheme does to each kind of step.

    Args:
        predictor: that made the predictions.
        predictions: of the steps that were asked for.
        measured: points with their rates.
    """
    lines = [_measured_line(step) for step in measured if step.used]
    kinds = dict.fromkeys((p.point.phase, p.point.batch, p.point.context) for p in predictions)
    for phase, batch, context in list(kinds)[:4]:
        same = [p for p in predictions if (p.point.phase, p.point.batch, p.point.context) == (phase, batch, context)]
        lines += _overhead_line(predictor, same[0].point)
        lines += [_scheme_line(p) for p in same if p.point.scheme.upper() != "BF16"]
    return lines


def _measured_line(step: MeasuredStep) -> str:
    point = step.measured.point
    if step.bound == "compute":
        rate = f"{step.operations / 1e12:,.3g} TFLOP, {step.tflop_s:,.3g} TFLOP/s, {step.compute_share:.0%} of the peak"
    else:
        rate = f"{step.bytes / 1e9:,.3g} GB, {step.gb_s:,.3g} GB/s, {step.bandwidth_share:.0%} of the bandwidth"
    return f"measured {step_name(point)} in {step.measured.milliseconds:,.4g} ms: {rate}; {step.bound}-bound"


def _overhead_line(predictor: Predictor, point: StepPoint) -> list[str]:
    base = replace(point, scheme="BF16", kv="BF16", path=None)
    if predictor.time(base).bound != "overhead":
        return []
    return [f"{step_name(base)} is overhead-bound: launches and framework take most of the step, which fewer bits do not shorten"]


def _scheme_line(prediction: Prediction) -> str:
    point, ratio = prediction.point, prediction.speedup_over_bf16
    between = f"{ratio.value:.2f}x, 90 % interval {ratio.low:.2f} to {ratio.high:.2f}"
    name = step_name(point)
    if ratio.low > 1.0:
        return f"{name} is faster than BF16: {between} ({prediction.path})"
    if ratio.high < 1.0:
        return f"{name} is slower than BF16: {between}; {_reason(prediction)}"
    if ratio.value <= 1.0:
        return f"{name} is not sped up: {between}; {_reason(prediction)}"
    return f"{name} cannot be told from BF16: {between}"


def _reason(prediction: Prediction) -> str:
    weights = get_scheme(prediction.point.scheme).weights
    if weights is None:
        return "the weights are read in 16 bit as before"
    if prediction.path == "unfused":
        return "each product first writes a 16-bit copy of the weight and reads it again"
    if prediction.path == "native":
        return "quantizing the activations costs what the products save"
    if prediction.bound == "compute":
        return "the step is compute-bound, its products stay 16-bit ones, and unpacking the weights comes on top"
    return "launches and unpacking take what the saved bytes give"
