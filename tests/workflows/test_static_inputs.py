"""Static activation scales, from the format through kernels and layout to a quantized model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.checkpoints.compressed_tensors import CompressedTensorsReader, quantization_config, read_linear, supports, write_linear
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.checkpoints.shards import write_tensors
from fewbit.errors import CheckpointError, FormatError, UsageError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import QuantSpec, get_scheme
from fewbit.formats.static import check_static, fake_quantize_static, quantize_static
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.dispatch import KERNELS, select
from fewbit.methods.rtn import rtn
from fewbit.runtime.linear import KernelLinearMethod, QuantLinear
from fewbit.walk.settings import CalibrationChoice, GateChoice, WalkSettings
from fewbit.workflows.evaluate import evaluate
from fewbit.workflows.quantize import quantize_model

SCHEME = get_scheme("W8A8-STATIC")
WEIGHTS: QuantSpec = SCHEME.weights  # type: ignore[assignment]
INPUTS: QuantSpec = SCHEME.input_activations  # type: ignore[assignment]
assert WEIGHTS is not None and INPUTS is not None
KERNEL = {kernel.name: kernel for kernel in KERNELS}


def weight_and_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(48, 64, generator=g) * 0.1, torch.randn(3, 5, 64, generator=g)


def test_codes_saturate_beyond_the_calibrated_range() -> None:
    x = torch.tensor([-100.0, -1.0, 0.0, 0.25, 1.0, 100.0])
    codes = quantize_static(x, torch.tensor([0.5]), INPUTS)
    assert codes.tolist() == [-128, -2, 0, 0, 2, 127]
    assert fake_quantize_static(x.bfloat16(), torch.tensor([0.5]), INPUTS).dtype == torch.bfloat16
    bad = fake_quantize_static(torch.tensor([[1.0, math.nan], [math.inf, 1.0], [1.0, 2.0]]), torch.tensor([0.5]), INPUTS)
    assert bad.isfinite().all(-1).tolist() == [False, False, True]
    for wrong in (replace(INPUTS, dynamic=True), replace(INPUTS, strategy="token"), replace(INPUTS, symmetric=False)):
        with pytest.raises(FormatError):
            check_static(wrong)


@pytest.mark.parametrize("name", ["reference", "onednn-w8a8", "cpu-w8a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels(name: str, dtype: torch.dtype) -> None:
    weight, x = weight_and_inputs()
    bias = torch.linspace(-1, 1, 48, dtype=dtype)
    q = replace(rtn(weight, WEIGHTS), input_scale=torch.tensor([3.0 / 127.5]))
    request = KernelRequest(WEIGHTS, INPUTS, 48, 64, dtype=dtype)
    kernel = KERNEL[name]
    if kernel.refuse(request):
        pytest.skip(str(kernel.refuse(request)))
    y = kernel.apply(x.to(dtype), kernel.pack(q, request), bias, request)
    exact = fake_quantize_static(x.to(dtype).float(), torch.tensor([3.0 / 127.5]), INPUTS) @ dequantize(q).T + bias.float()
    torch.testing.assert_close(
        y.float(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
    )


def test_the_fused_kernel_is_selected() -> None:
    assert select(KernelRequest(WEIGHTS, INPUTS, 48, 64)).kernel.name in ("cpu-w8a8", "onednn-w8a8", "reference")
    assert KERNEL["onednn-w8a8"].refuse_format(KernelRequest(WEIGHTS, INPUTS, 48, 64)) is None


def test_a_weight_without_an_input_scale_is_refused() -> None:
    weight, _ = weight_and_inputs()
    layer = QuantLinear(64, 48, KernelLinearMethod(WEIGHTS, INPUTS))
    with pytest.raises(FormatError, match="calibrate"):
        layer.quant_method.load_weight(layer, weight)
    with pytest.raises(FormatError, match="calibrate"):
        write_linear("x", rtn(weight, WEIGHTS), SCHEME)


def test_layout_round_trip(tmp_path: Path) -> None:
    weight, _ = weight_and_inputs()
    q = replace(rtn(weight, WEIGHTS), input_scale=torch.tensor([0.0123]))
    assert supports(SCHEME) is None
    arguments = quantization_config(SCHEME, [])["config_groups"]["group_0"]["input_activations"]
    assert (arguments["dynamic"], arguments["strategy"], arguments["symmetric"]) == (False, "tensor", True)
    write_tensors(tmp_path / "model.safetensors", write_linear("a.b", q, SCHEME))
    back = read_linear(SafetensorsFiles(tmp_path), "a.b", SCHEME)
    assert back.input_scale is not None and q.input_scale is not None
    assert torch.equal(back.input_scale, q.input_scale) and torch.equal(back.values, q.values)
    write_tensors(tmp_path / "model.safetensors", {**write_linear("a.b", q, SCHEME), "a.b.input_scale": torch.tensor([math.nan])})
    with pytest.raises(CheckpointError, match="input_scale"):
        read_linear(SafetensorsFiles(tmp_path), "a.b", SCHEME)


def test_a_model_with_static_inputs(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Written by the workflow, read again, run on the fused kernel, and near BF16."""
    settings = WalkSettings(
        method="smoothquant", calibration=CalibrationChoice(samples=4, sequence_length=128), gate=GateChoice(enabled=False)
    )
    out = tmp_path / "static"
    quantize_model(tiny_llama_dir, scheme="W8A8-STATIC", out=out, settings=settings)
    reader = CompressedTensorsReader(out)
    assert reader.scheme.name == "W8A8-STATIC"
    scales = {name: reader.read(name).input_scale for name in reader.linears}
    assert all(scale is not None and float(scale) > 0 for scale in scales.values())
    shared = [scales[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]
    assert len({float(scale) for scale in shared if scale is not None}) == 1
    result = evaluate(out, against=tiny_llama_dir, max_tokens=2048)
    assert result.quality is not None and result.quality.kl_divergence_nats.value < 0.05
    assert {use.kernel for use in result.kernels} <= {"cpu-w8a8", "onednn-w8a8", "reference", "dense"} and len(result.kernels) >= 1
    with pytest.raises(UsageError, match="static"):
        quantize_model(tiny_llama_dir, scheme="W8A8-STATIC", out=tmp_path / "rtn", method="rtn")
