"""Clipping against output error: better than scales that only see the weight, in every format, and never by accident."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewbit.errors import FormatError
from fewbit.formats import SCHEMES, QuantizedTensor, QuantSpec, dequantize
from fewbit.methods.clipping import ClipSettings, clip
from fewbit.methods.rtn import rtn
from fewbit.methods.statistics import InputStatistics

COLUMNS = 256


def spec_of(scheme: str) -> QuantSpec:
    spec = SCHEMES[scheme].weights
    assert spec is not None
    return spec


def data(tokens: int = 1024, seed: int = 0) -> tuple[torch.Tensor, InputStatistics]:
    """A weight, and inputs with a few strong common directions, as activations have."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, COLUMNS, generator=g) * 0.05
    directions = torch.randn(6, COLUMNS, generator=g)
    x = torch.randn(tokens, 6, generator=g) @ directions + 0.3 * torch.randn(tokens, COLUMNS, generator=g) + directions[0]
    statistics = InputStatistics(COLUMNS, hessian=True, sample_tokens=512)
    statistics.update(x)
    return weight, statistics


def output_error(weight: torch.Tensor, q: QuantizedTensor, statistics: InputStatistics) -> float:
    difference, hessian = dequantize(q) - weight, statistics.hessian
    assert hessian is not None
    return float((((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum()).sqrt())


@pytest.mark.parametrize(
    "scheme", ["W4A16", "W4A16-G32", "W3A16", "W2A16", "W4A16-ASYM", "W3A16-ASYM", "W4A16-CHANNEL", "W8A16", "NF4", "NVFP4"]
)
def test_the_error_of_the_outputs_falls_in_every_format(scheme: str) -> None:
    weight, statistics = data()
    spec, before = spec_of(scheme), weight.clone()
    q = clip(weight, spec, statistics)
    plain = rtn(weight, spec, observer="mse", importance=statistics.mean_square)
    assert (q.spec, q.scale.shape, q.scale.dtype, q.values.dtype) == (spec, plain.scale.shape, plain.scale.dtype, plain.values.dtype)
    assert (q.zero_point is None) == spec.symmetric
    assert torch.equal(weight, before)
    assert output_error(weight, q, statistics) < 0.7 * output_error(weight, plain, statistics)


@pytest.mark.parametrize("scheme", ["MXFP4", "FP8-BLOCK"])
def test_other_strategies_are_rounded_with_mse_scales(scheme: str) -> None:
    weight, statistics = data()
    q, plain = clip(weight, spec_of(scheme), statistics), rtn(weight, spec_of(scheme), observer="mse", importance=statistics.mean_square)
    assert torch.equal(dequantize(q), dequantize(plain))


def test_more_work_is_worth_it() -> None:
    weight, statistics = data()
    once, twice, finer = (
        output_error(weight, clip(weight, spec_of("W4A16-G32"), statistics, settings), statistics)
        for settings in (ClipSettings(sweeps=1, shrinkage=0.0), ClipSettings(shrinkage=0.0), ClipSettings(candidates=60, shrinkage=0.0))
    )
    assert finer < twice < once


def test_what_is_learned_holds_for_other_tokens() -> None:
    """With fewer tokens than columns H is singular; the outputs on tokens that were not seen still get better."""
    weight, unseen = data(tokens=4096)
    few = InputStatistics(COLUMNS, hessian=True)
    g = torch.Generator().manual_seed(0)
    few.update(unseen.sample[torch.randperm(len(unseen.sample), generator=g)[:64]])
    spec = spec_of("W4A16-G32")
    plain = rtn(weight, spec, observer="mse", importance=few.mean_square)
    assert output_error(weight, clip(weight, spec, few), unseen) < 0.9 * output_error(weight, plain, unseen)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    weight, statistics = data()
    whole, alone = (clip(w, spec_of("W4A16-G32"), statistics) for w in (weight, weight[7:8]))
    torch.testing.assert_close(dequantize(whole)[7:8], dequantize(alone), rtol=0, atol=2e-3)


def test_edges() -> None:
    weight, statistics = data()
    weight[3] = 0
    weight[4, :32] = 0
    for scheme in ("W4A16-G32", "W4A16-ASYM", "NVFP4"):
        back = dequantize(clip(weight, spec_of(scheme), statistics))
        assert bool(back.isfinite().all())
        assert float(back[3].abs().max()) == 0
    dead = InputStatistics(COLUMNS, hessian=True)
    dead.update(torch.zeros(4, COLUMNS))
    assert bool(dequantize(clip(weight, spec_of("W4A16"), dead)).isfinite().all())
    with pytest.raises(FormatError, match="width"):
        clip(weight[:, :128], spec_of("W4A16"), statistics)
    with pytest.raises(FormatError, match="second moments"):
        clip(weight, spec_of("W4A16"), InputStatistics(COLUMNS))


def test_scales_that_float16_can_hold() -> None:
    weight, statistics = data()
    q = clip(weight, replace(spec_of("W4A16"), scale_dtype="float16"), statistics)
    assert q.scale.dtype == torch.float16
    assert output_error(weight, q, statistics) < 0.05
