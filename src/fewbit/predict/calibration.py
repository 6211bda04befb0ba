"""From priors and measured points to factors with their uncertainty: a Gauss-Newton step in the logarithms, repeated.

With x the logarithms of the factors, m and P their prior mean and covariance, and y_i = log of the i-th measured time, the posterior mode
minimizes

    (x - m)' P^-1 (x - m) + sum_i (y_i - log T_i(x))^2 / r^2

where T_i is the model of step i and r its residual. Linearized around the mode, the posterior is a normal distribution with covariance
S = (P^-1 + J' J / r^2)^-1, and the logarithm of any other step's time has the variance g' S g + r^2, g its gradient. Ninety percent lie
within 1.645 standard deviations. Two steps on one device share most of the uncertainty: the variance of the logarithm of their ratio is
(g - h)' S (g - h) + 2 r^2, which is why `Comparison` is worth more than two intervals side by side.

A kernel that unpacks weights reads them no faster than one that has nothing to unpack: its speed is the lesser of what memory gives and
what unpacking gives. Where 16-bit kernels are limited by memory (`efficiency.MEMORY_LIMITED`), the reading speeds of packed weights are
therefore min(normal, ceiling) in the logarithms, with the ceiling one residual above 1, until packed weights were measured. Intervals count
this (`Posterior.interval`): they end short of times that only a kernel nearer to the bandwidth than the 16-bit one could reach.

What one more measurement with gradient h would leave is known before it is made: S - S h h' S / (h' S h + r^2). The next best measurement
is the one that leaves the least variance in what the decision hangs on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewbit.predict.efficiency import Prior

__all__ = ["Z90", "Posterior", "calibrate"]

Z90 = 1.6448536269514722
_ITERATIONS = 30
_STEP = 1e-4
_BISECTIONS = 30
_NODES = np.linspace(-4.0, 4.0, 65)
_SHARES = np.exp(-(_NODES**2) / 2) / np.exp(-(_NODES**2) / 2).sum()
_POINTS = np.linspace(-6.0, 6.0, 601)
_BELOW = np.array([0.5 * (1 + math.erf(point / math.sqrt(2))) for point in _POINTS])  # the normal distribution's function
_STRAIN = 2.0  # mean squared misfit, in residuals, above which the points contradict the model

LogTime = Callable[[NDArray[np.float64]], float]


@dataclass(frozen=True)
class Posterior:
    """Logarithms of the factors: mean [n] and covariance [n, n]; `residual` of a single step."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    residual: float
    points: int

    def log_sd(self, gradient: NDArray[np.float64], residuals: float = 1.0) -> float:
        """Standard deviation of a logarithm with this gradient and so many independent residual variances."""
        return float(np.sqrt(gradient @ self.covariance @ gradient + residuals * self.residual**2))

    def interval(self, gradient: NDArray[np.float64], ceiling: NDArray[np.float64], residuals: float = 1.0) -> tuple[float, float]:
        """The deviations of a logarithm with this gradient that 5 % and 95 % of its distribution lie below.

        Args:
            ceiling: logarithms that the factors stay below, [n]; inf for those without one.
            residuals: as in `log_sd`.
        """
        capped = np.isfinite(ceiling) & (gradient != 0)
        part = np.where(capped, gradient, 0.0)
        if not capped.any() or len(set(np.sign(part[capped]))) > 1:
            spread = Z90 * self.log_sd(gradient, residuals)
            return -spread, spread
        # A deviation is a + q: q of the capped factors, which ends at `limit`, and a of all others, normal around `slope` q.
        limit = float(part[capped] @ np.maximum(ceiling - self.mean, 0.0)[capped])
        rest = gradient - part
        variance = float(part @ self.covariance @ part)
        slope = float(rest @ self.covariance @ part) / variance
        left = math.sqrt(float(rest @ self.covariance @ rest) - slope**2 * variance + residuals * self.residual**2)
        q = _NODES * math.sqrt(variance)
        centre = slope * q + (np.minimum(q, limit) if limit > 0 or part[capped][0] > 0 else np.maximum(q, limit))
        return _quantile(centre, left, 0.05), _quantile(centre, left, 0.95)

    def after(self, gradient: NDArray[np.float64]) -> Posterior:
        """What a measurement with this gradient would leave."""
        spread = self.covariance @ gradient
        covariance = self.covariance - np.outer(spread, spread) / (gradient @ spread + self.residual**2)
        return Posterior(self.mean, covariance, self.residual, self.points + 1)


def _quantile(centres: NDArray[np.float64], spread: float, share: float) -> float:
    """The quantile of a mixture of normal distributions around `centres`, one per node, by bisection."""
    low, high = float(centres.min()) - 6 * spread, float(centres.max()) + 6 * spread
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = float(_SHARES @ np.interp((middle - centres) / spread, _POINTS, _BELOW))
        low, high = (middle, high) if below < share else (low, middle)
    return (low + high) / 2


def gradient_of(log_time: LogTime, at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Central differences."""
    steps = np.eye(len(at)) * _STEP
    return np.array([(log_time(at + step) - log_time(at - step)) / (2 * _STEP) for step in steps])


def calibrate(prior: Prior, log_times: Sequence[LogTime], observed: Sequence[float]) -> Posterior:
    """The posterior of the factors.

    Points that the model cannot reconcile widen the residual: it is scaled so that their mean squared misfit is what it should be.

    Args:
        log_times: the model of each measured step, as a function of the factors' logarithms.
        observed: logarithms of the measured milliseconds.
    """
    mean, residual = prior.factors.logs(), prior.residual
    if not log_times:
        return Posterior(mean, prior.covariance, residual, 0)
    x, covariance = _mode(prior, log_times, observed, residual)
    misfit = np.array([y - f(x) for f, y in zip(log_times, observed, strict=True)]) / residual
    strain = float(misfit @ misfit) / len(observed)
    if strain > _STRAIN:
        residual *= float(np.sqrt(strain))
        x, covariance = _mode(prior, log_times, observed, residual)
    return Posterior(x, covariance, residual, len(log_times))


def _mode(
    prior: Prior, log_times: Sequence[LogTime], observed: Sequence[float], residual: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mode and covariance: Gauss-Newton steps, halved until they help."""
    mean = prior.factors.logs()
    precision = np.linalg.inv(prior.covariance)
    weight = 1.0 / residual**2

    def misfits(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([y - f(x) for f, y in zip(log_times, observed, strict=True)])

    def objective(x: NDArray[np.float64]) -> float:
        left = misfits(x)
        return float((x - mean) @ precision @ (x - mean) + weight * left @ left)

    x, value = mean.copy(), objective(mean)
    normal = precision
    for _ in range(_ITERATIONS):
        jacobian = np.array([gradient_of(f, x) for f in log_times])
        normal = precision + weight * jacobian.T @ jacobian
        move = np.linalg.solve(normal, weight * jacobian.T @ misfits(x) - precision @ (x - mean))
        share = 1.0
        while (better := objective(x + share * move)) > value and share > 1e-4:
            share /= 2
        x, gain, value = x + share * move, value - better, better
        if gain < 1e-9:
            break
    return x, np.asarray(np.linalg.inv(normal), dtype=np.float64)
