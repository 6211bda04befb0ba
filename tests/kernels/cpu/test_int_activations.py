"""INT4 and INT8 weights with INT8 activations against the same arithmetic in float64, on every instruction set that this CPU has."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fewbit import _native
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import SCHEMES, QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.cpu.int_activations import CpuIntActivations
from fewbit.kernels.cpu.tiles import tile_codes, untile_codes
from fewbit.kernels.dispatch import select
from fewbit.methods.rtn import rtn

SETS = _native.int_instruction_sets()
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def request_of(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype = FLOAT32) -> KernelRequest:
    return KernelRequest(spec, None, *shape, dtype=dtype, compute="int8-activations")


def weight_of(spec: QuantSpec, shape: tuple[int, int], scale: float = 0.05) -> QuantizedTensor:
    return rtn(torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale, spec)


def quantized_inputs(x: torch.Tensor, group: int) -> torch.Tensor:
    """The definition: round to 127 steps of each group's largest magnitude; float64 [M, in]."""
    columns = x.shape[1]
    groups = torch.nn.functional.pad(x.float(), (0, -columns % group)).view(x.shape[0], -1, group)
    step = groups.abs().amax(-1, keepdim=True) / 127
    step = torch.where(step == 0, 1.0, step.clamp_min(2.0**-126))
    return (torch.round(groups / step).double() * step.double()).view(x.shape[0], -1)[:, :columns]


def input_group(spec: QuantSpec) -> int:
    return next(group for group in (128, 64, 32) if spec.group_size is None or spec.group_size % group == 0)


def check(kernel: CpuIntActivations, x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> None:
    request = request_of(weight.spec, weight.shape, x.dtype)
    assert kernel.refuse(request) is None
    y = kernel.apply(x, kernel.pack(weight, request), bias, request)
    assert y.shape == (x.shape[0], weight.shape[0]) and y.dtype == x.dtype
    codes, w = quantized_inputs(x, input_group(weight.spec)), dequantize(weight).double()
    expected = codes @ w.T
    magnitude = codes.abs() @ (w.abs() + (0 if weight.zero_point is None else weight.scale.double().amax())).T
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    unit = 2.0**-8 if x.dtype == BFLOAT16 else 2.0**-20
    bound = magnitude * 2.0**-18 + expected.abs() * unit + 1e-30
    error = (y.double() - expected).abs()
    assert bool((error <= bound).all()), f"{kernel.name}: {(error / bound).max()} times the bound"


SPECS = [
    QuantSpec(bits, strategy="channel" if group is None else "group", group_size=group, symmetric=symmetric, scale_dtype=dtype)
    for bits in (2, 3, 4, 8)
    for group in (32, 128, 256, None)
    for symmetric in (True, False)
    for dtype in ("bfloat16", "float16")
]


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec}, {spec.scale_dtype}")
def test_against_the_definition(spec, instruction_set):
    weight = weight_of(spec, (70, 768))
    kernel = CpuIntActivations(spec.num_bits, instruction_set)
    for tokens in (1, 2, 3, 8, 13, 33):
        check(kernel, torch.randn(tokens, 768), weight)
    check(kernel, torch.randn(5, 768).bfloat16(), weight, bias=torch.randn(70).bfloat16())


@pytest.mark.parametrize("instruction_set", SETS)
@given(
    out=st.integers(1, 100),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 130),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([None, None, 32, 64, 96, 128]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_any_shape(instruction_set, out, columns, tokens, bits, group, symmetric, seed):
    if group is not None:
        columns = -(-columns // group) * group
    spec = QuantSpec(bits, strategy="channel" if group is None else "group", group_size=group, symmetric=symmetric)
    torch.manual_seed(seed)
    check(CpuIntActivations(bits, instruction_set), torch.randn(tokens, columns), weight_of(spec, (out, columns)))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_products_do_not_overflow(bits, instruction_set):
    """All codes at the ends of their ranges: 16-bit intermediate sums would saturate."""
    spec = QuantSpec(bits, strategy="group", group_size=128)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for code in (low, high):
        weight = replace(weight_of(spec, (32, 256)), values=torch.full((32, 256), code, dtype=torch.int8))
        for sign in (1.0, -1.0):
            check(CpuIntActivations(bits, instruction_set), torch.full((3, 256), sign), weight)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_nan_and_infinite_inputs_spoil_their_token_and_no_other(instruction_set, bad, tokens):
    weight = weight_of(SCHEMES["W4A16"].weights, (40, 256))
    kernel, request = CpuIntActivations(4, instruction_set), request_of(weight.spec, weight.shape)
    x = torch.randn(tokens, 256)
    x[0, 7] = bad
    y = kernel.apply(x, kernel.pack(weight, request), None, request)
    assert bool(y[0].isnan().all())
    assert bool(y[1:].isfinite().all())


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e4, 1e30])
def test_extreme_inputs(instruction_set, scale):
    weight = weight_of(SCHEMES["W4A16"].weights, (40, 256))
    check(CpuIntActivations(4, instruction_set), torch.randn(4, 256) * scale, weight)


@pytest.mark.parametrize("instruction_set", SETS)
def test_zeros(instruction_set):
    weight = weight_of(SCHEMES["W4A16-ASYM"].weights, (40, 256))
    kernel, request = CpuIntActivations(4, instruction_set), request_of(weight.spec, weight.shape)
    packed = kernel.pack(weight, request)
    assert not kernel.apply(torch.zeros(3, 256), packed, None, request).any()
    assert kernel.apply(torch.zeros(0, 256), packed, None, request).shape == (0, 40)


