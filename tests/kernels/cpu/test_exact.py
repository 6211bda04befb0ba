"""Integer and E2M1 weights with exact inputs against float64, on every instruction set that this CPU has."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fewbit import _native
from fewbit.errors import FormatError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import SCHEMES, QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.cpu.exact import CpuExact
from fewbit.kernels.dispatch import select
from fewbit.methods.rtn import rtn

SETS = _native.digit_instruction_sets()
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
FP4 = {name: SCHEMES[name].weights for name in ("MXFP4", "NVFP4")}


def kernel_for(spec: QuantSpec, instruction_set: str = "") -> CpuExact:
    return CpuExact("e2m1" if spec.type == "float" else f"int{spec.num_bits}", instruction_set)


def request_of(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype = FLOAT32) -> KernelRequest:
    return KernelRequest(spec, None, *shape, dtype=dtype)


def weight_of(spec: QuantSpec, shape: tuple[int, int], scale: float = 0.05) -> QuantizedTensor:
    return rtn(torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale, spec)


def lost_in_digits(x: torch.Tensor, weight: torch.Tensor, block: int) -> torch.Tensor:
    """At most 2**-23 of a block's largest input is lost of each input; the sum of that over the row."""
    pad = -x.shape[1] % block
    largest = torch.nn.functional.pad(x.abs(), (0, pad)).view(x.shape[0], -1, block).amax(-1)
    weights = torch.nn.functional.pad(weight.abs(), (0, pad)).view(weight.shape[0], -1, block).sum(-1)
    return largest @ weights.T * 2.0**-22


