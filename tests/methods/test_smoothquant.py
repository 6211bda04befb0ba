"""SmoothQuant against the true W8A8 error, and static activation scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewbit.errors import FormatError
from fewbit.formats import SCHEMES, QuantSpec, dequantize, fake_quantize
from fewbit.methods.rtn import rtn
from fewbit.methods.smoothquant import SmoothQuantSettings, quantize_inputs, smoothquant_scales, static_input_scale
from fewbit.methods.statistics import InputStatistics

WEIGHTS: QuantSpec = SCHEMES["W8A8"].weights  # type: ignore[assignment]
INPUTS: QuantSpec = SCHEMES["W8A8"].input_activations  # type: ignore[assignment]
assert WEIGHTS is not None and INPUTS is not None
STATIC = replace(INPUTS, strategy="tensor", dynamic=False)


def data(outlier: float = 100.0) -> tuple[list[torch.Tensor], torch.Tensor, InputStatistics]:
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 64, generator=g) * 0.05 for rows in (40, 24)]
    x = torch.randn(256, 64, generator=g)
    x[:, [3, 50]] *= outlier
    for w in weights:
        w[:, [3, 50]] /= outlier
    statistics = InputStatistics(64, sample_tokens=256)
    statistics.update(x)
    return weights, x, statistics


def w8a8_error(weights: list[torch.Tensor], x: torch.Tensor, scale: torch.Tensor, spec: QuantSpec = INPUTS) -> float:
    w = torch.cat(weights)
    error = fake_quantize(x / scale, spec) @ dequantize(rtn(w * scale, WEIGHTS)).T - x @ w.T
    return float(error.norm() / (x @ w.T).norm())


def test_the_search_reports_the_true_error_and_removes_the_outliers() -> None:
    weights, x, statistics = data()
    result = smoothquant_scales(weights, WEIGHTS, INPUTS, statistics)
    assert result.error_before == pytest.approx(w8a8_error(weights, x, torch.ones(64)), rel=1e-3)
    assert result.error_after == pytest.approx(w8a8_error(weights, x, result.scale), rel=1e-3)
    assert result.error_after < 0.1 * result.error_before
    assert result.error_after == min(error for _, error in result.errors)
    assert result.strength is not None and 0 < result.strength < 1
    assert len(result.errors) == 21


def test_a_single_strength_is_taken_as_it_is() -> None:
    weights, _, statistics = data(outlier=1.0)
    result = smoothquant_scales(weights, WEIGHTS, INPUTS, statistics, SmoothQuantSettings(strengths=(0.5,)))
    assert result.strength == 0.5
    columns = torch.cat(weights).abs().amax(0)
    expected = (statistics.max_abs / columns).sqrt()
    torch.testing.assert_close(result.scale / result.scale[0], expected / expected[0])


def test_strength_zero_flattens_the_weights_and_one_the_activations() -> None:
    weights, _, statistics = data()
    for strength, flat in ((0.0, lambda s: torch.cat(weights).abs().amax(0) * s), (1.0, lambda s: statistics.max_abs / s)):
        scale = smoothquant_scales(weights, WEIGHTS, INPUTS, statistics, SmoothQuantSettings(strengths=(strength,))).scale
        values = flat(scale)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(values, values.mean().expand(64), rtol=1e-4, atol=0)


def test_static_inputs() -> None:
    weights, x, statistics = data()
    result = smoothquant_scales(weights, WEIGHTS, STATIC, statistics)
    scale = static_input_scale(statistics.scaled(result.scale), STATIC)
    w = torch.cat(weights)
    error = quantize_inputs(x / result.scale, STATIC, scale) @ dequantize(rtn(w * result.scale, WEIGHTS)).T - x @ w.T
    assert float(error.norm() / (x @ w.T).norm()) == pytest.approx(result.error_after, rel=1e-3)
    assert result.error_after < 0.1 * result.error_before


def test_static_scales_cover_everything_or_clip_where_it_pays() -> None:
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 200.0
    statistics = InputStatistics(8, sample_tokens=4096)
    statistics.update(x)
    full, clipped = (static_input_scale(statistics, STATIC, observer=o) for o in ("minmax", "mse"))
    assert full.shape == (1,) and float(full) == pytest.approx(200 / 127.5)
    errors = [float((quantize_inputs(x, STATIC, s) - x).square().sum()) for s in (full, clipped)]
    assert errors[1] < errors[0]
    assert float(static_input_scale(InputStatistics(8), STATIC)) > 0


@pytest.mark.parametrize("dead", [slice(0, 3), slice(0, 64)])
def test_dead_channels(dead: slice) -> None:
    weights, x, _ = data()
    x[:, dead] = 0
    statistics = InputStatistics(64, sample_tokens=64)
    statistics.update(x)
    result = smoothquant_scales(weights, WEIGHTS, INPUTS, statistics)
    assert bool(result.scale.isfinite().all()) and bool((result.scale > 0).all())
    assert result.error_after <= result.error_before


def test_columns_of_one_channel_share_their_scale() -> None:
    weights, _, statistics = data()
    channels = torch.arange(64) % 32
    result = smoothquant_scales(weights, WEIGHTS, INPUTS, statistics, channels=channels)
    assert torch.equal(result.scale[:32], result.scale[32:])


def test_refusals() -> None:
    weights, x, statistics = data()
    no_sample = InputStatistics(64)
    no_sample.update(x)
    with pytest.raises(FormatError, match="sample"):
        smoothquant_scales(weights, WEIGHTS, INPUTS, no_sample)
    with pytest.raises(FormatError, match="width"):
        smoothquant_scales([w[:, :32] for w in weights], WEIGHTS, INPUTS, statistics)
    with pytest.raises(FormatError, match="static"):
        quantize_inputs(x, STATIC)
    with pytest.raises(FormatError, match="per tensor"):
        static_input_scale(statistics, replace(INPUTS, dynamic=False))
