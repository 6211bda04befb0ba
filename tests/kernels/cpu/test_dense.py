"""The native product with a weight in high precision against float64, on every instruction set that this CPU has."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fewbit import _native
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.cpu.extension import run_linear
from fewbit.kernels.dense import DenseKernel

SETS = _native.float_instruction_sets()
DTYPES = [torch.bfloat16, torch.float32]


def check(weight: torch.Tensor, x: torch.Tensor, instruction_set: str, bias: torch.Tensor | None = None) -> None:
    y = run_linear(_native.dense_linear(weight, instruction_set), x, bias)
    assert y.shape == (x.shape[0], weight.shape[0]) and y.dtype == x.dtype
    expected, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    rounding = expected.abs() * (2.0**-8 if x.dtype == torch.bfloat16 else 0.0)
    error = (y.double() - expected).abs()
    bound = magnitude * 2.0**-20 + rounding + 1e-37
    assert bool((error <= bound).all()), f"{instruction_set}: {(error / bound).max()} times the bound"


@pytest.mark.parametrize("instruction_set", SETS)
@given(
    out=st.integers(1, 100),
    columns=st.one_of(st.integers(1, 100), st.integers(500, 1100)),
    tokens=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    inputs=st.sampled_from(DTYPES),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(instruction_set, out, columns, tokens, dtype, inputs, biased, seed):
    torch.manual_seed(seed)
    bias = torch.randn(out) if biased else None
    check(torch.randn(out, columns).to(dtype), torch.randn(tokens, columns).to(inputs), instruction_set, bias)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_tokens(instruction_set, dtype):
    weight = torch.randn(70, 96).to(dtype)
    for tokens in range(1, 131):
        check(weight, torch.randn(tokens, 96), instruction_set)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_strides_and_alignment(instruction_set, tokens):
    whole = torch.randn(80, 301).bfloat16()
    for weight in (whole[:, 1:], whole[::2, :300], whole[3:, 7:8]):
        wide = torch.randn(tokens, 400)
        check(weight, wide[:, 1 : 1 + weight.shape[1]], instruction_set)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinite_inputs_spoil_their_token_and_no_other(instruction_set, bad, tokens, dtype):
    x = torch.randn(tokens, 77)
    x[0, 76] = bad
    y = run_linear(_native.dense_linear(torch.randn(40, 77).to(dtype), instruction_set), x, None)
    assert not bool(y[0].isfinite().any())
    assert bool(y[1:].isfinite().all())


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_inputs(instruction_set, scale):
    for tokens in (1, 5, 40):
        check(torch.randn(40, 256).bfloat16(), torch.randn(tokens, 256) * scale, instruction_set)


def test_threads_do_not_change_results():
    linear, before = _native.dense_linear(torch.randn(300, 256).bfloat16()), torch.get_num_threads()
    for tokens in (1, 7, 40):
        x, results = torch.randn(tokens, 256), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run_linear(linear, x, None))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(results[0], other) for other in results)


def test_the_engine_gets_the_memory_of_the_weight():
    weight = torch.randn(64, 256).bfloat16()
    request, kernel = KernelRequest(None, None, 64, 256), DenseKernel()
    packed = kernel.pack(weight, request)
    linear = kernel.native(packed, request)
    assert linear is not None and linear.bytes == weight.nbytes
    x = torch.randn(3, 256).bfloat16()
    before = run_linear(linear, x, None)
    weight *= 2
    torch.testing.assert_close(run_linear(linear, x, None), before * 2)
    half = KernelRequest(None, None, 64, 256, dtype=torch.float16)
    assert kernel.native(kernel.pack(weight, half), half) is None


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        _native.dense_linear(torch.zeros(4, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="next to each other"):
        _native.dense_linear(torch.zeros(4, 8)[:, ::2])
    with pytest.raises(ValueError, match="no avx1024"):
        _native.dense_linear(torch.zeros(4, 4), "avx1024")
