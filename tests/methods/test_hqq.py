"""HQQ: never worse than RTN in the norm it minimizes, better where a few weights lie far out, and only what the formats hold."""

from __future__ import annotations

import pytest
import torch

from fewbit.errors import FormatError, UsageError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import SCHEMES, QuantSpec
from fewbit.methods.hqq import HQQSettings, hqq, hqq_objective
from fewbit.methods.rtn import rtn

NAMES = ["W8A16", "W4A16", "W4A16-ASYM", "W4A16-CHANNEL", "W3A16", "W3A16-ASYM", "W2A16", "W2A16-ASYM"]
OTHERS = {"tensor": QuantSpec(4), "block": QuantSpec(4, strategy="block", block_shape=(24, 96), symmetric=False)}


def spec_of(name: str) -> QuantSpec:
    spec = OTHERS.get(name) or SCHEMES[name].weights
    assert spec is not None
    return spec


def heavy_tailed(rows: int = 48, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """Gaussian weights of which one in a hundred is six times as large."""
    generator = torch.Generator().manual_seed(seed)
    far = torch.rand(rows, columns, generator=generator) < 0.01
    return torch.randn(rows, columns, generator=generator) * 0.02 * torch.where(far, 6.0, 1.0)


def group_objectives(weight: torch.Tensor, dequantized: torch.Tensor, spec: QuantSpec, p: float = 0.7) -> torch.Tensor:
    size = spec.group_size or weight.shape[1]
    return (weight - dequantized).abs().pow(p).view(weight.shape[0], -1, size).sum(-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", ["gaussian", "heavy-tailed", "shifted"])
def test_no_group_is_worse_than_rtns_in_its_own_objective(name: str, data: str) -> None:
    spec = spec_of(name)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1)) * 0.02 if data == "gaussian" else heavy_tailed()
    weight = weight + 0.03 if data == "shifted" else weight
    found = group_objectives(weight, dequantize(hqq(weight, spec)), spec)
    for observer in ("minmax", "mse"):
        other = group_objectives(weight, dequantize(rtn(weight, spec, observer=observer)), spec)  # type: ignore[arg-type]
        assert bool((found <= other * (1 + 1e-5)).all()), observer


@pytest.mark.parametrize("name", ["W4A16", "W4A16-ASYM", "W3A16", "W3A16-ASYM", "W2A16", "W2A16-ASYM"])
def test_it_finds_better_ones_than_either_observer(name: str) -> None:
    spec, weight = spec_of(name), heavy_tailed()
    objective = hqq_objective(weight, dequantize(hqq(weight, spec)))
    share = 0.99 if spec.symmetric else 0.9995  # an integer zero point has little room
    assert objective < share * hqq_objective(weight, dequantize(rtn(weight, spec)))
    assert objective < share * hqq_objective(weight, dequantize(rtn(weight, spec, observer="mse")))


@pytest.mark.parametrize("name", OTHERS)
def test_scales_that_rows_share(name: str) -> None:
    spec, weight = spec_of(name), heavy_tailed()
    best = min(hqq_objective(weight, dequantize(rtn(weight, spec, observer=observer))) for observer in ("minmax", "mse"))  # type: ignore[arg-type]
    q = hqq(weight, spec)
    assert hqq_objective(weight, dequantize(q)) <= best * (1 + 1e-5)
    assert q.scale.shape == rtn(weight, spec).scale.shape


@pytest.mark.parametrize("name", ["W4A16", "W4A16-ASYM"])
def test_what_comes_out_is_what_the_format_holds(name: str) -> None:
    spec, weight = spec_of(name), heavy_tailed()
    before = weight.clone()
    q, again = hqq(weight, spec), hqq(weight, spec)
    assert torch.equal(weight, before) and torch.equal(q.values, again.values) and torch.equal(q.scale, again.scale)
    assert q.spec == spec and q.scale.dtype == torch.bfloat16 and q.values.dtype == torch.int8
    assert (q.zero_point is None) == spec.symmetric
    if q.zero_point is not None:
        assert q.zero_point.dtype == torch.int8 and bool((q.zero_point.abs() <= 8).all())


@pytest.mark.parametrize("name", ["W4A16", "W4A16-ASYM", "W2A16"])
def test_zero_and_constant_groups(name: str) -> None:
    weight = torch.zeros(4, 256)
    weight[1], weight[2, :128], weight[3, 5] = 0.25, -0.5, 3.0
    back = dequantize(hqq(weight, spec_of(name)))
    assert bool(back.isfinite().all()) and not back[0].any() and not back[2, 128:].any()
    torch.testing.assert_close(back, weight, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_whatever_p_its_own_norm_is_never_worse(p: float) -> None:
    spec, weight = spec_of("W3A16"), heavy_tailed()
    found = group_objectives(weight, dequantize(hqq(weight, spec, HQQSettings(p=p))), spec, p)
    least = group_objectives(weight, dequantize(rtn(weight, spec, observer="mse")), spec, p)
    assert bool((found <= least * (1 + 1e-5)).all()) and float(found.sum()) < 0.995 * float(least.sum())


@pytest.mark.parametrize("name", ["NF4", "FP8A16", "NVFP4", "MXFP4"])
def test_other_formats_are_refused_by_name(name: str) -> None:
    with pytest.raises(FormatError, match="HQQ chooses scales and zero points of integers"):
        hqq(heavy_tailed(), spec_of(name))


@pytest.mark.parametrize("bad", [{"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"kappa": 0.9}, {"iterations": 0}])
def test_settings_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="cannot be meant"):
        HQQSettings(**bad)  # type: ignore[arg-type]
