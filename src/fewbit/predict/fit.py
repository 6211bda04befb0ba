"""Priors from published measurements: what a class of device and its runtimes usually reach.

Rows of one device, runtime, model and context that differ in the weights' format lie on a line: time = slope * bytes + constant.
The slope is one over the bandwidth that was reached, the constant over the number of operators is what each costs besides its bytes.
Medians over the devices of a family are the prior's medians; the spread over devices, widened by Student's t because there are few, is
its spread. What the line does not explain after that is how much slower or faster packed weights are read than 16-bit ones (`read_8`,
`read_4`).

Medians and quantiles, not least squares: published tables hold kernels that are far off (llama.cpp's F16 on an A100 reached half of the
bandwidth in May 2024), and one of them must not move a class.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from fewbit.predict.efficiency import FACTORS, Prior
from fewbit.predict.hardware import Hardware
from fewbit.predict.outline import Outline
from fewbit.predict.prediction import MeasuredPoint, Prediction
from fewbit.predict.predictor import Predictor

__all__ = ["Observed", "fit_prior", "student_t95", "widened"]

# Spreads are never smaller than this, whatever a handful of devices says.
_FLOORS = {"memory": 0.30, "operator_us": 0.25, "read_8": 0.03, "read_4": 0.06, "compute": 0.30}
_LEAST_OPERATOR_US = 1.0
_LEAST_DEVICES = 2


@dataclass(frozen=True)
class Observed:
    """Rows of one device, runtime, model and context.

    Attributes:
        device: name in the source. family: devices that share a prior.
        baseline: the 16-bit row. others: rows of the same in fewer bits, with their bytes; `bits` of each.
        prefill: time of a prefill with 16-bit weights; None when not measured.
    """

    device: str
    family: str
    hardware: Hardware
    outline: Outline
    baseline: MeasuredPoint
    others: tuple[MeasuredPoint, ...]
    bits: tuple[int, ...]
    prefill: MeasuredPoint | None = None

    def predict(self, prior: Prior) -> list[Prediction]:
        """The others, predicted from the baseline alone."""
        predictor = Predictor(self.hardware, self.outline, [self.baseline], prior=prior)
        return [predictor.predict(point.point, weight_bytes=point.weight_bytes) for point in self.others]


def student_t95(degrees: int) -> float:
    """The 95 % point of Student's t (Cornish-Fisher to the third term: within 1 % from 3 degrees on)."""
    z, n = 1.6448536, float(max(degrees, 1))
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / n + g2 / n**2 + g3 / n**3


def widened(prior: Prior) -> Prior:
    """The prior of a relative: the same medians with one and a half times the spread, operators twice as slow or fast."""
    spread = prior.spread * 1.5
    spread[FACTORS.index("operator_us")] = max(spread[FACTORS.index("operator_us")], math.log(2))
    return replace(prior, spread=spread)


def _per_device(groups: Sequence[Observed], value: Callable[[Observed], Sequence[float]]) -> list[float]:
    """The median of each device's values."""
    found: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        found[group.device].extend(value(group))
    return [median(values) for values in found.values() if values]


def _lines(group: Observed) -> list[tuple[float, float]]:
    """(log of the share of the bandwidth, log of microseconds per operator) of the line through the baseline and each other row."""
    lines = []
    start = group.baseline
    assert start.weight_bytes is not None
    for point in group.others:
        assert point.weight_bytes is not None
        slope = (start.milliseconds - point.milliseconds) / (start.weight_bytes - point.weight_bytes)  # ms per byte
        if slope <= 0:
            continue
        constant = start.milliseconds - slope * start.weight_bytes
        operator_us = max(constant * 1e3 / group.outline.operators, _LEAST_OPERATOR_US)
        lines.append((math.log(1e-6 / (slope * group.hardware.bandwidth_gb_s)), math.log(operator_us)))
    return lines


def _median_and_spread(values: Sequence[float], floor: float) -> tuple[float, float]:
    """Median, and the robust standard deviation widened for the number of values."""
    middle = median(values)
    deviation = 1.4826 * median([abs(value - middle) for value in values]) if len(values) > _LEAST_DEVICES else 0.0
    return middle, max(floor, deviation) * student_t95(len(values) - 1 if len(values) > 1 else 3) / 1.6448536


def fit_prior(groups: Sequence[Observed], start: Prior) -> Prior:
    """The prior of a family of devices.

    Args:
        groups: its measurements; with fewer than two devices `start` is returned as it is.
        start: what remains for the factors that these measurements do not tell.
    """
    devices = {group.device for group in groups}
    if len(devices) < _LEAST_DEVICES:
        return start
    factors, spread = {name: getattr(start.factors, name) for name in FACTORS}, dict(zip(FACTORS, start.spread, strict=True))

    def put(name: str, values: Sequence[float]) -> None:
        if values:
            middle, spread[name] = _median_and_spread(values, _FLOORS[name])
            factors[name] = math.exp(middle)

    put("memory", _per_device(groups, lambda group: [line[0] for line in _lines(group)]))
    put("operator_us", _per_device(groups, lambda group: [line[1] for line in _lines(group)]))
    put("compute", _per_device(groups, _compute_shares))
    prior = _prior(start, factors, spread)
    for name, wanted in (("read_8", 8), ("read_4", 4)):
        unpacked = replace(prior, factors=replace(prior.factors, **{name: 1.0}))
        left = _misfits(groups, unpacked, wanted)
        if left:
            factors[name] = math.exp(-median([shift for shift, _ in left]))
            beyond = sorted(abs(shift - median([s for s, _ in left])) for shift, _ in left)
            spread[name] = max(_FLOORS[name], float(np.quantile(beyond, 0.9)) / 1.6448536 * 0.8)
        prior = _prior(start, factors, spread)
    return prior


def _prior(start: Prior, factors: Mapping[str, float], spread: Mapping[str, float]) -> Prior:
    return replace(start, factors=type(start.factors)(**factors), spread=np.array([spread[name] for name in FACTORS]))


def _misfits(groups: Sequence[Observed], prior: Prior, bits: int) -> list[tuple[float, float]]:
    """(log of measured over predicted time of the weights' part, that part's share) of every row of this width."""
    left = []
    for group in groups:
        for point, width, prediction in zip(group.others, group.bits, group.predict(prior), strict=True):
            if width != bits:
                continue
            share = sum(t.milliseconds for t in prediction.terms if t.name not in ("attention", "overhead")) / prediction.milliseconds.value
            rest = (1 - share) * prediction.milliseconds.value
            weights = max(point.milliseconds - rest, 0.2 * point.milliseconds)
            left.append((math.log(weights / (share * prediction.milliseconds.value)), share))
    return left


def _compute_shares(group: Observed) -> list[float]:
    """Log of the share of the 16-bit peak that the prefill reached."""
    if group.prefill is None:
        return []
    operations = 2.0 * group.outline.parameters * group.prefill.point.context * group.prefill.point.batch
    return [math.log(operations / (group.prefill.milliseconds * 1e9) / group.hardware.dense_tflop_s["bf16"])]
