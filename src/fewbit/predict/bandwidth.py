"""The estimator of the back of an envelope: a decode step takes as long as reading the weights once.

    t = scale * parameters * bits / 8 / bandwidth        scale: measured over predicted time of the measured points; 1 without any

    7e9 parameters in BF16 over 200 GB/s:  14 GB / 200 GB/s = 70 ms;  measured 94 ms: scale 1.34;  INT4: 3.5 GB / 200 GB/s * 1.34 = 23.5 ms

It counts nominal bits and nothing else: no scales, no head in high precision, no launches, no cache, no unpacking. Its speed-up is the
ratio of the bits, which no published runtime reaches; its interval is what published measurements took over this estimate (`priors.toml`,
table byte_ratio, written by benchmarks/predict_accuracy.py). `Predictor` is the model that counts the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fewbit.errors import UsageError
from fewbit.formats.spec import get_scheme
from fewbit.predict.efficiency import byte_ratio_errors
from fewbit.predict.hardware import Hardware
from fewbit.predict.outline import Outline
from fewbit.predict.prediction import Estimate, MeasuredPoint, Prediction, StepPoint, Term
from fewbit.predict.step import choose_path, format_name

__all__ = ["bandwidth_scale", "predict_by_bandwidth"]

_NOTE = "nominal bits over the bandwidth: no scales, head, launches, cache or unpacking; the speed-up is an upper limit"


def _nominal_bits(scheme: str) -> float:
    weights = get_scheme(scheme).weights
    return 16.0 if weights is None else float(weights.num_bits)


def _milliseconds(outline: Outline, scheme: str, hardware: Hardware) -> float:
    return outline.parameters * _nominal_bits(scheme) / 8 / (hardware.bandwidth_gb_s * 1e6)


def bandwidth_scale(hardware: Hardware, outline: Outline, measured: Sequence[MeasuredPoint]) -> float | None:
    """Measured over predicted time, geometric mean over the points; None without any.

    Raises:
        UsageError: a point is no decode step of one sequence.
    """
    if not measured:
        return None
    for one in measured:
        if one.point.phase != "decode" or one.point.batch != 1:
            raise UsageError(
                "the bandwidth estimator knows decode steps of one sequence only", "leave --estimator bandwidth out, or measure batch 1"
            )
    logs = [math.log(one.milliseconds / _milliseconds(outline, one.point.scheme, hardware)) for one in measured]
    return math.exp(sum(logs) / len(logs))


def predict_by_bandwidth(hardware: Hardware, outline: Outline, point: StepPoint, measured: Sequence[MeasuredPoint] = ()) -> Prediction:
    """The time of a decode step of one sequence from nominal bits.

    Raises:
        UsageError: a prefill, a batch above 1 or a quantized cache, of which this estimator knows nothing; an unknown scheme.
    """
    if point.phase != "decode" or point.batch != 1 or point.kv.upper() != "BF16":
        raise UsageError("the bandwidth estimator knows decode steps of one sequence only", "leave --estimator bandwidth out")
    bits = _nominal_bits(point.scheme)
    scale = bandwidth_scale(hardware, outline, measured)
    floor = _milliseconds(outline, point.scheme, hardware)
    value = floor * (scale or 1.0)
    low, high = byte_ratio_errors(round(bits), calibrated=scale is not None)
    base = replace(point, scheme="BF16")
    speedup = _nominal_bits(base.scheme) / bits
    return Prediction(
        point=point,
        format=format_name(point.scheme),
        path=choose_path(get_scheme(point.scheme), hardware, point.path),
        milliseconds=Estimate(value, value * low, value * high),
        speedup_over_bf16=Estimate(speedup, speedup / high, min(speedup, speedup / low)) if bits < 16 else Estimate(1.0, 1.0, 1.0),
        tokens_per_s=Estimate(1e3 / value, 1e3 / (value * high), 1e3 / (value * low)),
        bound="bandwidth",
        floor_milliseconds=floor,
        weight_bytes=outline.parameters * bits / 8,
        kv_bytes=0.0,
        operations=2.0 * outline.parameters,
        calibrated_from=len(measured),
        terms=[Term("linears", value, outline.parameters * bits / 8, 2.0 * outline.parameters, 0, f"{floor:.4g} ms x {scale or 1.0:.4g}")],
        notes=[_NOTE],
    )
