"""LLM.int8(): outlier columns keep their precision, the others get INT8; the kernels compute the definition."""

from __future__ import annotations

import pytest
import torch

from fewbit.errors import FormatError
from fewbit.formats.quantize import dequantize, fake_quantize, outlier_columns
from fewbit.formats.spec import SCHEMES, QuantSpec
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.dispatch import KERNELS
from fewbit.methods.llm_int8 import llm_int8_matmul
from fewbit.methods.rtn import rtn

INPUTS: QuantSpec = SCHEMES["LLM-INT8"].input_activations  # type: ignore[assignment]
PLAIN: QuantSpec = SCHEMES["W8A8"].input_activations  # type: ignore[assignment]
WEIGHTS: QuantSpec = SCHEMES["LLM-INT8"].weights  # type: ignore[assignment]
assert INPUTS is not None and PLAIN is not None and WEIGHTS is not None


def inputs_with_outliers(tokens: int = 24, columns: int = 256) -> torch.Tensor:
    """Columns 7 and 100 are a hundred times as large as the others."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).clamp_(-5, 5)
    x[:, [7, 100]] *= 100
    return x


def test_outlier_columns_are_those_with_any_value_beyond_the_threshold() -> None:
    x = torch.zeros(2, 3, 5)
    x[1, 2, 3], x[0, 0, 1], x[0, 1, 4] = -6.5, 6.0, 1.0
    assert outlier_columns(x, 6.0).tolist() == [False, False, False, True, False]
    assert outlier_columns(x[1, 2], 6.0).tolist() == [False, False, False, True, False]


def test_outliers_stay_and_the_rest_is_quantized_as_if_they_were_not_there() -> None:
    x = inputs_with_outliers()
    back, columns = fake_quantize(x, INPUTS), outlier_columns(x, 6.0)
    assert columns.nonzero().flatten().tolist() == [7, 100]
    assert torch.equal(back[:, columns], x[:, columns])
    assert torch.equal(back[:, ~columns], fake_quantize(x.masked_fill(columns, 0.0), PLAIN)[:, ~columns])
    small = x[:, ~columns]
    assert torch.equal(fake_quantize(small, INPUTS), fake_quantize(small, PLAIN))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 24])
@pytest.mark.parametrize("kernel", ["reference", "onednn-w8a8"])
def test_kernels_compute_the_definition(kernel: str, tokens: int, dtype: torch.dtype) -> None:
    chosen = next(k for k in KERNELS if k.name == kernel)
    request = KernelRequest(WEIGHTS, INPUTS, 48, 256, dtype=dtype)
    if (reason := chosen.refuse(request)) is not None:
        pytest.skip(reason)
    weight = rtn(torch.randn(48, 256, generator=torch.Generator().manual_seed(1)) * 0.05, WEIGHTS)
    x, bias = inputs_with_outliers(tokens).to(dtype), torch.randn(48).to(dtype)
    y = chosen.apply(x.view(1, tokens, 256), chosen.pack(weight, request), bias, request)
    expected = llm_int8_matmul(x, weight, INPUTS) + bias.double()
    # 16 bits of the largest outlier times the weights it meets, and the rounding of the result
    bound = x.double().abs().amax() * 2.0**-16 * dequantize(weight).double()[:, [7, 100]].abs().sum(1)
    rounding = expected.abs() * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-20)
    assert bool(((y[0].double() - expected).abs() <= bound + rounding + 1e-4).all())


def test_outliers_ruin_w8a8_and_not_llm_int8() -> None:
    x, w = inputs_with_outliers(), torch.randn(48, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    weight = rtn(w, WEIGHTS)
    exact = x.double() @ dequantize(weight).double().T
    plain = fake_quantize(x, PLAIN).double() @ dequantize(weight).double().T
    rest = exact - x[:, [7, 100]].double() @ dequantize(weight)[:, [7, 100]].double().T  # what the other columns say
    apart = llm_int8_matmul(x, weight, INPUTS)
    assert (plain - exact).norm() > 0.2 * rest.norm() and (apart - exact).norm() < 0.02 * rest.norm()


def test_thresholds_that_make_no_sense() -> None:
    weight = rtn(torch.ones(4, 8), WEIGHTS)
    with pytest.raises(FormatError, match="no threshold"):
        llm_int8_matmul(torch.ones(2, 8), weight, PLAIN)
    for bad in ({"outlier_threshold": 0.0, "dynamic": True, "strategy": "token"}, {"outlier_threshold": 6.0, "strategy": "channel"}):
        with pytest.raises(FormatError, match="outlier_threshold"):
            QuantSpec(8, **bad)  # type: ignore[arg-type]
