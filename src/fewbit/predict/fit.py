"""Priors from published measurements: the medians and spreads that predict best what one 16-bit point does not tell.

A device's 16-bit decode time alone does not say how much of it is reading weights and how much is launches; the prior decides. So the prior
is fitted on that very task: of every device in a family its 8-bit and 4-bit times are predicted from its own 16-bit time, and

    sum over widths of mean over devices of mean |log(predicted / measured)|  +  a weak pull to the start

is smallest over the medians of `memory`, `operator_us`, `read_8`, `read_4` and over nine ways to split what the 16-bit point explains
between memory and launches (`SPLITS`). Absolute logarithms, cut at `CUT`, and devices weighted alike: published tables hold kernels that
are far off (llama.cpp's F16 on an A100 reached half of the bandwidth in May 2024), and one of them must not move a class. The spreads of
`read_8` and `read_4` are then such that nine in ten of these rows lie inside their 90 % intervals, widened by Student's t because the
devices are few.

Decode steps of published rows are bound by memory everywhere, so the time is

    t = sum_k W_k / (memory * read(bits_k)) + A / memory + C / cache + N * operator_us

with W_k, A, C milliseconds of weights, activations and cache at the full bandwidth; the posterior of (memory, operator_us, cache) given one
16-bit time is a few Newton steps, done for all rows at once. `Predictor` computes the same with every factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median

import numpy as np
from numpy.typing import NDArray

from fewbit.formats.spec import get_scheme
from fewbit.predict.calibration import Z90
from fewbit.predict.efficiency import FACTORS, Prior
from fewbit.predict.hardware import Hardware
from fewbit.predict.outline import Outline
from fewbit.predict.prediction import MeasuredPoint, Prediction
from fewbit.predict.predictor import Predictor
from fewbit.predict.step import choose_path, step_work

__all__ = ["CUT", "SPLITS", "UNKNOWN_BANDWIDTH", "Observed", "fit_prior", "student_t95", "widened"]

SPLITS = tuple(product((0.1, 0.2, 0.3), (0.3, 0.5, 0.8)))  # (spread of memory, spread of operator_us)
UNKNOWN_BANDWIDTH = 0.7  # spread of memory where no source states the bandwidth
CUT = 0.4
_PULL = 0.003
_LEAST_DEVICES = 2
_GRIDS = {
    "memory": np.array([0.85, 0.93, 1.0]),
    "operator_us": np.geomspace(2.0, 40.0, 13),
    "read_8": np.geomspace(0.75, 1.1, 13),
    "read_4": np.geomspace(0.55, 1.15, 17),
}
# (where the pull goes, how wide it is): kernels read near the bandwidth, 8-bit weights are unpacked almost for free, 4-bit ones nearly so.
_START = {"memory": (0.93, 0.1), "operator_us": (8.0, 0.7), "read_8": (0.97, 0.03), "read_4": (0.92, 0.12)}
_FLOORS = {"read_8": 0.03, "read_4": 0.06}
_COMPUTE_SPREAD = 0.3

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """Rows of one device, runtime, model and context.

    Attributes:
        device: name in the source. family: devices that share a prior. runtime: software whose kernels and launches are alike.
        baseline: the 16-bit row. others: rows of the same in fewer bits, with their bytes; `bits` of each.
        prefill: time of a prefill with 16-bit weights; None when not measured.
        known_bandwidth: a source states it.
    """

    device: str
    family: str
    runtime: str
    hardware: Hardware
    outline: Outline
    baseline: MeasuredPoint
    others: tuple[MeasuredPoint, ...]
    bits: tuple[int, ...]
    prefill: MeasuredPoint | None = None
    known_bandwidth: bool = True

    def predict(self, prior: Prior) -> list[Prediction]:
        """The others, predicted from the baseline alone."""
        if not self.known_bandwidth:
            spread = prior.spread.copy()
            spread[FACTORS.index("memory")] = UNKNOWN_BANDWIDTH
            prior = replace(prior, spread=spread)
        predictor = Predictor(self.hardware, self.outline, [self.baseline], prior=prior)
        return [predictor.predict(point.point, weight_bytes=point.weight_bytes) for point in self.others]


def student_t95(degrees: int) -> float:
    """The 95 % point of Student's t (Cornish-Fisher to the third term: within 1 % from 3 degrees on)."""
    z, n = Z90, float(max(degrees, 1))
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / n + g2 / n**2 + g3 / n**3


def widened(prior: Prior, same: Sequence[str] = ()) -> Prior:
    """The prior of a relative: the same medians with one and a half times the spread, operators twice as slow or fast.

    Args:
        same: factors that are not widened, because what they describe is the same in both.
    """
    spread = prior.spread * np.array([1.0 if name in same else 1.5 for name in FACTORS])
    spread[FACTORS.index("operator_us")] = max(spread[FACTORS.index("operator_us")], math.log(2))
    return replace(prior, spread=spread)


