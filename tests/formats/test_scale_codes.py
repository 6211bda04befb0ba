"""FP4 block scales: the search is exact, for plain and for weighted errors."""

from __future__ import annotations

import pytest
import torch

from fewbit.formats.quantize import dequantize, quantize
from fewbit.formats.scales import compute_scales, scale_as_float
from fewbit.formats.spec import SCHEMES, QuantSpec


def fp4(name: str) -> QuantSpec:
    spec = SCHEMES[name].weights
    assert spec is not None
    return spec


def block_errors(weight: torch.Tensor, spec: QuantSpec, scale: torch.Tensor, importance: torch.Tensor, global_scale) -> torch.Tensor:
    """Weighted squared error of each block, from quantize and dequantize."""
    q = quantize(weight, spec, scale=scale, global_scale=global_scale)
    return ((dequantize(q) - weight).square() * importance).view(*scale.shape, -1).sum(-1)


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_scale_code_at_all_errs_less(name: str, weighted: bool) -> None:
    spec, generator = fp4(name), torch.Generator().manual_seed(0)
    weight = torch.randn(32, 256, generator=generator) * torch.rand(32, 1, generator=generator)
    importance = torch.rand(256, generator=generator).exp() if weighted else torch.ones(256)
    scale, _, global_scale = compute_scales(weight, spec, observer="mse", importance=importance)
    found = block_errors(weight, spec, scale, importance, global_scale)
    codes = range(1, 127) if name == "NVFP4" else range(100, 140)
    every = [torch.full(scale.shape, code, dtype=torch.uint8).view(scale.dtype) for code in codes]
    best = torch.stack([block_errors(weight, spec, code, importance, global_scale) for code in every]).amin(0)
    torch.testing.assert_close(found, best, rtol=1e-6, atol=0)


def test_four_instead_of_six_is_found() -> None:
    """A block of threes and fours: with the largest value at 6 it has no point for 4.5, with the largest value at 4 all are exact."""
    spec = fp4("NVFP4")
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0] * 4, [6.0, 4.0, 3.0, 1.0] * 4, [1024.0] + [0.0] * 15])
    scale, _, global_scale = compute_scales(weight, spec, observer="mse")
    q = quantize(weight, spec, scale=scale, global_scale=global_scale)
    assert torch.equal(dequantize(q)[:2] / dequantize(q)[0, 3], weight[:2])
    minmax = quantize(weight, spec)
    assert bool((dequantize(minmax)[0] / dequantize(minmax)[0, 3] != weight[0]).any())


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
def test_the_largest_and_the_smallest_blocks_stay_within_the_codes(name: str) -> None:
    spec = fp4(name)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e30], [1e-30], [1.0], [0.0]])
    scale, _, global_scale = compute_scales(weight, spec, observer="mse")
    steps = scale_as_float(scale, spec, global_scale)
    assert bool(steps.isfinite().all()) and bool((steps[:3] > 0).all())
    assert not dequantize(quantize(weight, spec, scale=scale, global_scale=global_scale))[3].any()


def test_mse_takes_a_quarter_off_nvfp4s_squared_error_on_gaussian_weights() -> None:
    spec, weight = fp4("NVFP4"), torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    errors = {}
    for observer in ("minmax", "mse"):
        scale, _, global_scale = compute_scales(weight, spec, observer=observer)  # type: ignore[arg-type]
        errors[observer] = block_errors(weight, spec, scale, torch.ones(1024), global_scale).sum()
    assert errors["mse"] < 0.80 * errors["minmax"]
