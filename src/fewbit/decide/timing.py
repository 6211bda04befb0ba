"""The time of a workload in one format: a few steps added up, with one uncertainty for the sum.

    T = sum_i n_i T_i(x)              prefill once, decode as often as there are new tokens
    d log T / dx = sum_i (n_i T_i / T) d log T_i / dx

All steps of a device share its factors x (`predict.calibration`), so the uncertainty of the sum is that of one gradient and not of separate
intervals; and the ratio of two candidates' times has the difference of their gradients, in which memory speed and overhead cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewbit.predict.calibration import Z90, Posterior, gradient_of
from fewbit.predict.efficiency import Factors
from fewbit.predict.hardware import Hardware
from fewbit.predict.prediction import Estimate
from fewbit.predict.step import StepTime, Work, step_time
from fewbit.results import Bound

__all__ = ["Timed", "compare_times", "time_of"]


@dataclass(frozen=True)
class Timed:
    """A time with what its uncertainty hangs on.

    Attributes:
        milliseconds: of all steps together. gradient: of its logarithm in the factors' logarithms. log_sd: of the logarithm.
        steps: the time of each kind of step, once.
        works: what was timed, for telling equal ones apart from similar ones.
    """

    milliseconds: float
    gradient: NDArray[np.float64]
    log_sd: float
    steps: tuple[StepTime, ...]
    works: tuple[tuple[float, tuple[Work, ...]], ...]

    @property
    def estimate(self) -> Estimate:
        """With its 90 % interval."""
        return _interval(self.milliseconds, self.log_sd)

    @property
    def floor_milliseconds(self) -> float:
        """Bytes over the data sheet's bandwidth, operations over its peak: no software goes below."""
        return sum(count * step.floor_milliseconds for (count, _), step in zip(self.works, self.steps, strict=True))

    def probability_within(self, limit: float) -> float:
        """That the time is at most this long."""
        return 0.5 * (1 + math.erf(math.log(limit / self.milliseconds) / max(self.log_sd, 1e-9) / math.sqrt(2)))

    def shares(self) -> dict[Bound, float]:
        """Share of the time in steps that are bound by each."""
        shares: dict[Bound, float] = {"bandwidth": 0.0, "compute": 0.0, "overhead": 0.0}
        for (count, _), step in zip(self.works, self.steps, strict=True):
            shares[step.bound] += count * step.milliseconds / self.milliseconds
        return shares


def time_of(steps: Sequence[tuple[float, Sequence[Work]]], hardware: Hardware, posterior: Posterior) -> Timed:
    """The time of steps.

    Args:
        steps: how often, and what each moves and computes (`predict.step.step_work`).
        posterior: the device's factors after what was measured on it.
    """
    works = tuple((count, tuple(work)) for count, work in steps)

    def log_total(logs: NDArray[np.float64]) -> float:
        factors = Factors.from_logs(logs)
        return math.log(sum(count * step_time(list(work), hardware, factors).milliseconds for count, work in works))

    factors = Factors.from_logs(posterior.mean)
    gradient = gradient_of(log_total, posterior.mean)
    return Timed(
        milliseconds=math.exp(log_total(posterior.mean)),
        gradient=gradient,
        log_sd=posterior.log_sd(gradient),
        steps=tuple(step_time(list(work), hardware, factors) for _, work in works),
        works=works,
    )


def compare_times(slow: Timed, fast: Timed, posterior: Posterior) -> Estimate:
    """Time of the first over time of the second, what both have in common cancelled.

    Two candidates with the same linears, which differ in the cache alone, run the same kernels otherwise: what the model leaves unexplained
    of one it leaves unexplained of the other, and cancels, too.
    """
    if slow.works == fast.works:
        return Estimate(1.0, 1.0, 1.0)
    residuals = 0.0 if _linears(slow) == _linears(fast) else 2.0
    return _interval(slow.milliseconds / fast.milliseconds, posterior.log_sd(slow.gradient - fast.gradient, residuals=residuals))


def _linears(timed: Timed) -> list[Work]:
    return [work for _, works in timed.works for work in works if work.name != "attention"]


def _interval(value: float, log_sd: float) -> Estimate:
    factor = math.exp(Z90 * log_sd)
    return Estimate(value, value / factor, value * factor)
