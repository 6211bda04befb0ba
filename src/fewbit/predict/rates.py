"""Rates of a measured machine as a model of its products and its attention (`fewbit bench --machine`, `bench.kernel_rates`).

A kernel's time per weight t(M, K) over M tokens and K columns was measured at a few M and two K, at a memory bandwidth b. Between them it
is interpolated in the logarithms of M; beyond the largest it grows with M; it is linear in 1 / K, the share of what is done once a result.
To say what another bandwidth would make of it, it is split into what memory alone takes and the rest,

    m = bits / 8 / b             r = sqrt(t^2 - m^2)             t' = sqrt((m / memory)^2 + (r / compute)^2)

with `memory` and `compute` the calibrated factors of `efficiency.Factors`, 1 when nothing has changed since. The square root of squares
stands for an overlap that is good far from the bend and imperfect at it.

Attention over the cache: nanoseconds per cached token and key head, linear in the head dimension between measured ones, linear in the
number of query heads that share a key head; a quantized cache adds what dequantizing it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewbit.formats.spec import get_scheme
from fewbit.results import AttentionRate, EngineRates, KernelRate

__all__ = ["LEAST_SHARE", "Rates"]

_BASELINE = "BF16"
LEAST_SHARE = 0.8  # of the fastest measured time, for columns beyond the measured ones


@dataclass(frozen=True)
class Rates:
    """The rates of one compute mode.

    Attributes:
        measured: what `fewbit bench --machine` found.
        compute: `exact` or `int8-activations`; a format without a kernel of that mode runs the exact one.
    """

    measured: EngineRates
    compute: str = "exact"

    @property
    def operator_us(self) -> float:
        """Microseconds that each operator of a step takes besides its work."""
        return self.measured.operator_us

    @property
    def ns_per_activation(self) -> float:
        """Nanoseconds for each number that goes into or comes out of a product."""
        return self.measured.ns_per_activation

    def kernel(self, scheme: str) -> tuple[KernelRate, ...]:
        """The rates of the kernel that runs a scheme, by columns: its own, else those of one for the same number format and the same kind
        of inputs; empty when nothing like it was measured."""
        wanted = _grid(scheme)
        same = [rate for rate in self.measured.kernels if rate.scheme == scheme.upper()]
        like = same or [rate for rate in self.measured.kernels if _grid(rate.scheme) == wanted]
        like = [rate for rate in like if rate.compute == self.compute] or like
        first = like[0] if like else None
        chosen = [rate for rate in like if first and (rate.scheme, rate.compute) == (first.scheme, first.compute)]
        return tuple(sorted(chosen, key=lambda rate: rate.columns))

    def split(self, rates: Sequence[KernelRate], tokens: float, columns: float) -> tuple[float, float]:
        """(picoseconds per weight that memory takes, that the rest takes) of a product of so many rows with a weight of so many columns.

        Args:
            rates: what `kernel` found, at least one.
        """
        points = [(1.0 / rate.columns, _interpolated(rate.tokens, rate.ps_per_weight, tokens)) for rate in reversed(rates)]
        least = min(ps for _, ps in points)
        whole = points[0][1] if len(points) == 1 else max(_line(points, 1.0 / columns), LEAST_SHARE * least)
        memory = min(rates[0].bits / 8 * 1e3 / self.measured.read_bandwidth_gb_s, whole)
        return memory, math.sqrt(whole**2 - memory**2)

    def peak_tera(self, rates: Sequence[KernelRate]) -> float:
        """The most operations of a kernel, 1e12 per second."""
        return max(2.0 * tokens / ps for rate in rates for tokens, ps in zip(rate.tokens, rate.ps_per_weight, strict=True))

    def attention_ns(self, phase: str, cache: str, head_dim: int, group: float) -> float | None:
        """Nanoseconds of attention per cached token (prefill: per pair of tokens) and key head; None when nothing was measured."""
        base = self._surface(phase, _BASELINE, head_dim, group)
        if base is None or phase == "prefill" or cache.upper() == _BASELINE:
            return base
        plain, packed = (self._surface(phase, name, head_dim, 1) for name in (_BASELINE, cache.upper()))
        return base if plain is None or packed is None else max(base + packed - plain, 0.0)

    def _surface(self, phase: str, cache: str, head_dim: int, group: float) -> float | None:
        rows = [rate for rate in self.measured.attention if rate.phase == phase and rate.cache == cache]
        if not rows:
            return None
        dims = sorted({rate.head_dim for rate in rows})
        values = [_line(_of_dim(rows, dim), group) for dim in dims]
        return max(_line(list(zip(dims, values, strict=True)), head_dim), 0.0)


def _grid(scheme: str) -> tuple[str, bool]:
    """Number format of the weights, and whether inputs are INT8 by the scheme."""
    found = get_scheme(scheme)
    if found.weights is None:
        return _BASELINE, False
    inputs = found.input_activations
    return found.weights.grid_name, inputs is not None and inputs.grid_name == "int8"


def _of_dim(rows: Sequence[AttentionRate], dim: int) -> list[tuple[float, float]]:
    return sorted((float(rate.group), rate.ns) for rate in rows if rate.head_dim == dim)


def _line(points: Sequence[tuple[float, float]], at: float) -> float:
    """Linear between neighbouring points; beyond them with the slope of the first to the last; in proportion when there is only one."""
    if len(points) == 1:
        return points[0][1] * at / points[0][0]
    outside = not points[0][0] <= at <= points[-1][0]
    index = min(max(sum(x < at for x, _ in points), 1), len(points) - 1)
    (x0, y0), (x1, y1) = (points[0], points[-1]) if outside else (points[index - 1], points[index])
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def _interpolated(tokens: Sequence[int], times: Sequence[float], at: float) -> float:
    """In the logarithms; flat below the first, in proportion beyond the last."""
    if at >= tokens[-1]:
        return times[-1] * at / tokens[-1]
    return float(np.exp(np.interp(math.log(max(at, tokens[0])), np.log(tokens), np.log(times))))
