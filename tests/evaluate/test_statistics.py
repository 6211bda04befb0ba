"""The intervals cover what they claim, checked by simulation, and pairing narrows them."""

from __future__ import annotations

import math

import pytest
import torch

from fewbit.errors import MeasurementError
from fewbit.evaluate.statistics import clustered_mean, t_quantile, transform


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (1, 12.7062047),
        (2, 4.3026527),
        (3, 3.1824463),
        (4, 2.7764451),
        (10, 2.2281389),
        (31, 2.0395134),
        (120, 1.9799304),
        (1000, 1.9623391),
    ],
)
def test_t_quantile_agrees_with_published_tables(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-6)


def _simulated(clusters: int, generator: torch.Generator, mean: float) -> tuple[list[float], list[int]]:
    """Windows of 50 to 150 tokens; tokens share their window's difficulty (standard deviation 0.5) beside noise of their own (1)."""
    counts = torch.randint(50, 151, (clusters,), generator=generator)
    difficulty = 0.5 * torch.randn(clusters, generator=generator)
    noise = torch.randn(clusters, generator=generator) * counts.sqrt()
    return ((mean + difficulty) * counts + noise).tolist(), counts.tolist()


@pytest.mark.parametrize("clusters", [4, 16, 64])
def test_the_interval_covers_in_95_of_100_cases(clusters: int) -> None:
    generator = torch.Generator().manual_seed(clusters)
    runs = 1500
    covered = naive = 0
    for _ in range(runs):
        sums, counts = _simulated(clusters, generator, mean=3.0)
        interval = clustered_mean(sums, counts)
        covered += interval.low <= 3.0 <= interval.high
        # what an interval over tokens would claim: the same spread of a token, all tokens independent
        half = 1.96 * math.sqrt(0.5**2 + 1.0) / math.sqrt(sum(counts))
        naive += abs(interval.value - 3.0) <= half
    # the linearized error is a little small for few clusters of unequal size; 1500 runs are sure to 1.1 %
    assert 0.925 <= covered / runs <= 0.965
    assert naive / runs < 0.6


def test_pairing_narrows_the_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [511] * 32
    difficulty = 2.5 + 0.5 * torch.randn(32, generator=generator, dtype=torch.float64)
    baseline = difficulty * 511
    variant = baseline + 0.01 * 511 + 0.5 * torch.randn(32, generator=generator, dtype=torch.float64)
    paired = clustered_mean((variant - baseline).tolist(), counts)
    single = clustered_mean(variant.tolist(), counts)
    assert paired.low <= 0.01 <= paired.high
    assert (paired.high - paired.low) < 0.05 * (single.high - single.low)


def test_equal_windows_give_the_plain_t_interval() -> None:
    interval = clustered_mean([10.0, 20.0, 60.0], [10, 10, 10])
    means = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    half = 4.30265273 * float(means.std()) / math.sqrt(3)
    assert interval.value == pytest.approx(3.0)
    assert interval.high - interval.value == pytest.approx(half)
    assert interval.value - interval.low == pytest.approx(half)


def test_a_longer_window_weighs_more() -> None:
    assert clustered_mean([100.0, 30.0], [100, 10]).value == pytest.approx(130 / 110)


def test_one_window_has_no_interval() -> None:
    with pytest.raises(MeasurementError, match="1 window"):
        clustered_mean([1.0], [10])


def test_transform_keeps_the_ends() -> None:
    interval = transform(clustered_mean([1.0, 2.0], [1, 1]), math.exp)
    assert interval.value == pytest.approx(math.exp(1.5))
    assert math.log(interval.low) + math.log(interval.high) == pytest.approx(2 * 1.5)
