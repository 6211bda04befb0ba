"""Statistics of inputs against their definitions, whatever the batches."""

from __future__ import annotations

import pytest
import torch

from fewbit.errors import FormatError
from fewbit.methods import statistics
from fewbit.methods.statistics import InputStatistics


def gathered(x: torch.Tensor, reference: torch.Tensor, batch: int) -> InputStatistics:
    result = InputStatistics(x.shape[1], hessian=True, cross=True, sample_tokens=16)
    for start in range(0, len(x), batch):
        result.update(x[start : start + batch], reference[start : start + batch])
    return result


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_they_are_what_their_names_say(batch: int) -> None:
    x, reference = torch.randn(100, 12), torch.randn(100, 12)
    s = gathered(x, reference, batch)
    assert s.tokens == 100
    torch.testing.assert_close(s.hessian, x.T @ x / 100)
    torch.testing.assert_close(s.cross, (reference - x).T @ x / 100)
    torch.testing.assert_close(s.mean_square, x.square().mean(0))
    torch.testing.assert_close(s.mean_abs, x.abs().mean(0))
    assert torch.equal(s.max_abs, x.abs().amax(0))


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_the_sample_is_drawn_evenly_whatever_the_batches(batch: int) -> None:
    x = torch.arange(100.0)[:, None].repeat(1, 3)
    rows = gathered(x, x, batch).sample[:, 0].tolist()
    assert rows == list(range(0, 100, 8))


def test_wide_inputs_are_added_up_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_BLOCK_COLUMNS", 5)
    x = torch.randn(40, 12)
    s = InputStatistics(12, hessian=True)
    s.update(x[:30])
    torch.testing.assert_close(s.hessian, x[:30].T @ x[:30] / 30)
    s.update(x[30:])  # after the upper half was read once
    torch.testing.assert_close(s.moments, x.T @ x)
    torch.testing.assert_close(s.scaled(torch.full((12,), 2.0)).moments, x.T @ x / 4)
    torch.testing.assert_close(InputStatistics.pooled([s, s]).moments, 2 * x.T @ x)


def test_scaled_statistics_are_those_of_the_scaled_input() -> None:
    x, reference, scale = torch.randn(50, 12), torch.randn(50, 12), torch.rand(12) + 0.5
    scaled, expected = gathered(x, reference, 20).scaled(scale), gathered(x / scale, reference / scale, 20)
    for name in ("hessian", "cross", "mean_square", "mean_abs", "max_abs", "sample"):
        torch.testing.assert_close(getattr(scaled, name), getattr(expected, name))


def test_pooled_statistics_are_those_of_all_tokens() -> None:
    x, reference = torch.randn(90, 12), torch.randn(90, 12)
    parts = [gathered(x[cut], reference[cut], 20) for cut in (slice(0, 10), slice(10, 10), slice(10, 90))]
    pooled, expected = InputStatistics.pooled(parts), gathered(x, reference, 20)
    assert pooled.tokens == 90 and len(pooled.sample) <= 16
    for name in ("hessian", "cross", "mean_square", "mean_abs", "max_abs"):
        torch.testing.assert_close(getattr(pooled, name), getattr(expected, name))
    with pytest.raises(FormatError, match="different kinds"):
        InputStatistics.pooled([parts[0], InputStatistics(12)])


def test_what_they_refuse() -> None:
    s = InputStatistics(4, cross=True)
    with pytest.raises(FormatError, match="width 5"):
        s.update(torch.zeros(2, 5))
    with pytest.raises(FormatError, match="NaN"):
        s.update(torch.tensor([[0.0, float("nan"), 0.0, 0.0]]))
    with pytest.raises(FormatError, match="reference"):
        s.update(torch.zeros(2, 4))