def test_strides_do_not_matter():
    weight = weight_of(SCHEMES["W4A16"].weights, (40, 256))
    kernel, request = CpuIntActivations(4), request_of(weight.spec, weight.shape, BFLOAT16)
    packed = kernel.pack(weight, request)
    transposed = torch.randn(256, 5).bfloat16().T
    every_other = torch.randn(5, 512).bfloat16()[:, ::2]
    wide_rows = torch.randn(5, 512).bfloat16()[:, 100:356]
    unaligned = torch.randn(5 * 256 + 1).bfloat16()[1:].view(5, 256)
    one_token = torch.randn(256).bfloat16().expand(5, 256)
    for x in (transposed, every_other, wide_rows, unaligned, one_token):
        assert torch.equal(kernel.apply(x, packed, None, request), kernel.apply(x.clone().contiguous(), packed, None, request))
    x = torch.randn(2, 3, 256).bfloat16()
    assert kernel.apply(x, packed, None, request).shape == (2, 3, 40)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_tiling_is_undone(num_bits):
    values = torch.randint(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1), (37, 50), dtype=torch.int8)
    lines = tile_codes(values, num_bits, 64)
    assert lines.shape == (3, 64 * num_bits // 32, 64)
    assert torch.equal(untile_codes(lines, num_bits, 37, 50), values)


def test_threads_do_not_change_results():
    weight = weight_of(SCHEMES["W4A16"].weights, (300, 256))
    kernel, request = CpuIntActivations(4), request_of(weight.spec, weight.shape)
    packed, x = kernel.pack(weight, request), torch.randn(7, 256)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernel.apply(x, packed, None, request))
            assert _native.threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_exact_is_the_default_and_never_becomes_int8_activations():
    exact = KernelRequest(SCHEMES["W4A16"].weights, None, 64, 256)
    assert not isinstance(select(exact).kernel, CpuIntActivations)
    assert "exact" in (CpuIntActivations(4).refuse(exact) or "")
    assert select(replace(exact, compute="int8-activations")).kernel.name == "cpu-int4"
    assert select(replace(exact, compute="int8-activations", weights=SCHEMES["W8A16"].weights)).kernel.name == "cpu-int8"


def test_bits_resident():
    for name, bits in (("W4A16", 4.125), ("W4A16-CHANNEL", 4 + 32 / 1024), ("W8A16", 8 + 32 / 1024), ("W4A16-ASYM", 4.125 + 8 / 128)):
        spec = SCHEMES[name].weights
        request = request_of(spec, (512, 1024))
        kernel = CpuIntActivations(spec.num_bits)
        packed = kernel.pack(weight_of(spec, (512, 1024)), request)
        assert sum(t.nbytes for t in packed.values()) * 8 == bits * 512 * 1024
        assert kernel.native(packed, request).bytes == sum(t.nbytes for t in packed.values())


def test_the_error_of_quantized_inputs_is_small_beside_the_weights():
    """Gaussian inputs and weights: what INT8 groups of 128 add, relative to what INT4 weights cost."""
    torch.manual_seed(0)
    dense, x = torch.randn(256, 1024) * 0.05, torch.randn(64, 1024)
    spec = SCHEMES["W4A16"].weights
    weight = rtn(dense, spec)
    request = request_of(spec, weight.shape)
    kernel = CpuIntActivations(4)
    truth, ideal = x @ dense.T, x @ dequantize(weight).T
    y = kernel.apply(x, kernel.pack(weight, request), None, request)
    extra, weights_only = (y - ideal).norm() / truth.norm(), (ideal - truth).norm() / truth.norm()
    assert extra < 0.01 < weights_only


def test_bad_arguments_are_errors():
    weight = weight_of(SCHEMES["W4A16"].weights, (40, 256))
    request = request_of(weight.spec, weight.shape)
    kernel = CpuIntActivations(4)
    packed = kernel.pack(weight, request)
    linear = kernel.native(packed, request)
    for x, y in (
        (torch.zeros(2, 255), torch.zeros(2, 40)),
        (torch.zeros(2, 256), torch.zeros(3, 40)),
        (torch.zeros(2, 256, dtype=torch.float16), torch.zeros(2, 40)),
        (torch.zeros(256, 2).T, torch.zeros(2, 40)),
    ):
        with pytest.raises(ValueError):
            linear.apply(x, y)
    with pytest.raises(ValueError, match="tiles"):
        _native.int_linear(packed["codes"], packed["scales"], None, 80, 256, 128, 4)
    codes, scales = packed["codes"], packed["scales"]
    shifted = torch.zeros(codes.numel() + 64, dtype=torch.uint8)[1:][: codes.numel()].view(codes.shape)
    with pytest.raises(ValueError, match="cache line"):
        _native.int_linear(shifted, scales, None, 40, 256, 128, 4)
    with pytest.raises(ValueError, match="overlap"):
        _native.int_linear(codes[:1].expand(codes.shape), scales, None, 40, 256, 128, 4)
    with pytest.raises(ValueError, match="next to each other"):
        _native.int_linear(codes.contiguous().transpose(1, 2).contiguous().transpose(1, 2), scales, None, 40, 256, 128, 4)
    with pytest.raises(ValueError, match="no avx1024"):
        CpuIntActivations(4, "avx1024").native(packed, request)
    with pytest.raises(ValueError):
        _native.set_threads(0)