def check(kernel: CpuExact, x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> None:
    request = request_of(weight.spec, weight.shape, x.dtype)
    assert kernel.refuse(request) is None
    y = kernel.apply(x, kernel.pack(weight, request), bias, request)
    assert y.shape == (x.shape[0], weight.shape[0]) and y.dtype == x.dtype
    w, values = dequantize(weight).double(), x.double()
    offset = 0 if weight.zero_point is None else (weight.scale.double() * weight.zero_point.double()).abs().amax()
    expected, magnitude = values @ w.T, values.abs() @ (w.abs() + offset).T
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    rounding = expected.abs() * (2.0**-8 if x.dtype == BFLOAT16 else 0.0)
    bound = magnitude * 2.0**-20 + lost_in_digits(values, w.abs() + offset, 128) + rounding + 1e-30
    error = (y.double() - expected).abs()
    assert bool((error <= bound).all()), f"{kernel.name}: {(error / bound).max()} times the bound"


SPECS = [
    QuantSpec(bits, strategy="channel" if group is None else "group", group_size=group, symmetric=symmetric, scale_dtype=dtype)
    for bits in (2, 3, 4, 8)
    for group in (32, 64, 128, 256, None)
    for symmetric in (True, False)
    for dtype in (("bfloat16", "float16") if group in (None, 128) else ("bfloat16",))
]


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("spec", [*SPECS, *FP4.values()], ids=lambda spec: f"{spec}, {spec.scale_dtype}")
def test_against_float64(spec, instruction_set):
    weight = weight_of(spec, (70, 768))
    kernel = kernel_for(spec, instruction_set)
    for tokens in (1, 2, 3, 4, 7, 13):
        check(kernel, torch.randn(tokens, 768), weight)
    check(kernel, torch.randn(5, 768).bfloat16(), weight, bias=torch.randn(70).bfloat16())


@pytest.mark.parametrize("instruction_set", SETS)
@given(
    out=st.integers(1, 150),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 130),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([None, None, 16, 32, 96, 128]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(instruction_set, out, columns, tokens, bits, group, symmetric, seed):
    if group is not None:
        group = max(group, 32 if bits == 3 else 16)
        columns = -(-columns // group) * group
    spec = QuantSpec(bits, strategy="channel" if group is None else "group", group_size=group, symmetric=symmetric)
    torch.manual_seed(seed)
    check(kernel_for(spec, instruction_set), torch.randn(tokens, columns), weight_of(spec, (out, columns)))


@pytest.mark.parametrize("instruction_set", SETS)
def test_every_number_of_tokens(instruction_set):
    weight = weight_of(SCHEMES["W4A16"].weights, (70, 256))
    for tokens in range(1, 131, 1 if instruction_set == SETS[0] else 7):
        check(kernel_for(weight.spec, instruction_set), torch.randn(tokens, 256), weight)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_sums_do_not_overflow(bits, symmetric, instruction_set):
    spec = QuantSpec(bits, strategy="group", group_size=128, symmetric=symmetric)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    plain = weight_of(spec, (32, 256))
    for code, zero in ((low, high), (high, low)):
        zero_point = None if symmetric else torch.full_like(plain.zero_point, zero)
        weight = replace(plain, values=torch.full((32, 256), code, dtype=torch.int8), zero_point=zero_point)
        for value in (1.0, -1.0, 1.99, -1.99):
            check(kernel_for(spec, instruction_set), torch.full((3, 256), value), weight)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_hot_inputs_read_out_the_weights(bits, instruction_set):
    """Powers of two are one digit: not even rounded."""
    spec = QuantSpec(bits, strategy="group", group_size=64)
    weight = weight_of(spec, (70, 256))
    kernel, request = kernel_for(spec, instruction_set), request_of(spec, weight.shape)
    y = kernel.apply(torch.eye(256) * 0.5, kernel.pack(weight, request), None, request)
    assert torch.equal(y, dequantize(weight).T * 0.5)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("name", FP4)
def test_every_fp4_number_and_scale(name, instruction_set):
    """All 16 codes at every finite scale: of E4M3 the subnormal ones, too."""
    spec = FP4[name]
    size = spec.group_size
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, size // 16 * 2)
    stored = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 2).contiguous()
    stored.clamp_(max=254 if name == "MXFP4" else 126)
    for lowest in (0, 1):
        scale = stored.clamp(lowest, 200 if name == "MXFP4" else 126)
        plain = weight_of(spec, (256, 2 * size))
        weight = replace(plain, values=codes, scale=scale if name == "MXFP4" else scale.view(torch.float8_e4m3fn))
        kernel, request = kernel_for(spec, instruction_set), request_of(spec, weight.shape)
        packed = kernel.pack(weight, request)
        y = kernel.apply(torch.eye(2 * size), packed, None, request)
        torch.testing.assert_close(y, dequantize(weight).T, rtol=2.0**-22, atol=1e-38)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_nan_and_infinite_inputs_spoil_their_token_and_no_other(instruction_set, bad, tokens):
    weight = weight_of(SCHEMES["W4A16"].weights, (40, 256))
    kernel, request = kernel_for(weight.spec, instruction_set), request_of(weight.spec, weight.shape)
    x = torch.randn(tokens, 256)
    x[0, 7] = bad
    y = kernel.apply(x, kernel.pack(weight, request), None, request)
    assert bool(y[0].isnan().all())
    assert bool(y[1:].isfinite().all())


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-4, 1e4, 1e30, 1e35])
def test_extreme_inputs(instruction_set, scale):
    weight = weight_of(SCHEMES["W4A16"].weights, (40, 256))
    check(kernel_for(weight.spec, instruction_set), torch.randn(4, 256).clamp(-4, 4) * scale, weight)


@pytest.mark.parametrize("instruction_set", SETS)
def test_zeros(instruction_set):
    weight = weight_of(SCHEMES["W4A16-ASYM"].weights, (40, 256))
    kernel, request = kernel_for(weight.spec, instruction_set), request_of(weight.spec, weight.shape)
    packed = kernel.pack(weight, request)
    assert not kernel.apply(torch.zeros(3, 256), packed, None, request).any()
    assert kernel.apply(torch.zeros(0, 256), packed, None, request).shape == (0, 40)


