"""The time of a workload in one format: a few steps added up, with one uncertainty for the sum.

    T = sum_i n_i T_i(x)              prefill once, decode as often as there are new tokens

All steps and all candidates of a device share its factors x (`predict.calibration`), which are known as a normal distribution with mean m
and covariance S = L L'. What a time does when they are not m is evaluated at 2n points, one to each side along every column of L:

    a_k = (f(m + h L_k) - f(m - h L_k)) / 2h                     f = log T,  h = sqrt(3)
    b_k = (f(m + h L_k) + f(m - h L_k) - 2 f(m)) sqrt(h^2 - 1) / 2h^2
    variance of f = |a|^2 + |b|^2

(Noergaard, Poulsen, Ravn, "New developments in state estimation for nonlinear systems", Automatica 36, 2000: the divided-difference filter;
a derivative at m would not see that unpacking, hidden behind the memory at the mean, may come out of hiding within the uncertainty.)
The points are the same for every candidate, so the logarithm of the ratio of two times has the variance |a - a'|^2 + |b - b'|^2: what the
candidates have in common, the speed of the memory and the launches above all, cancels point by point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewbit.predict.calibration import Z90, Posterior
from fewbit.predict.efficiency import Factors
from fewbit.predict.hardware import Hardware
from fewbit.predict.prediction import Estimate
from fewbit.predict.step import StepTime, Work, step_time
from fewbit.results import Bound

__all__ = ["STEP", "Timed", "compare_times", "time_of"]

STEP = math.sqrt(3.0)  # standard deviations: the kurtosis of a normal distribution


@dataclass(frozen=True)
class Timed:
    """A time with what its uncertainty hangs on.

    Attributes:
        milliseconds: of all steps together. log_sd: standard deviation of its logarithm.
        deviations: a and b above, [2n]: what the logarithm does as the device's factors vary.
        steps: the time of each kind of step, once.
        works: what was timed, for telling equal ones apart from similar ones.
    """

    milliseconds: float
    deviations: NDArray[np.float64]
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
    middle = log_total(posterior.mean)
    deviations = _deviations(log_total, posterior, middle)
    return Timed(
        milliseconds=math.exp(middle),
        deviations=deviations,
        log_sd=math.sqrt(float(deviations @ deviations) + posterior.residual**2),
        steps=tuple(step_time(list(work), hardware, factors) for _, work in works),
        works=works,
    )


def _deviations(log_total: Callable[[NDArray[np.float64]], float], posterior: Posterior, middle: float) -> NDArray[np.float64]:
    columns = STEP * np.linalg.cholesky(posterior.covariance).T
    up = np.array([log_total(posterior.mean + column) for column in columns])
    down = np.array([log_total(posterior.mean - column) for column in columns])
    first = (up - down) / (2 * STEP)
    second = (up + down - 2 * middle) * math.sqrt(STEP**2 - 1) / (2 * STEP**2)
    return np.concatenate([first, second])


def compare_times(slow: Timed, fast: Timed, posterior: Posterior) -> Estimate:
    """Time of the first over time of the second, what both have in common cancelled.

    Two candidates with the same linears, which differ in the cache alone, run the same kernels otherwise: what the model leaves unexplained
    of one it leaves unexplained of the other, and cancels, too.
    """
    if slow.works == fast.works:
        return Estimate(1.0, 1.0, 1.0)
    residuals = 0.0 if _linears(slow) == _linears(fast) else 2.0
    apart = slow.deviations - fast.deviations
    log_sd = math.sqrt(float(apart @ apart) + residuals * posterior.residual**2)
    return _interval(slow.milliseconds / fast.milliseconds, log_sd)


def _linears(timed: Timed) -> list[Work]:
    return [work for _, works in timed.works for work in works if work.name != "attention"]


def _interval(value: float, log_sd: float) -> Estimate:
    factor = math.exp(Z90 * log_sd)
    return Estimate(value, value / factor, value * factor)
