"""NF4, codebooks and FP8 with exact inputs against float64, on every instruction set that this CPU has."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fewbit import _native
from fewbit.errors import FormatError
from fewbit.formats.quantize import dequantize, quantize
from fewbit.formats.spec import SCHEMES, QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.cpu.tables import CpuTables
from fewbit.kernels.dispatch import select
from fewbit.methods.rtn import rtn

SETS = _native.float_instruction_sets()
CODEBOOK = torch.linspace(-1, 1, 13) ** 3
BLOCKS = QuantSpec(8, "float", "block", block_shape=(48, 100), exponent_bits=4, scale_dtype="float32")
SPECS = {
    "nf4": SCHEMES["NF4"].weights,
    "nf4 in float16": replace(SCHEMES["NF4"].weights, group_size=32, scale_dtype="float16"),
    "nf4 per channel": QuantSpec(4, "nf", "channel"),
    "codebook": QuantSpec(4, "codebook", "group", group_size=40),
    "e4m3": SCHEMES["FP8A16"].weights,
    "e4m3 per tensor": QuantSpec(8, "float", "tensor", exponent_bits=4),
    "e4m3 in groups": QuantSpec(8, "float", "group", group_size=100, exponent_bits=4),
    "e4m3 in blocks": BLOCKS,
    "e5m2": SCHEMES["FP8-E5M2"].weights,
}


def request_of(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> KernelRequest:
    return KernelRequest(spec, None, *shape, dtype=dtype)


def weight_of(spec: QuantSpec, shape: tuple[int, int]) -> QuantizedTensor:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    return quantize(dense, spec, codebook=CODEBOOK) if spec.type == "codebook" else rtn(dense, spec)


def check(x: torch.Tensor, weight: QuantizedTensor, instruction_set: str, bias: torch.Tensor | None = None) -> None:
    kernel, request = CpuTables(weight.spec.grid_name, instruction_set), request_of(weight.spec, weight.shape, x.dtype)
    assert kernel.refuse(request) is None
    y = kernel.apply(x, kernel.pack(weight, request), bias, request)
    assert y.shape == (x.shape[0], weight.shape[0]) and y.dtype == x.dtype
    w = dequantize(weight).double()
    expected, magnitude = x.double() @ w.T, x.double().abs() @ w.abs().T
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    rounding = expected.abs() * (2.0**-8 if x.dtype == torch.bfloat16 else 0.0)
    error = (y.double() - expected).abs()
    bound = magnitude * 2.0**-20 + rounding + 1e-30
    assert bool((error <= bound).all()), f"{kernel.name}: {(error / bound).max()} times the bound"


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_against_float64(spec, instruction_set):
    weight = weight_of(spec, (150, 1600))
    for tokens in (1, 2, 3, 4, 7, 16, 17, 31):
        check(torch.randn(tokens, 1600), weight, instruction_set)
    check(torch.randn(5, 1600).bfloat16(), weight, instruction_set, bias=torch.randn(150).bfloat16())


@pytest.mark.parametrize("instruction_set", SETS)
@given(
    out=st.integers(1, 150),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 130),
    name=st.sampled_from(["nf4", "nf4 per channel", "e4m3", "e4m3 in blocks", "e4m3 per tensor", "e5m2"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_is_right_or_refused(instruction_set, out, columns, tokens, name, seed):
    torch.manual_seed(seed)
    spec = SPECS[name]
    columns = -(-columns // 64) * 64 if name == "nf4" else columns
    reason = CpuTables(spec.grid_name).refuse(request_of(spec, (out, columns)))
    if reason is None:
        check(torch.randn(tokens, columns), weight_of(spec, (out, columns)), instruction_set)
    else:
        assert name == "nf4 per channel" and columns % 8 and str(columns) in reason


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_every_fp8_number(name, tokens, instruction_set):
    """All 256 codes, subnormal ones, infinities and NaN included: one row each, read out by a one-hot input."""
    spec = SPECS[name]
    plain = weight_of(spec, (256, 8))
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 8).contiguous()
    weight = replace(plain, values=codes.view(plain.values.dtype), scale=torch.full_like(plain.scale, 0.5))
    kernel, request = CpuTables(spec.grid_name, instruction_set), request_of(spec, weight.shape)
    x = torch.zeros(tokens, 8)
    x[:, 3] = 2.0
    finite = torch.isfinite(dequantize(weight)[:, 0])
    y = kernel.apply(x, kernel.pack(weight, request), None, request)
    expected = (dequantize(weight)[:, 3] * 2).expand(tokens, 256)
    assert torch.equal(y[:, finite], expected[:, finite])
    assert not bool(y[:, ~finite].isfinite().any())


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("name", ["nf4", "e4m3"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_nan_and_infinite_inputs_spoil_their_token_and_no_other(instruction_set, name, bad, tokens):
    weight = weight_of(SPECS[name], (40, 256))
    kernel, request = CpuTables(weight.spec.grid_name, instruction_set), request_of(weight.spec, weight.shape)
    x = torch.randn(tokens, 256)
    x[0, 7] = bad
    y = kernel.apply(x, kernel.pack(weight, request), None, request)
    assert not bool(y[0].isfinite().any())
    assert bool(y[1:].isfinite().all())


@pytest.mark.parametrize("instruction_set", SETS)
def test_zeros_and_strides(instruction_set):
    weight = weight_of(SPECS["nf4"], (40, 256))
    kernel, request = CpuTables("nf4", instruction_set), request_of(weight.spec, weight.shape)
    packed = kernel.pack(weight, request)
    assert not kernel.apply(torch.zeros(3, 256), packed, None, request).any()
    assert kernel.apply(torch.zeros(0, 256), packed, None, request).shape == (0, 40)
    for tokens in (1, 5, 40):
        for x in (torch.randn(256, tokens).T, torch.randn(tokens, 512)[:, 101:357]):
            assert torch.equal(kernel.apply(x, packed, None, request), kernel.apply(x.clone().contiguous(), packed, None, request))


@pytest.mark.parametrize(("name", "bits"), [("nf4", 4.25), ("e4m3", 8 + 16 / 1024), ("e4m3 per tensor", 8 + 16 / 1024)])
def test_bits_resident(name, bits):
    spec = SPECS[name]
    kernel, request = CpuTables(spec.grid_name), request_of(spec, (512, 1024))
    packed = kernel.pack(weight_of(spec, (512, 1024)), request)
    assert packed["tiles"].nbytes * 8 == bits * 512 * 1024
    assert kernel.native(packed, request).bytes == packed["tiles"].nbytes


def test_it_is_what_exact_computation_gets():
    for name, kernel in (("NF4", "cpu-nf4"), ("FP8A16", "cpu-fp8-e4m3"), ("FP8-E5M2", "cpu-fp8-e5m2")):
        assert select(request_of(SCHEMES[name].weights, (64, 256))).kernel.name == kernel


def test_bad_arguments_are_errors():
    weight = weight_of(SPECS["nf4"], (40, 256))
    kernel, request = CpuTables("nf4"), request_of(weight.spec, weight.shape)
    packed = kernel.pack(weight, request)
    with pytest.raises(ValueError, match="size"):
        _native.table_linear(packed["tiles"], 80, 256, "table16", True, 64, packed["table"])
    with pytest.raises(ValueError, match="table"):
        _native.table_linear(packed["tiles"], 40, 256, "table16", True, 64)
    with pytest.raises(ValueError, match="format"):
        _native.table_linear(packed["tiles"], 40, 256, "e3m4", True, 64)
    with pytest.raises(ValueError, match="no avx1024"):
        CpuTables("nf4", "avx1024").native(packed, request)
    with pytest.raises(FormatError, match="quantize"):
        kernel.pack(torch.zeros(40, 256), request)