class _Rows:
    """The rows of a family as arrays: `g` groups (16-bit rows), `r` rows of 8 or 4 bits, each of the group `of[r]`."""

    def __init__(self, groups: Sequence[Observed], width: int, cache: tuple[float, float], residual: float) -> None:
        self.groups = [group for group in groups if width in group.bits]
        base = [_parts(group, group.baseline) for group in self.groups]
        picked = [
            (index, _parts(group, point), math.log(point.milliseconds))
            for index, group in enumerate(self.groups)
            for point, bits in zip(group.others, group.bits, strict=True)
            if bits == width
        ]
        self.cache, self.residual = cache, residual
        self.known = np.array([group.known_bandwidth for group in self.groups], dtype=np.bool_)
        self.log_base = np.log(np.array([group.baseline.milliseconds for group in self.groups], dtype=np.float64))
        self.base = np.array([[sum(ms for ms, _ in weights) + a, c, n] for weights, a, c, n in base]).reshape(
            -1, 3
        )  # memory, cache, launches
        self.of = np.array([index for index, _, _ in picked], dtype=np.intp)
        self.log_time = np.array([log for _, _, log in picked], dtype=np.float64)
        kinds = max((len(parts[0]) for _, parts, _ in picked), default=1)
        padded = [[*parts[0], *[(0.0, 16.0)] * (kinds - len(parts[0]))] for _, parts, _ in picked]
        self.weights = np.array([[ms for ms, _ in row] for row in padded]).reshape(-1, kinds)
        self.bits = np.array([[bits for _, bits in row] for row in padded]).reshape(-1, kinds)
        self.rest = np.array([[a, c, n] for _, (_, a, c, n), _ in picked]).reshape(-1, 3)
        names = [self.groups[index].device for index in self.of]
        self.share = np.array([1.0 / names.count(name) / len(set(names)) for name in names])

    def posterior(self, memory: float, operator_us: float, split: tuple[float, float]) -> tuple[Array, Array, Array]:
        """(mode of the logarithms of memory, cache and operator_us [g, 3]; precision of the prior [g, 3]; gradient there [g, 3])."""
        start = np.log([memory, self.cache[0], operator_us])
        spread = np.tile([split[0], self.cache[1], split[1]], (len(self.groups), 1))
        spread[~self.known, 0] = np.maximum(spread[~self.known, 0], UNKNOWN_BANDWIDTH)
        precision = 1.0 / spread**2
        x = np.tile(start, (len(self.groups), 1))
        for _ in range(25):
            parts = self.base * np.exp(x * [-1.0, -1.0, 1.0])
            total = parts.sum(axis=1, keepdims=True)
            gradient = parts * [-1.0, -1.0, 1.0] / total
            left = self.log_base[:, None] - np.log(total)
            b = gradient * left / self.residual**2 - precision * (x - start)
            u = gradient / precision
            move = b / precision - u * (u * b).sum(1, keepdims=True) / (self.residual**2 + (gradient * u).sum(1, keepdims=True))
            x = x + np.clip(move, -0.5, 0.5)
            if float(np.abs(move).max(initial=0.0)) < 1e-4:
                break
        return x, precision, gradient

    def log_errors(self, x: Array, read_8: float, read_4: float) -> tuple[Array, Array]:
        """(log of predicted over measured [r], parts of the predicted time [r, 4]: weights, activations, cache, launches)."""
        memory, cache, operator = np.exp(x[self.of].T)
        speed = _read(self.bits, read_8, read_4)
        a, c, n = self.rest.T
        parts = np.stack([(self.weights / speed).sum(axis=1) / memory, a / memory, c / cache, n * operator], axis=1)
        return np.log(parts.sum(axis=1)) - self.log_time, parts

    def loss(self, x: Array, read_8: float, read_4: float) -> float:
        """Mean over devices of the mean absolute log error, each cut."""
        return float((np.minimum(np.abs(self.log_errors(x, read_8, read_4)[0]), CUT) * self.share).sum()) if len(self.of) else 0.0

    def read_spread(self, chosen: _Choice) -> float:
        """Spread of the reading speed with which nine in ten rows lie inside their intervals."""
        x, precision, g = self.posterior(chosen.memory, chosen.operator_us, chosen.split)
        errors, parts = self.log_errors(x, chosen.read_8, chosen.read_4)
        shares = parts / parts.sum(axis=1, keepdims=True)
        h = np.stack([-(shares[:, 0] + shares[:, 1]), -shares[:, 2], shares[:, 3]], axis=1)
        u = (g / precision)[self.of]
        known = (h**2 / precision[self.of]).sum(1) - (h * u).sum(1) ** 2 / (self.residual**2 + (g[self.of] * u).sum(1))
        needed = np.maximum((errors / Z90) ** 2 - known - self.residual**2, 0.0)
        devices = len({group.device for group in self.groups})
        return float(np.quantile(np.sqrt(needed) / np.maximum(shares[:, 0], 0.05), 0.9)) * student_t95(devices - 1) / Z90


