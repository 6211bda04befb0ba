"""8-bit weights with 8-bit inputs, LLM.int8(), the unfused path and the pass over rows: against their definitions, in the interpreter.

On a machine with a GPU the same checks run there.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fewbit.formats.quantize import dequantize, fake_quantize, quantize_dynamic
from fewbit.formats.spec import SCHEMES, Scheme
from fewbit.formats.static import fake_quantize_static
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.dispatch import select
from fewbit.kernels.triton.w8a8 import TritonLlmInt8, TritonW8A8
from fewbit.methods.llm_int8 import llm_int8_matmul
from fewbit.methods.rtn import rtn

_NAMES = ("W8A8", "W8A8-STATIC", "FP8", "FP8-TENSOR", "FP8-BLOCK", "LLM-INT8")


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _request(scheme: Scheme, rows: int, columns: int, device: str) -> KernelRequest:
    return KernelRequest(scheme.weights, scheme.input_activations, rows, columns, device, torch.float32)


def check_products(name: str, tokens: int, device: str) -> None:
    """One product against float64 over what the formats keep of both sides."""
    scheme, rows, columns = SCHEMES[name], 48, 256
    weight = rtn(_random(rows, columns, seed=1), scheme.weights)
    if name == "W8A8-STATIC":
        weight = type(weight)(**{**vars(weight), "input_scale": torch.tensor([0.02])})
    kernel = TritonLlmInt8() if name == "LLM-INT8" else TritonW8A8()
    request = _request(scheme, rows, columns, device)
    assert kernel.refuse(request) is None
    x, bias = _random(tokens, columns, seed=2), _random(rows, seed=3)
    if name == "LLM-INT8":
        x[:, 7] *= 40
        expected = llm_int8_matmul(x, weight, scheme.input_activations)
    else:
        kept = (
            fake_quantize(x, scheme.input_activations)
            if weight.input_scale is None
            else fake_quantize_static(x, weight.input_scale, scheme.input_activations)
        )
        expected = kept.double() @ dequantize(weight).double().T
    y = kernel.apply(x.to(device), kernel.pack(weight, request), bias.to(device), request).cpu()
    error = (y.double() - expected - bias.double()).abs().max() / expected.abs().max()
    assert float(error) < (5e-3 if tokens > 16 and "FP8" in name else 1e-5), (name, tokens, float(error))  # _scaled_mm answers in BF16


def check_spoiled(device: str) -> None:
    """A token with a NaN or an infinity gives NaN; the others are untouched."""
    for name in ("W8A8", "FP8"):
        scheme = SCHEMES[name]
        request = _request(scheme, 32, 128, device)
        packed = TritonW8A8().pack(rtn(_random(32, 128), scheme.weights), request)
        x = _random(4, 128, seed=5)
        clean = TritonW8A8().apply(x.to(device), packed, None, request).cpu()
        x[1, 3], x[2, 5] = float("nan"), float("inf")
        y = TritonW8A8().apply(x.to(device), packed, None, request).cpu()
        assert y[1:3].isnan().all() and torch.equal(y[[0, 3]], clean[[0, 3]])


def check_rows(device: str) -> None:
    """Residual, norm and codes in one pass are what torch makes of them one after the other, and quantize_dynamic's codes."""
    from fewbit.kernels.triton.rows import process_rows, silu_product

    dtype = torch.bfloat16 if device == "cuda" else torch.float16  # the interpreter cuts BF16 off where hardware rounds
    x, residual, bias = _random(3, 200).to(device), _random(3, 200, seed=1).to(device, dtype), _random(200, seed=2).to(device, dtype)
    weight = _random(200, seed=3).to(device, dtype)
    halves = torch.stack([x, x * 0.5])
    summed = ((x + x * 0.5 + bias.float()).to(dtype) + residual).to(dtype)
    normed = weight * (summed.float() * torch.rsqrt(summed.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    stream = residual.clone()
    rows = process_rows(halves.contiguous(), dtype, bias=bias, residual=stream, norm=(weight, 1e-6))
    assert torch.equal(stream, summed)
    assert float((rows.values.float() - normed.float()).abs().max()) <= 0.02
    for spec in (SCHEMES["W8A8"].input_activations, SCHEMES["FP8"].input_activations):
        stream = residual.clone()
        codes = process_rows(halves.contiguous(), dtype, bias=bias, residual=stream, norm=(weight, 1e-6), inputs=spec)
        values, scale, _ = quantize_dynamic(rows.values, spec)
        assert torch.equal(codes.scale, scale.view(-1)) and torch.equal(codes.values.view(torch.uint8), values.view(torch.uint8))
        long = _random(2, 16400, seed=6).to(device, dtype)  # longer than one program holds
        long[0, 16390] = 9.0
        codes, (values, scale, _) = process_rows(long, dtype, inputs=spec), quantize_dynamic(long, spec)
        assert torch.equal(codes.scale, scale.view(-1)) and torch.equal(codes.values.view(torch.uint8), values.view(torch.uint8))
        static = torch.tensor([0.02], device=device)
        codes = process_rows(long, dtype, inputs=spec, static=static)
        assert torch.equal(codes.scale, static.expand(2))
        long[1, 16395] = float("nan")
        assert process_rows(long, dtype, inputs=spec).scale.isnan().tolist() == [False, True]
    both = _random(2, 3, 2 * 96, seed=4).to(device)
    gate, up = both.sum(0).to(dtype).chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    assert float((silu_product(both, dtype).float() - expected.float()).abs().max()) <= 0.03


def check_unfused_and_joined(device: str) -> None:
    """The unfused path writes the very weights; joined weights give the products side by side."""
    from fewbit.kernels.triton.gpu_kernel import Rows

    for name, prefer in (
        ("NF4", "triton-unfused"),
        ("W3A16-ASYM", "triton-unfused"),
        ("NVFP4", "triton-unfused"),
        ("W4A16", None),
        ("W8A8", None),
    ):
        scheme = SCHEMES[name]
        request = _request(scheme, 32, 256, device)
        kernel = select(request, prefer=prefer).kernel
        assert kernel.name == prefer or prefer is None
        weights = [rtn(_random(32, 256, seed=seed), scheme.weights) for seed in (1, 2)]
        packed = [kernel.pack(weight, request) for weight in weights]
        x = _random(2, 256, seed=9).to(device)
        if prefer:
            expected = x.cpu().double() @ dequantize(weights[0]).double().T
            y = kernel.apply(x, packed[0], None, request).cpu()
            assert float((y.double() - expected).abs().max()) < 1e-4, name
            continue
        apart = torch.cat([kernel.apply(x, one, None, request) for one in packed], 1)
        joined = kernel.join(packed, request)
        both = KernelRequest(scheme.weights, scheme.input_activations, 64, 256, device, torch.float32)
        assert float((kernel.apply(x, joined, None, both) - apart).abs().max()) < 1e-5, name
    assert Rows(x).scale is None


def everything(device: str) -> None:
    """All checks of this file."""
    for name in _NAMES:
        for tokens in (1, 20):
            check_products(name, tokens, device)
    check_spoiled(device)
    check_rows(device)
    check_unfused_and_joined(device)


def test_everything_in_the_interpreter(in_the_interpreter: Callable[[str, str], None]) -> None:
    in_the_interpreter(__file__, "checks.everything('cpu')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_everything_on_the_gpu() -> None:
    everything("cuda")


@pytest.mark.parametrize(
    ("scheme", "words"),
    [("W4A16", "runs INT8 and FP8 weights"), ("LLM-INT8", "no columns in 16 bit"), ("FP8A16", "inputs in the weight's format")],
)
def test_other_formats_are_refused_with_a_reason(scheme: str, words: str) -> None:
    request = KernelRequest(SCHEMES[scheme].weights, SCHEMES[scheme].input_activations, 64, 128, "cuda")
    assert words in str(TritonW8A8().refuse_format(request))


def test_a_device_without_fp8_is_refused_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A4000")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused = TritonW8A8().refuse(KernelRequest(SCHEMES["FP8"].weights, SCHEMES["FP8"].input_activations, 64, 128, "cuda"))
    assert refused == "needs compute capability 8.9; NVIDIA RTX A4000 has 8.6"
    assert TritonW8A8().refuse(KernelRequest(SCHEMES["W8A8"].weights, SCHEMES["W8A8"].input_activations, 64, 128, "cuda")) is None
