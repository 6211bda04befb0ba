"""Triton kernels against the definition, by Triton's interpreter on the CPU; the same tests run on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fewbit.errors import KernelError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import QuantSpec
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.dispatch import select
from fewbit.kernels.triton import environment
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


def everything(device: str) -> None:
    """One product of few tokens in every format, and many tokens in some."""
    for name in SPECS:
        for tokens in (1, 70) if name in ("int4-g128", "nvfp4", "int4-channel") else (3,):
            check(name, tokens, device)


def test_products_agree_with_the_definition_in_the_interpreter(in_the_interpreter: Callable[[str, str], None]) -> None:
    in_the_interpreter(__file__, "checks.everything('cpu')")


def test_inputs_on_another_device_than_the_weight_are_refused() -> None:
    """Triton would launch with pointers that the device cannot read."""
    kernel, spec = TritonWeightOnly(), SPECS["int4-g128"]
    request = KernelRequest(spec, None, 32, 128, "cpu", torch.float32)
    packed = kernel.pack(rtn(_weight(spec, 32, 128), spec), request)
    with pytest.raises(KernelError, match="the input is on meta, the packed weight on cpu"):
        kernel.apply(torch.empty(1, 128, device="meta"), packed, None, request)


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "needs compute capability 8.0; NVIDIA T4 has 7.5"), ((8, 0), None)])
def test_devices_that_are_too_old_are_refused_by_their_numbers(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    request = KernelRequest(SPECS["int4-g128"], None, 64, 128, device="cuda")
    assert TritonWeightOnly().refuse(request) == reason
    passed = [entry.reason for entry in select(request).passed_over if entry.kernel == "triton-weight-only"]
    assert passed == ([] if reason is None else [reason])  # the kernel that runs instead is named, with the reason
    if reason is not None:
        with pytest.raises(KernelError, match="would fall back to the unfused kernel"):
            select(request, strict=True)


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "_has_triton", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused = TritonWeightOnly().refuse(KernelRequest(SPECS["int4-g128"], None, 64, 128, device="cuda"))
    assert refused == "Triton is not installed (pip install triton)"


def test_gpus_of_another_maker_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's torch calls them cuda, and gives them capabilities above 8.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert environment.refuse_device("cuda") == "runs on NVIDIA GPUs, not on AMD's"


def test_a_device_without_memory_is_an_error_that_says_for_what() -> None:
    with (
        pytest.raises(KernelError, match="no memory for the model's weights on cuda") as raised,
        environment.room_for("the model's weights", "cuda", "use fewer bits"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert raised.value.remedy == "use fewer bits"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 200])
@pytest.mark.parametrize("name", list(SPECS))
def test_products_agree_with_the_definition_on_the_gpu(name: str, tokens: int) -> None:
    check(name, tokens, "cuda")
