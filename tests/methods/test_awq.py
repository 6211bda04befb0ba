"""AWQ finds the channels that matter, and its error is the error of the outputs."""

from __future__ import annotations

import pytest
import torch

from fewbit.errors import FormatError
from fewbit.formats import SCHEMES, QuantSpec, dequantize
from fewbit.methods.awq import AWQSettings, awq_scales
from fewbit.methods.rtn import rtn
from fewbit.methods.statistics import InputStatistics

SPEC: QuantSpec = SCHEMES["W4A16-G32"].weights  # type: ignore[assignment]
assert SPEC is not None


def data(columns: int = 64, rows: int = 48, tokens: int = 512, outliers: float = 20.0) -> tuple[list[torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, columns, generator=g) * 0.05, torch.randn(rows // 2, columns, generator=g) * 0.05]
    x = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g) / columns**0.5
    x[:, ::16] *= outliers
    return weights, x


def statistics_of(x: torch.Tensor, hessian: bool = True, sample: int = 0) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], hessian=hessian, sample_tokens=sample)
    statistics.update(x)
    return statistics


def output_error(weights: list[torch.Tensor], x: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> float:
    def rounded(w: torch.Tensor) -> torch.Tensor:
        return dequantize(rtn(w * scale, spec, observer="mse", importance=(x / scale).square().mean(0)))

    error = sum(float(((x / scale) @ rounded(w).T - x @ w.T).square().sum()) for w in weights)
    return (error / sum(float((x @ w.T).square().sum()) for w in weights)) ** 0.5


def test_the_search_reports_the_true_output_error_and_lowers_it() -> None:
    weights, x = data()
    result = awq_scales(weights, SPEC, statistics_of(x))
    assert result.error_before == pytest.approx(output_error(weights, x, torch.ones(64), SPEC), rel=1e-3)
    assert result.error_after == pytest.approx(output_error(weights, x, result.scale, SPEC), rel=1e-3)
    assert result.error_after < 0.85 * result.error_before
    large = torch.zeros(64, dtype=torch.bool)
    large[::16] = True
    assert float(result.scale[large].min()) > 1.5 * float(result.scale[~large].median())


def test_more_candidates_are_never_worse() -> None:
    weights, x = data()
    statistics = statistics_of(x)
    coarse = awq_scales(weights, SPEC, statistics, AWQSettings(grid_points=5, duo=False))
    fine = awq_scales(weights, SPEC, statistics, AWQSettings(grid_points=20))
    assert fine.error_after <= coarse.error_after < coarse.error_before


def test_sketch_and_sample_estimate_the_same_error() -> None:
    weights, x = data(columns=256, rows=600, tokens=2048)
    exact = awq_scales(weights, SPEC, statistics_of(x))
    sketched = awq_scales(weights, SPEC, statistics_of(x), AWQSettings(sketch=128, most_rows=300))
    sampled = awq_scales(weights, SPEC, statistics_of(x, hessian=False, sample=512))
    for estimate in (sketched, sampled):
        assert estimate.error_before == pytest.approx(exact.error_before, rel=0.1)
        assert output_error(weights, x, estimate.scale, SPEC) < 1.05 * exact.error_after


def test_columns_of_one_channel_share_their_scale() -> None:
    weights, x = data()
    channels = torch.arange(64) % 16 + 16 * (torch.arange(64) // 32)
    result = awq_scales(weights, SPEC, statistics_of(x), channels=channels)
    assert torch.equal(result.scale[:16], result.scale[16:32])
    assert torch.equal(result.scale[32:48], result.scale[48:])
    assert result.error_after < result.error_before


def test_equal_channels_stay_as_they_are_or_get_better() -> None:
    weights, x = data(outliers=1.0)
    result = awq_scales(weights, SPEC, statistics_of(x))
    assert result.error_after <= result.error_before
    assert output_error(weights, x, result.scale, SPEC) <= output_error(weights, x, torch.ones(64), SPEC) * 1.001


@pytest.mark.parametrize("dead", [slice(0, 3), slice(0, 64)])
def test_dead_channels(dead: slice) -> None:
    weights, x = data()
    x[:, dead] = 0
    result = awq_scales(weights, SPEC, statistics_of(x))
    assert bool(result.scale.isfinite().all()) and bool((result.scale > 0).all())
    assert result.error_after <= result.error_before


def test_refusals() -> None:
    weights, x = data()
    with pytest.raises(FormatError, match="width"):
        awq_scales(weights, SPEC, statistics_of(x[:, :32]))
    with pytest.raises(FormatError, match="second moments"):
        awq_scales(weights, SPEC, statistics_of(x, hessian=False))
