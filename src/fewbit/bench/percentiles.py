"""Percentiles of step times, and an interval for a median that assumes no distribution.

Step times are skewed (a floor set by the hardware, a tail set by everything else that runs), so the typical step is the median and the
tail is named by percentiles. The interval of a median comes from order statistics: of n independent samples the number below the true
median is Binomial(n, 1/2), so the k-th smallest and the k-th largest enclose it with probability 1 - 2 P(Binomial(n, 1/2) < k). With k the
largest rank that keeps this at 95 % or more, no normality, no resampling and no seed is needed. Six samples are the fewest that allow it.
(H. A. David, H. N. Nagaraja, Order Statistics, section 7.1.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fewbit.errors import MeasurementError
from fewbit.results import Interval

__all__ = ["MIN_SAMPLES_FOR_INTERVAL", "MIN_SAMPLES_FOR_P99", "median", "median_interval", "percentile"]

MIN_SAMPLES_FOR_INTERVAL = 6
MIN_SAMPLES_FOR_P99 = 100


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of `values` with linear interpolation between neighbours (NumPy's default).

    Args:
        values: at least one sample, any order.
        percent: 0 to 100.

    Raises:
        MeasurementError: there are no samples.
    """
    if not values:
        raise MeasurementError("no samples to take a percentile of", "allow at least one step")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median(values: Sequence[float]) -> float:
    """The 50th percentile."""
    return percentile(values, 50)


def median_interval(values: Sequence[float]) -> Interval:
    """The median with its 95 % interval from order statistics.

    Below `MIN_SAMPLES_FOR_INTERVAL` samples no such interval exists; the smallest and the largest are given, which cover the true median
    with probability 1 - 2 ** (1 - n) only.
    """
    n = len(values)
    rank, tail = 0, 0.0
    while rank < n // 2:
        tail += math.comb(n, rank) / 2**n  # P(Binomial(n, 1/2) <= rank)
        if 2 * tail > 0.05:
            break
        rank += 1
    ordered = sorted(values)
    low = max(rank - 1, 0)
    return Interval(value=median(ordered), low=ordered[low], high=ordered[n - 1 - low])
