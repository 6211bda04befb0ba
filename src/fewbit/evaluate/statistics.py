"""Means over tokens with intervals that respect what is independent.

Tokens inside one window are not independent: a difficult passage is difficult for many tokens in a row. Treating n tokens as n
observations would make the interval too narrow by the square root of the design effect. Windows are far apart
in the text, so they are the independent units (clusters), and their number, not the number of tokens, decides how sure we are.

With window w of n_w tokens and the sum s_w of a per-token figure, the mean and its linearized (sandwich) standard error are

    m = sum_w s_w / sum_w n_w
    se = sqrt( W / (W - 1) * sum_w (s_w - m n_w)^2 ) / sum_w n_w

and the 95 % interval is m -+ t(0.975, W - 1) se. This is the ratio estimator of survey sampling (Cochran, Sampling Techniques, 3rd ed.,
chapter 9A), which for windows of equal length is the plain t-interval over the windows' means.

Pairing. The loss of BF16 and of a variant on the same token rise and fall together, because both follow how difficult the token is.
Their *difference* is what is averaged, so that the difficulty cancels and a change far smaller than the interval of the
perplexity itself can be seen. Miller (arXiv 2411.00640) argues both points for model evaluations in general.

No bootstrap: it needs random numbers and gives, with a few dozen windows, intervals that are narrower than they claim; the t-interval
is deterministic and, checked by simulation in the tests, covers as it should.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fewbit.errors import MeasurementError
from fewbit.results import Interval

__all__ = ["clustered_mean", "t_quantile", "transform"]


def clustered_mean(sums: Sequence[float], counts: Sequence[int]) -> Interval:
    """The mean per token with its 95 % interval, windows as the independent units.

    Args:
        sums: per window, the sum of a per-token figure over the scored tokens.
        counts: per window, the number of scored tokens.

    Raises:
        MeasurementError: fewer than two windows, which say nothing about the spread.
    """
    clusters, total = len(sums), sum(counts)
    if clusters < 2:
        raise MeasurementError(f"a confidence interval over {clusters} window(s)", "evaluate more text")
    mean = math.fsum(sums) / total
    residual = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    error = math.sqrt(clusters / (clusters - 1) * residual) / total
    half = t_quantile(clusters - 1) * error
    return Interval(mean, mean - half, mean + half)


def transform(interval: Interval, function: Callable[[float], float]) -> Interval:
    """The interval under a monotone rising function: exp of a mean loss is a perplexity, and its ends are the ends of the interval."""
    return Interval(function(interval.value), function(interval.low), function(interval.high))


def t_quantile(degrees: int, probability: float = 0.975) -> float:
    """The point below which Student's t lies with the given probability, to 1e-9.

    Args:
        degrees: degrees of freedom, at least 1.
        probability: above 0.5.
    """
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0 and whole degrees of freedom, by the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = degrees % 2 == 1
    term, total = (cosine if odd else 1.0), 0.0
    for j in range(1, degrees // 2 + 1):
        total += term
        term *= cosine**2 * (2 * j / (2 * j + 1) if odd else (2 * j - 1) / (2 * j))
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return 0.5 + 0.5 * inside
