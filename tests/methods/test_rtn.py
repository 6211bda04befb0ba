"""RTN: the published ordering of formats, and that it only reads the weight."""

from __future__ import annotations

import pytest
import torch

from fewbit.errors import FormatError
from fewbit.formats import SCHEMES, dequantize
from fewbit.formats.quantize import quantize
from fewbit.methods.rtn import rtn


def weight() -> torch.Tensor:
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float32).bfloat16()


def relative_error(name: str, observer: str = "minmax") -> float:
    spec = SCHEMES[name].weights
    assert spec is not None
    w = weight()
    return float((dequantize(rtn(w, spec, observer=observer)) - w.float()).norm() / w.float().norm())  # type: ignore[arg-type]


def test_minmax_rtn_is_plain_quantization_and_does_not_change_the_weight() -> None:
    spec = SCHEMES["W4A16"].weights
    assert spec is not None
    w, before = weight(), weight()
    assert torch.equal(rtn(w, spec).values, quantize(w, spec).values)
    assert torch.equal(w, before)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("W8A16", "W4A16"), ("W4A16", "W3A16"), ("W3A16", "W2A16"), ("W4A16-G32", "W4A16"), 
        ("W4A16", "W4A16-CHANNEL"), ("W4A16-ASYM", "W4A16"),
        ("NF4", "W4A16"), ("NVFP4", "MXFP4"), ("FP8A16", "FP8-E5M2"), ("W8A16", "FP8A16"), ("FP8A16", "W4A16"),
    ],
)  # fmt: skip
def test_errors_on_gaussian_weights_are_ordered_as_the_formats(better: str, worse: str) -> None:
    assert relative_error(better) < relative_error(worse)


def test_four_bits_err_by_a_tenth_and_each_bit_is_worth_six_decibels() -> None:
    assert relative_error("W4A16") == pytest.approx(0.11, abs=0.01)
    assert relative_error("W3A16") / relative_error("W4A16") == pytest.approx(2.1, abs=0.15)


@pytest.mark.parametrize("name", ["W4A16", "W2A16", "NF4", "MXFP4", "NVFP4"])
def test_mse_scales_err_less(name: str) -> None:
    assert relative_error(name, "mse") < relative_error(name)


def test_importance_is_checked() -> None:
    spec = SCHEMES["W4A16"].weights
    assert spec is not None
    with pytest.raises(FormatError, match="importance"):
        rtn(weight(), spec, observer="mse", importance=torch.ones(5))