def _parts(group: Observed, point: MeasuredPoint) -> tuple[list[tuple[float, float]], float, float, float]:
    """([(milliseconds at the full bandwidth, bits)] of the weights, of activations, of the cache; thousands of launches)."""
    per_ms = group.hardware.bandwidth_gb_s * 1e6
    path = choose_path(get_scheme(point.point.scheme), group.hardware, point.point.path)
    work = step_work(group.outline, point.point, path, weight_bytes=point.weight_bytes)
    merged: dict[float, float] = {}
    for one in work:
        if one.weight_bytes:
            merged[round(one.bits, 6)] = merged.get(round(one.bits, 6), 0.0) + one.weight_bytes / per_ms
    sums = (sum(one.activation_bytes for one in work) / per_ms, sum(one.cache_bytes for one in work) / per_ms)
    return [(ms, bits) for bits, ms in merged.items()], *sums, sum(one.operators for one in work) / 1e3


def _read(bits: Array, read_8: float, read_4: float) -> Array:
    """As `step._read_speed`, for arrays."""
    return np.interp(bits, [4.0, 8.0, 16.0], [read_4, read_8, 1.0])


@dataclass(frozen=True)
class _Choice:
    objective: float
    memory: float
    operator_us: float
    read_8: float
    read_4: float
    split: tuple[float, float]


def _pull(name: str, value: float) -> float:
    start, width = _START[name]
    return _PULL * (math.log(value / start) / width) ** 2


def _search(eight: _Rows, four: _Rows) -> _Choice:
    """The best point of the grids; for given memory and launches, read_8 follows from the 8-bit rows, then read_4."""
    best: _Choice | None = None
    for split in SPLITS:
        for memory in _GRIDS["memory"]:
            for operator in _GRIDS["operator_us"]:
                x8 = eight.posterior(memory, operator, split)[0]
                x4 = four.posterior(memory, operator, split)[0]
                middle = _START["read_4"][0]
                loss_8, read_8 = min((eight.loss(x8, v, middle) + _pull("read_8", v), v) for v in _GRIDS["read_8"])
                loss_4, read_4 = min((four.loss(x4, read_8, v) + _pull("read_4", v), v) for v in _GRIDS["read_4"])
                objective = loss_8 + loss_4 + _pull("memory", memory) + _pull("operator_us", operator)
                if best is None or objective < best.objective:
                    best = _Choice(objective, float(memory), float(operator), float(read_8), float(read_4), split)
    assert best is not None  # the grids are not empty
    return best


def fit_prior(groups: Sequence[Observed], start: Prior) -> Prior:
    """The prior of a family of devices.

    Args:
        groups: its measurements; with fewer than two devices `start` is returned as it is.
        start: what remains for the factors that these measurements do not tell.
    """
    if len({group.device for group in groups}) < _LEAST_DEVICES:
        return start
    at = FACTORS.index("cache")
    cache = (start.factors.cache, float(start.spread[at]))
    eight, four = (_Rows(groups, width, cache, start.residual) for width in (8, 4))
    chosen = _search(eight, four)
    factors = {"memory": chosen.memory, "operator_us": chosen.operator_us, "read_8": chosen.read_8, "read_4": chosen.read_4}
    spread = dict(zip(FACTORS, start.spread, strict=True)) | {"memory": chosen.split[0], "operator_us": chosen.split[1]}
    for name, rows in (("read_8", eight), ("read_4", four)):
        if len(rows.of):
            spread[name] = max(_FLOORS[name], rows.read_spread(chosen))
    shares = [share for group in groups for share in _compute_shares(group)]
    if shares:
        factors["compute"], spread["compute"] = math.exp(median(shares)), _COMPUTE_SPREAD
    return replace(start, factors=replace(start.factors, **factors), spread=np.array([spread[name] for name in FACTORS]))


def _compute_shares(group: Observed) -> list[float]:
    """Log of the share of the 16-bit peak that the prefill reached."""
    if group.prefill is None:
        return []
    operations = 2.0 * group.outline.parameters * group.prefill.point.context * group.prefill.point.batch
    return [math.log(operations / (group.prefill.milliseconds * 1e9) / group.hardware.dense_tflop_s["bf16"])]
