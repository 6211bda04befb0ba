"""Every kernel against float64 arithmetic on the dequantized weight, and its refusals."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fewbit.errors import FormatError
from fewbit.formats.quantize import dequantize, fake_quantize
from fewbit.formats.spec import SCHEMES, QuantSpec
from fewbit.formats.static import fake_quantize_static
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.dispatch import KERNELS
from fewbit.methods.rtn import rtn

QUANTIZED = [scheme for scheme in SCHEMES.values() if scheme.weights is not None]
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def make_request(
    spec: QuantSpec | None, activations: QuantSpec | None, shape: tuple[int, int], dtype: torch.dtype = BFLOAT16
) -> KernelRequest:
    return KernelRequest(spec, activations, shape[0], shape[1], dtype=dtype)


def quantized(spec: QuantSpec, shape: tuple[int, int], seed: int = 0, scale: float = 0.05) -> QuantizedTensor:
    """With a scale for static inputs that some of the test's inputs exceed; kernels with dynamic ones leave it alone."""
    q = rtn(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale, spec)
    return replace(q, input_scale=torch.tensor([2.5 / 127.5]))


def exact(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
    """x @ W.T + bias in float64, inputs fake-quantized where the request says so."""
    inputs = request.input_activations
    if inputs is not None and inputs.dynamic:
        x = fake_quantize(x.float(), inputs)
    elif inputs is not None:
        assert weight.input_scale is not None
        x = fake_quantize_static(x.float(), weight.input_scale, inputs)
    y = x.double() @ dequantize(weight).double().T
    return y if bias is None else y + bias.double()


def tolerance(x: torch.Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Bound on |y - exact|, per output, from sum |x| |W|: a rounding of each weight to `dtype`, the sums, and the result's own rounding. An
    affine INT4 offset rounded to BF16 adds scale / 64 per weight, about |W|max / 64 / 7."""
    unit = 2.0**-8 if dtype == BFLOAT16 else 2.0**-20
    w = dequantize(weight).double().abs()
    bound = x.double().abs() @ w.T * unit * 2
    if weight.zero_point is not None:
        bound = bound + x.double().abs().sum(-1, keepdim=True) * weight.scale.double().max() / 64
    return bound + 1e-6


def check(kernel: Kernel, x: torch.Tensor, weight: QuantizedTensor, request: KernelRequest, bias: torch.Tensor | None = None) -> None:
    y = kernel.apply(x, kernel.pack(weight, request), bias, request)
    assert y.shape == (*x.shape[:-1], request.out_features) and y.dtype == request.dtype
    expected = exact(x, weight, bias, request)
    extra = 0.0 if bias is None else (expected.abs() + bias.double().abs()) * 2.0**-7
    error = (y.double() - expected).abs()
    assert bool((error <= tolerance(x, weight, request.dtype) + extra).all()), f"{kernel.name}: {error.max()}"


def runs(kernel: Kernel, request: KernelRequest) -> bool:
    return kernel.refuse(request) is None


RUNNABLE = [(k, s) for s in QUANTIZED for k in KERNELS if runs(k, make_request(s.weights, s.input_activations, (32, 256)))]


@pytest.mark.parametrize(("kernel", "scheme"), RUNNABLE, ids=lambda value: value.name)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_against_float64(kernel, scheme, dtype):
    shape = (48, 256)
    request = make_request(scheme.weights, scheme.input_activations, shape, dtype)
    weight = quantized(scheme.weights, shape)
    for tokens in (1, 2, 7, 16, 17, 33):
        check(kernel, torch.randn(tokens, shape[1]).to(dtype), weight, request)
    check(kernel, torch.randn(2, 3, shape[1]).to(dtype), weight, request, bias=torch.randn(shape[0]).to(dtype))


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.name != "dense"], ids=lambda k: k.name)
@given(
    out=st.integers(1, 70),
    groups=st.integers(1, 4),
    ragged=st.sampled_from([0, 0, 1, 8, 16]),
    tokens=st.integers(1, 33),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([None, 32, 64]),
    symmetric=st.booleans(),
    activations=st.booleans(),
)
@settings(max_examples=60)
def test_any_shape_is_right_or_refused(kernel, out, groups, ragged, tokens, bits, group, symmetric, activations):
    """What a kernel does not refuse it computes right: ragged edges included."""
    spec = QuantSpec(bits, strategy="channel" if group is None else "group", group_size=group, symmetric=symmetric)
    inputs = SCHEMES["W8A8"].input_activations if activations else None
    shape = (out, groups * 32 + ragged if group is None else groups * group)
    request = make_request(spec, inputs, shape)
    if runs(kernel, request):
        check(kernel, torch.randn(tokens, shape[1]).bfloat16(), quantized(spec, shape), request)
    else:
        assert kernel.refuse(request)


@pytest.mark.parametrize(("kernel", "scheme"), RUNNABLE, ids=lambda value: value.name)
def test_strides_do_not_matter(kernel, scheme):
    request = make_request(scheme.weights, scheme.input_activations, (32, 256))
    packed = kernel.pack(quantized(scheme.weights, (32, 256)), request)
    transposed = torch.randn(256, 5).bfloat16().T
    every_other = torch.randn(5, 512).bfloat16()[:, ::2]
    unaligned = torch.randn(5 * 256 + 1).bfloat16()[1:].view(5, 256)
    for x in (transposed, every_other, unaligned):
        torch.testing.assert_close(kernel.apply(x, packed, None, request), kernel.apply(x.clone().contiguous(), packed, None, request))


@pytest.mark.parametrize(("kernel", "scheme"), RUNNABLE, ids=lambda value: value.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [3, 20])
def test_nan_and_infinite_inputs_are_not_hidden(kernel, scheme, bad, tokens):
    request = make_request(scheme.weights, scheme.input_activations, (32, 256))
    packed = kernel.pack(quantized(scheme.weights, (32, 256)), request)
    x = torch.randn(tokens, 256).bfloat16()
    x[1, 7] = bad
    y = kernel.apply(x, packed, None, request)
    column = dequantize(quantized(scheme.weights, (32, 256)))[:, 7]
    spoiled = torch.ones(32, dtype=torch.bool) if bad != bad else column != 0
    assert not bool(y[1][spoiled].isfinite().any())
    assert bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize(("kernel", "scheme"), RUNNABLE, ids=lambda value: value.name)
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_extreme_scales(kernel, scheme, scale):
    request = make_request(scheme.weights, scheme.input_activations, (32, 256))
    check(kernel, torch.randn(4, 256).bfloat16(), quantized(scheme.weights, (32, 256), scale=scale), request)


@pytest.mark.parametrize(("kernel", "scheme"), RUNNABLE, ids=lambda value: value.name)
def test_zero_weights_and_zero_inputs(kernel, scheme):
    request = make_request(scheme.weights, scheme.input_activations, (32, 256))
    zero = replace(rtn(torch.zeros(32, 256), scheme.weights), input_scale=torch.ones(1))
    assert not kernel.apply(torch.randn(3, 256).bfloat16(), kernel.pack(zero, request), None, request).any()
    assert not kernel.apply(torch.zeros(3, 256).bfloat16(), kernel.pack(quantized(scheme.weights, (32, 256)), request), None, request).any()


def kernel_named(name: str) -> Kernel:
    return next(kernel for kernel in KERNELS if kernel.name == name)


@pytest.mark.parametrize(("kernel", "scheme"), [(k, s) for k, s in RUNNABLE if k.name == "reference"], ids=lambda value: value.name)
def test_reference_keeps_the_integers(kernel, scheme):
    weight = quantized(scheme.weights, (32, 256))
    request = make_request(scheme.weights, scheme.input_activations, (32, 256))
    packed = kernel.pack(weight, request)
    back = kernel.unpack(packed, request)
    for name in ("values", "scale", "zero_point", "global_scale"):
        ours, theirs = getattr(back, name), getattr(weight, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8)), name
    assert packed["values"].numel() * 8 == 32 * 256 * scheme.weights.num_bits


def test_group_index_runs_on_the_reference_only() -> None:
    spec = SCHEMES["W4A16"].weights
    plain = quantized(spec, (32, 256))
    order = torch.randperm(256)
    weight = replace(plain, g_idx=(torch.arange(256) // 128)[order].to(torch.int32), values=plain.values[:, order])
    request = replace(make_request(spec, None, (32, 256)), has_g_idx=True)
    assert "activation order" in (kernel_named("torch-int4pack").refuse(request) or "")
    x = torch.randn(3, 256).bfloat16()
    check(kernel_named("reference"), x, weight, request)
    expected = x[:, torch.argsort(order)].double() @ dequantize(plain).double().T
    torch.testing.assert_close(exact(x, weight, None, request), expected)


def test_bars_on_memory() -> None:
    """W4A16 g128: at most 0.30 of BF16 and 4.5 bits a weight on the fused kernel; the reference is as dense as the format."""
    shape = (512, 1024)
    for scheme, kernel, bits in (
        ("W4A16", "torch-int4pack", 4.25),
        ("W4A16", "reference", 4.125),
        ("NF4", "reference", 4.25),
        ("W3A16", "reference", 3.125),
    ):
        request = make_request(SCHEMES[scheme].weights, None, shape)
        packed = kernel_named(kernel).pack(quantized(request.weights, shape), request)
        resident = sum(t.numel() * t.element_size() for t in packed.values())
        assert resident * 8 == bits * shape[0] * shape[1]
        assert resident <= 0.30 * 2 * shape[0] * shape[1]


def test_traffic_counts_the_copy_of_an_unfused_kernel() -> None:
    shape = (32, 256)
    request = make_request(SCHEMES["W4A16"].weights, None, shape)
    weight = quantized(request.weights, shape)
    fused, unfused = kernel_named("torch-int4pack"), kernel_named("reference")
    packed = fused.pack(weight, request)
    assert fused.weight_traffic_bytes(packed, request) == sum(t.numel() * t.element_size() for t in packed.values())
    assert unfused.weight_traffic_bytes(unfused.pack(weight, request), request) > 2 * shape[0] * shape[1] * 2


@pytest.mark.parametrize(
    ("kernel", "changes", "words"),
    [
        ("torch-int4pack", {"out_features": 40}, ("16", "40")),
        ("torch-int4pack", {"in_features": 200}, ("in_features", "200")),
        ("torch-int4pack", {"device": "cuda"}, ("cuda",)),
        ("torch-int4pack", {"dtype": torch.float16}, ("float16",)),
        ("torch-int4pack", {"weights": QuantSpec(4, strategy="group", group_size=16)}, ("16",)),
        ("torch-int4pack", {"weights": QuantSpec(4, strategy="group", group_size=128, scale_dtype="float16")}, ("float16", "rounded")),
        ("torch-int4pack", {"weights": SCHEMES["NF4"].weights}, ("NF4",)),
        ("torch-int8pack", {"weights": SCHEMES["W8A16"].weights, "in_features": 40}, ("16", "40")),
        ("torch-int8pack", {"weights": SCHEMES["W8A16-G128"].weights}, ("group 128",)),
        ("onednn-w8a8", {"weights": SCHEMES["W8A16"].weights}, ("INT8 inputs",)),
        (
            "onednn-w8a8",
            {"weights": SCHEMES["W8A8"].weights, "input_activations": SCHEMES["W8A8"].input_activations, "device": "mps"},
            ("mps",),
        ),
        ("dense", {}, ("INT4",)),
        ("reference", {"weights": None}, ("high precision",)),
    ],
)
def test_refusals_name_the_numbers(kernel, changes, words):
    request = replace(make_request(SCHEMES["W4A16"].weights, None, (32, 256)), **changes)
    reason = kernel_named(kernel).refuse(request)
    assert reason is not None
    for word in words:
        assert word in reason


@pytest.mark.parametrize("name", ["torch-int4pack", "torch-int8pack", "onednn-w8a8", "reference"])
def test_a_plain_tensor_is_an_error(name):
    with pytest.raises(FormatError, match="quantize"):
        kernel_named(name).pack(torch.zeros(32, 256), make_request(SCHEMES["W8A16"].weights, None, (32, 256)))


def test_missing_operator_is_a_refusal(monkeypatch):
    from fewbit.kernels import torch_int4pack

    monkeypatch.setattr(torch_int4pack, "_OPS", ("_no_such_operator",))
    reason = kernel_named("torch-int4pack").refuse(make_request(SCHEMES["W4A16"].weights, None, (32, 256)))
    assert reason is not None and "_no_such_operator" in reason and torch.__version__ in reason


def test_int4_symmetric_is_exact() -> None:
    """A one-hot input reads out single weights: the fused kernel's are the definition's, rounded to BF16 once."""
    spec = SCHEMES["W4A16"].weights
    request = make_request(spec, None, (32, 256))
    weight = quantized(spec, (32, 256))
    kernel = kernel_named("torch-int4pack")
    y = kernel.apply(torch.eye(256).bfloat16(), kernel.pack(weight, request), None, request)
    assert torch.equal(y, dequantize(weight, BFLOAT16).T)
