"""Intervals of a posterior: symmetric, except where a factor has a ceiling."""

from __future__ import annotations

import numpy as np
import pytest

from fewbit.predict.calibration import Z90, Posterior

MEAN = np.array([-0.05, 0.1, -0.2])
ROOT = np.array([[0.09, 0.0, 0.0], [0.03, 0.1, 0.0], [-0.02, 0.05, 0.12]])
POSTERIOR = Posterior(MEAN, ROOT @ ROOT.T, 0.03, 0)
NONE = np.full(3, np.inf)
FIRST = np.array([0.0, np.inf, np.inf])


def test_without_a_ceiling_the_interval_is_normal() -> None:
    gradient = np.array([-0.8, 0.2, 0.1])
    half = Z90 * POSTERIOR.log_sd(gradient)
    assert POSTERIOR.interval(gradient, NONE) == (-half, half)
    without = np.array([0.0, 0.2, 0.1])  # what has a ceiling does not matter
    half = Z90 * POSTERIOR.log_sd(without)
    assert POSTERIOR.interval(without, FIRST) == (-half, half)


@pytest.mark.parametrize("gradient", [[-0.8, 0.2, 0.1], [0.8, 0.2, 0.1], [-0.5, 0.0, 0.0]])
def test_a_ceiling_cuts_one_side(gradient: list[float]) -> None:
    g = np.array(gradient)
    low, high = POSTERIOR.interval(g, FIRST)
    half = Z90 * POSTERIOR.log_sd(g)
    cut, kept = (-low, high) if g[0] < 0 else (high, -low)
    assert cut < 0.97 * half and kept == pytest.approx(half, rel=0.01)
    draw = np.random.default_rng(0)
    factors = np.minimum(draw.multivariate_normal(MEAN, POSTERIOR.covariance, size=200_000), FIRST)
    logs = (factors - MEAN) @ g + draw.normal(size=len(factors)) * POSTERIOR.residual
    assert (low, high) == pytest.approx(tuple(np.quantile(logs, [0.05, 0.95])), abs=0.01 * half)


def test_ceilings_that_pull_apart_are_left_out() -> None:
    gradient = np.array([-0.8, 0.2, 0.0])
    half = Z90 * POSTERIOR.log_sd(gradient)
    assert POSTERIOR.interval(gradient, np.array([0.0, 0.3, np.inf])) == (-half, half)
