"""Percentiles against NumPy, and the coverage of the median's interval against the binomial distribution and by simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.bench.percentiles import MIN_SAMPLES_FOR_INTERVAL, median, median_interval, percentile
from fewbit.errors import MeasurementError

TIMES = st.lists(st.floats(min_value=1e-3, max_value=1e6), min_size=1, max_size=200)


@given(values=TIMES, percent=st.floats(min_value=0, max_value=100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9)


def test_no_samples() -> None:
    with pytest.raises(MeasurementError, match="no samples"):
        median([])


@given(values=TIMES)
def test_interval_encloses_the_median_and_stays_in_range(values: list[float]) -> None:
    interval = median_interval(values)
    assert min(values) <= interval.low <= interval.value <= interval.high <= max(values)


@pytest.mark.parametrize("n", [MIN_SAMPLES_FOR_INTERVAL, 7, 12, 30, 101])
def test_ranks_cover_95_percent_and_no_narrower_pair_does(n: int) -> None:
    interval = median_interval([float(i) for i in range(1, n + 1)])
    rank = int(interval.low)  # values are their own ranks
    assert interval.high == n + 1 - rank

    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    assert coverage(rank) >= 0.95
    assert coverage(rank + 1) < 0.95 or rank == n // 2


def test_known_ranks() -> None:
    # Binomial tables: n = 12 takes the 3rd and the 10th (96.1 %), n = 6 the extremes (96.9 %).
    assert (median_interval(list(map(float, range(1, 13)))).low, median_interval(list(map(float, range(1, 13)))).high) == (3, 10)
    assert (median_interval(list(map(float, range(1, 7)))).low, median_interval(list(map(float, range(1, 7)))).high) == (1, 6)


def test_coverage_by_simulation() -> None:
    generator = random.Random(0)
    true_median = math.exp(0.0)
    hits = 0
    for _ in range(1000):
        interval = median_interval([generator.lognormvariate(0, 1) for _ in range(12)])
        hits += interval.low <= true_median <= interval.high
    assert hits >= 930
