"""Triton kernels against the definition, by Triton's interpreter on the CPU; the same tests run on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import QuantSpec
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.triton.layout import layout_of, pack
from fewbit.kernels.triton.linear import TritonWeightOnly
from fewbit.methods.rtn import rtn

SPECS = {
    "int4-g32": QuantSpec(4, "int", "group", group_size=32),
    "int4-g64-affine": QuantSpec(4, "int", "group", group_size=64, symmetric=False, zero_point_dtype="int4"),
    "int4-g128": QuantSpec(4, "int", "group", group_size=128),
    "int4-channel": QuantSpec(4, "int", "channel"),
    "int8-channel": QuantSpec(8, "int", "channel"),
    "int8-g128-float16": QuantSpec(8, "int", "group", group_size=128, scale_dtype="float16"),
    "int3-g32": QuantSpec(3, "int", "group", group_size=32),
    "int3-g128": QuantSpec(3, "int", "group", group_size=128),
    "int2-g64": QuantSpec(2, "int", "group", group_size=64),
    "nf4-g64": QuantSpec(4, "nf", "group", group_size=64),
    "mxfp4": QuantSpec(4, "float", "group", group_size=32, exponent_bits=2, scale_dtype="e8m0"),
    "nvfp4": QuantSpec(4, "float", "group", group_size=16, exponent_bits=2, scale_dtype="float8_e4m3fn", global_scale=True),
    "fp8-channel": QuantSpec(8, "float", "channel", exponent_bits=4),
}


def _weight(spec: QuantSpec, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


@pytest.mark.parametrize("name", list(SPECS))
def test_packed_codes_are_where_the_kernel_looks(name: str) -> None:
    """Unpacked bit by bit as in the header of `layout`: every code comes back."""
    spec = SPECS[name]
    quantized = rtn(_weight(spec, 5, 256), spec)
    packed, layout = pack(quantized), layout_of(spec, 256)
    bits, steps = 2 if layout.bits == 3 else layout.bits, layout.lanes // 2
    words = packed["codes"].long() & 0xFFFFFFFF
    high = packed.get("high", packed["codes"]).long() & 0xFFFFFFFF
    codes = torch.empty(5, 256, dtype=torch.int64)
    for k in range(256):
        chunk, rest = divmod(k, layout.chunk)
        step, j, half = rest // 32, rest % 32 // 2, rest % 2
        assert step < steps
        code = (words[0, chunk, :5, j] >> (16 * half + bits * step)) & (2**bits - 1)
        if layout.bits == 3:
            code |= ((high[0, chunk, :5, j // 2] >> (step + 8 * (j % 2) + 16 * half)) & 1) << 2
        codes[:, k] = code
    values = quantized.values
    expected = values.long() + 2 ** (spec.num_bits - 1) if spec.type == "int" else values.view(torch.uint8).long()
    assert torch.equal(codes, expected)


def test_ragged_rows_are_padded_and_bytes_are_few() -> None:
    spec = SPECS["int4-channel"]
    packed = pack(rtn(_weight(spec, 7, 200), spec))
    assert packed["codes"].shape == (1, 2, 16, 16)
    assert packed["scale"].shape == (7, 1)


def test_formats_and_devices_are_refused_with_a_reason() -> None:
    kernel = TritonWeightOnly()
    spec = SPECS["int4-g128"]
    assert kernel.refuse(KernelRequest(spec, None, 64, 128, device="mps")) == "runs on NVIDIA GPUs, not on mps"
    assert "strategy 'block'" in str(
        kernel.refuse(KernelRequest(QuantSpec(8, "float", "block", block_shape=(8, 8), exponent_bits=4), None, 64, 128))
    )
    assert "high precision" in str(kernel.refuse(KernelRequest(None, None, 64, 128)))
    assert "float64" in str(kernel.refuse(KernelRequest(spec, None, 64, 128, device="cuda", dtype=torch.float64)))
    if not torch.cuda.is_available():
        assert "no CUDA device" in str(kernel.refuse(KernelRequest(spec, None, 64, 128, device="cuda")))


def check(name: str, tokens: int, device: str) -> None:
    """One product against float64, the output poisoned beforehand where it can be."""
    spec = SPECS[name]
    rows, columns = 20, 256 if spec.strategy == "group" else 200
    quantized = rtn(_weight(spec, rows, columns), spec)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, tokens, columns, generator=generator)[1:]
    bias = torch.randn(rows, generator=generator)
    kernel, request = TritonWeightOnly(), KernelRequest(spec, None, rows, columns, device, torch.float32)
    assert kernel.refuse(request) is None
    packed = kernel.pack(quantized, request)
    y = kernel.apply(x.to(device), packed, bias.to(device), request).cpu()
    expected = x.double() @ dequantize(quantized).double().T + bias.double()
    scale = (x.abs().double() @ dequantize(quantized).abs().double().T).clamp_min(1e-6)
    tolerance = 2e-3 if device.startswith("cuda") else 1e-5  # tensor cores multiply float32 as TF32
    assert y.shape == (1, tokens, rows)
    assert float(((y.double() - expected).abs() / scale).max()) < tolerance, name


_CASES = """
import sys
sys.path.insert(0, {folder!r})
import test_weight_only as t
for name in t.SPECS:
    for tokens in (1, 70) if name in ("int4-g128", "nvfp4", "int4-channel") else (3,):
        t.check(name, tokens, "cpu")
"""


def test_products_agree_with_the_definition_in_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    folder = os.path.dirname(__file__)
    code = _CASES.format(folder=folder)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 200])
@pytest.mark.parametrize("name", list(SPECS))
def test_products_agree_with_the_definition_on_the_gpu(name: str, tokens: int) -> None:
    check(name, tokens, "cuda")
