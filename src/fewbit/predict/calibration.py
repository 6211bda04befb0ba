"""From priors and measured points to factors with their uncertainty: a Gauss-Newton step in the logarithms, repeated.

With x the logarithms of the factors, m and P their prior mean and covariance, and y_i = log of the i-th measured time, the posterior mode
minimizes

    (x - m)' P^-1 (x - m) + sum_i (y_i - log T_i(x))^2 / r^2

where T_i is the model of step i and r its residual. Linearized around the mode, the posterior is a normal distribution with covariance
S = (P^-1 + J' J / r^2)^-1, and the logarithm of any other step's time has the variance g' S g + r^2, g its gradient. Ninety percent lie
within 1.645 standard deviations. Two steps on one device share most of the uncertainty: the variance of the logarithm of their ratio is
(g - h)' S (g - h) + 2 r^2, which is why `Comparison` is worth more than two intervals side by side.

What one more measurement with gradient h would leave is known before it is made: S - S h h' S / (h' S h + r^2). The next best measurement
is the one that leaves the least variance in what the decision hangs on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewbit.predict.efficiency import Prior

__all__ = ["Z90", "Posterior", "calibrate"]

Z90 = 1.6448536269514722
_ITERATIONS = 30
_STEP = 1e-4

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

    def after(self, gradient: NDArray[np.float64]) -> Posterior:
        """What a measurement with this gradient would leave."""
        spread = self.covariance @ gradient
        covariance = self.covariance - np.outer(spread, spread) / (gradient @ spread + self.residual**2)
        return Posterior(self.mean, covariance, self.residual, self.points + 1)


def gradient_of(log_time: LogTime, at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Central differences."""
    steps = np.eye(len(at)) * _STEP
    return np.array([(log_time(at + step) - log_time(at - step)) / (2 * _STEP) for step in steps])


def calibrate(prior: Prior, log_times: Sequence[LogTime], observed: Sequence[float]) -> Posterior:
    """The posterior of the factors.

    Args:
        log_times: the model of each measured step, as a function of the factors' logarithms.
        observed: logarithms of the measured milliseconds.
    """
    mean = prior.factors.logs()
    precision = np.diag(1.0 / prior.spread**2)
    x, weight = mean.copy(), 1.0 / prior.residual**2
    jacobian = np.zeros((0, len(mean)))
    for _ in range(_ITERATIONS if log_times else 0):
        jacobian = np.array([gradient_of(f, x) for f in log_times])
        misfit = np.array([y - f(x) for f, y in zip(log_times, observed, strict=True)])
        normal = precision + weight * jacobian.T @ jacobian
        move = np.linalg.solve(normal, weight * jacobian.T @ misfit - precision @ (x - mean))
        x = x + np.clip(move, -0.5, 0.5)
        if float(np.abs(move).max()) < 1e-7:
            break
    covariance = np.asarray(np.linalg.inv(precision + weight * jacobian.T @ jacobian), dtype=np.float64)
    return Posterior(x, covariance, prior.residual, len(log_times))