@pytest.mark.parametrize("instruction_set", SETS)
def test_an_outlier_leaves_its_neighbours_their_bits(instruction_set):
    """A BF16 input 2**14 times smaller than the block's largest is still represented exactly."""
    weight = weight_of(SCHEMES["W4A16"].weights, (40, 256))
    small = torch.randn(1, 256).bfloat16().clamp(-1.9, 1.9)
    small[small.abs() < 1] += 1
    kernel, request = kernel_for(weight.spec, instruction_set), request_of(weight.spec, weight.shape)
    packed = kernel.pack(weight, request)
    x = small.float()
    x[0, ::128] = 2.0**14
    outliers = torch.zeros(1, 256)
    outliers[0, ::128] = 2.0**14
    expected = (x.double() - outliers.double()) @ dequantize(weight).double().T
    alone = kernel.apply(x, packed, None, request).double() - kernel.apply(outliers, packed, None, request).double()
    assert bool(((alone - expected).abs() <= 2.0**14 * 0.5 * 2.0**-22 + expected.abs() * 2.0**-20).all())


def test_strides_do_not_matter():
    weight = weight_of(SCHEMES["W4A16"].weights, (40, 256))
    kernel, request = kernel_for(weight.spec), request_of(weight.spec, weight.shape, BFLOAT16)
    packed = kernel.pack(weight, request)
    transposed = torch.randn(256, 5).bfloat16().T
    wide_rows = torch.randn(5, 512).bfloat16()[:, 100:356]
    one_token = torch.randn(256).bfloat16().expand(5, 256)
    for x in (transposed, wide_rows, one_token):
        assert torch.equal(kernel.apply(x, packed, None, request), kernel.apply(x.clone().contiguous(), packed, None, request))


def test_threads_do_not_change_results():
    weight = weight_of(SCHEMES["W4A16"].weights, (300, 256))
    kernel, request = kernel_for(weight.spec), request_of(weight.spec, weight.shape)
    packed, x = kernel.pack(weight, request), torch.randn(7, 256)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernel.apply(x, packed, None, request))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("W4A16", 4.125),
        ("W8A16", 8 + 16 / 1024),
        ("W4A16-ASYM", 4.1875),
        ("W3A16", 3.125),
        ("W2A16", 2.125),
        ("MXFP4", 4.25),
        ("NVFP4", 4.5),
    ],
)
def test_bits_resident(scheme, bits):
    spec = SCHEMES[scheme].weights
    kernel, request = kernel_for(spec), request_of(spec, (512, 1024))
    packed = kernel.pack(weight_of(spec, (512, 1024)), request)
    assert packed["tiles"].nbytes * 8 == bits * 512 * 1024
    assert kernel.native(packed, request).bytes == packed["tiles"].nbytes


def test_it_is_what_exact_computation_gets():
    for name in ("W8A16", "W8A16-G128", "W4A16", "W4A16-CHANNEL", "W4A16-ASYM", "W3A16", "W2A16-ASYM", "MXFP4", "NVFP4"):
        spec = SCHEMES[name].weights
        assert select(request_of(spec, (64, 256))).kernel.name == kernel_for(spec).name
    ordered = replace(request_of(SCHEMES["W4A16"].weights, (64, 256)), has_g_idx=True)
    assert "activation order" in (CpuExact("int4").refuse(ordered) or "")


def test_bad_arguments_are_errors():
    weight = weight_of(SCHEMES["W4A16"].weights, (40, 256))
    kernel, request = CpuExact("int4"), request_of(weight.spec, weight.shape)
    tiles = kernel.pack(weight, request)["tiles"]
    with pytest.raises(ValueError, match="size"):
        _native.digit_linear(tiles, 80, 256, "int4", "bfloat16", False, 128, 1)
    with pytest.raises(ValueError, match="block"):
        _native.digit_linear(torch.zeros(1, 128 + 64 * 128, dtype=torch.uint8), 40, 256, "int4", "bfloat16", False, 256, 1)
    with pytest.raises(ValueError, match="format"):
        _native.digit_linear(tiles, 40, 256, "int5", "bfloat16", False, 128, 1)
    with pytest.raises(ValueError, match="no avx1024"):
        CpuExact("int4", "avx1024").native({"tiles": tiles}, request)
    with pytest.raises(FormatError, match="quantize"):
        kernel.pack(torch.zeros(40, 256), request)
