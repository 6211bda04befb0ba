"""Every native kernel on shapes, strides and values that nobody chose: a right answer, or a refusal that says why.

The bound is what the arithmetic allows. Exact kernels: float32 sums. Inputs that are rounded to INT8 lose half a step each, and a step is
at most 1/127 of the row's largest magnitude.
"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from fewbit import _native
from fewbit.errors import FormatError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import SCHEMES, QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.cpu.extension import run_linear
from fewbit.kernels.dispatch import KERNELS
from fewbit.methods.rtn import rtn

BAD = (float("nan"), float("inf"), -float("inf"))


def schemes_of(kernel: Kernel) -> list[tuple[QuantSpec, QuantSpec | None]]:
    """Formats that the kernel is made for, among the presets and INT3 and INT2 in other groups."""
    presets = [(s.weights, s.input_activations) for s in SCHEMES.values() if s.weights is not None]
    others = [
        (QuantSpec(bits, strategy="group", group_size=size, symmetric=symmetric), None)
        for bits in (2, 3, 4, 8)
        for size in (32, 64, 96)
        for symmetric in (True, False)
    ]
    return [pair for pair in [*presets, *others] if kernel.refuse_format(request_of(*pair, (32, 96), compute_of(kernel))) is None]


def compute_of(kernel: Kernel) -> str:
    return "int8-activations" if "on the fly" in kernel.description else "exact"


def request_of(weights: QuantSpec, inputs: QuantSpec | None, shape: tuple[int, int], compute: str) -> KernelRequest:
    return KernelRequest(weights, inputs, *shape, dtype=torch.float32, compute=compute)  # type: ignore[arg-type]


# Codebooks come with their weight: test_tables.py.
NATIVE = {kernel.name: kernel for kernel in KERNELS if kernel.needs_native and schemes_of(kernel)}


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values [tokens, columns] somewhere else in memory."""
    tokens, columns = x.shape
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "every other column":
        return torch.stack([x, torch.full_like(x, 7.0)], dim=2).view(tokens, 2 * columns)[:, ::2]
    if layout == "wide rows":
        return torch.nn.functional.pad(x, (3, 5), value=7.0)[:, 3 : 3 + columns]
    if layout == "unaligned":
        memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
        return memory.view(tokens, columns).copy_(x)
    if layout == "three dimensions":
        return x.clone().view(1, tokens, columns)
    return x.clone()


LAYOUTS = ["contiguous", "transposed", "every other column", "wide rows", "unaligned", "three dimensions"]


def bound_of(kernel: Kernel, x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """The largest error of each output for float32 outputs."""
    w = dequantize(weight).double().abs()
    offset = 0.0 if weight.zero_point is None else (weight.scale.double().abs() * (weight.zero_point.double().abs() + 128)).amax()
    largest = x.double().abs().amax(-1, keepdim=True)
    if largest.numel() and kernel.name == "cpu-w8a8":
        largest = largest.amax()  # a static scale is one for all tokens
    lost = largest / 127 * 0.51 if compute_of(kernel) != "exact" or kernel.name == "cpu-w8a8" else largest * 2.0**-22
    sums = (x.double().abs() @ (w + offset).T) * 2.0**-18
    return sums + lost * (w + offset).sum(-1) + 1e-30


@pytest.mark.parametrize("name", NATIVE)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_shape_any_stride(name, data):
    kernel = NATIVE[name]
    weights, inputs = data.draw(st.sampled_from(schemes_of(kernel)))
    out, columns, tokens = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 400)), data.draw(st.integers(0, 130))
    if data.draw(st.booleans()) and weights.group_size is not None:
        columns = -(-columns // weights.group_size) * weights.group_size
    torch.manual_seed(data.draw(st.integers(0, 99)))
    request = request_of(weights, inputs, (out, columns), compute_of(kernel))
    reason = kernel.refuse(request)
    if reason is not None:
        assert str(columns) in reason  # the shape, and not the machine
        return
    x = torch.randn(tokens, columns) * 10.0 ** data.draw(st.integers(-6, 6))
    try:
        weight = rtn(torch.randn(out, columns) * 0.05, weights)
    except FormatError as error:
        assert str(columns) in str(error) and weights.group_size is not None and columns % weights.group_size
        return
    if inputs is not None and not inputs.dynamic:
        weight = replace(weight, input_scale=(x.abs().amax() if tokens else torch.tensor(1.0)).reshape(1) / 127.5)
    bad = data.draw(st.sampled_from([None, *BAD])) if tokens else None
    spoilt = data.draw(st.integers(0, tokens - 1)) if bad is not None else None
    packed, clean = kernel.pack(weight, request), x.clone()
    if spoilt is not None:
        x[spoilt, data.draw(st.integers(0, columns - 1))] = bad
    bias = torch.randn(out) if data.draw(st.booleans()) else None
    y = kernel.apply(laid_out(x, data.draw(st.sampled_from(LAYOUTS))), packed, bias, request).view(tokens, out)
    rows = [row for row in range(tokens) if row != spoilt]
    if spoilt is not None:
        assert not bool(y[spoilt].isfinite().any()), "a NaN or an infinity has to be seen in every output of its token"
    expected = clean.double() @ dequantize(weight).double().T + (0.0 if bias is None else bias.double())
    bound = bound_of(kernel, clean, weight) + expected.abs() * 2.0**-20 + (0.0 if bias is None else bias.double().abs() * 2.0**-20)
    error = (y.double() - expected).abs()
    assert bool((error[rows] <= bound[rows]).all()), f"{(error / bound)[rows].max()} times the bound"


@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    result=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])] * 2),
    steps=st.tuples(*[st.sampled_from([1, 1, 2])] * 2),
    bias=st.sampled_from([None, 24, 23]),
)
@example(shape=[3, 32], result=[3, 24], dtypes=(torch.float32, torch.bfloat16), steps=(1, 1), bias=24)
@example(shape=[0, 32], result=[0, 24], dtypes=(torch.float32, torch.float32), steps=(1, 1), bias=None)
@settings(max_examples=300, deadline=None)
def test_arguments_that_do_not_fit_are_errors(shape, result, dtypes, steps, bias):
    """`Linear.apply` is what Python can reach directly: it checks everything that it would otherwise read or write past."""
    weight = torch.arange(24 * 32, dtype=torch.float32).view(24, 32).remainder(5)
    linear = _native.dense_linear(weight)
    x = torch.ones(*shape[:-1], shape[-1] * steps[0]).to(dtypes[0])[..., :: steps[0]]
    y = torch.full((*result[:-1], result[-1] * steps[1]), 7.0).to(dtypes[1])
    untouched, view = y.clone(), y[..., :: steps[1]]
    b = None if bias is None else torch.zeros(bias)
    floats = all(dtype in (torch.float32, torch.bfloat16) for dtype in dtypes)
    fits = shape[1:] == [32] and result == [shape[0], 24] and floats and steps == (1, 1) and bias != 23
    try:
        linear.apply(x, view, b)
    except (ValueError, TypeError):
        assert not fits and torch.equal(y, untouched)
    else:
        assert torch.equal(view.double(), (x.double() @ weight.double().T).to(dtypes[1]).double())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_more_threads_than_work(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for out in (1, 31, 33):
            weight, x = torch.randn(out, 64), torch.randn(2, 64)
            torch.testing.assert_close(run_linear(_native.dense_linear(weight), x, None), x @ weight.T)
    finally:
        torch.set_num_threads(before)
