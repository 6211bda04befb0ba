"""Schemes for servers: calibrated scales of the KV cache and of FP8 inputs are in the checkpoint, are what they should be, and are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.checkpoints.runtimes import kind_of
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.checkpoints.served import SERVED, checkpoint_scheme
from fewbit.checkpoints.sources import open_source
from fewbit.errors import UsageError
from fewbit.walk.settings import CalibrationChoice, GateChoice, WalkSettings
from fewbit.workflows.quantize import quantize_model

CALIBRATION = CalibrationChoice(samples=4, sequence_length=64)


def test_scales_of_the_cache_cover_what_the_model_caches(tiny_llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "kv"
    settings = WalkSettings(gate=GateChoice(enabled=False), calibration=CALIBRATION)
    result = quantize_model(tiny_llama_dir, scheme="FP8-KV", out=out, settings=settings, verify=())
    assert result.verify is not None and result.verify.passed, result.verify.problems
    assert kind_of(out).name == "ct-fp8-kv"
    files = SafetensorsFiles(out)
    scales = {name: files.get(name) for name in files.names() if name.endswith(("k_scale", "v_scale"))}
    assert len(scales) == 4 and all(scale.dtype == torch.bfloat16 and scale.shape == (1,) for scale in scales.values())
    captured: list[float] = []
    model = fewbit.load(tiny_llama_dir, dtype=torch.float32).model
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, i, o: captured.append(float(o.abs().max())))
    with torch.inference_mode():
        model(torch.arange(64)[None] * 5 % 512)
    seen = float(scales["model.layers.1.self_attn.v_scale"]) * 448
    assert 0.5 * captured[0] < seen < 2 * captured[0]
    source = open_source(out)
    assert source.scheme is not None and source.scheme.kv_keys == SERVED["FP8-KV"].kv_keys
    assert not [name for name in source.names() if name.endswith("k_scale")]
    text = fewbit.generate_text(str(out), prompt="import ", max_new_tokens=4)
    assert text.summary()


def test_static_fp8_has_one_scale_of_inputs_per_linear(tiny_llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "static"
    settings = WalkSettings(method="gptq", gate=GateChoice(enabled=False), calibration=CALIBRATION)
    quantize_model(tiny_llama_dir, scheme="fp8-static", out=out, settings=settings)
    files = SafetensorsFiles(out)
    assert sum(name.endswith(".input_scale") for name in files.names()) == 14
    assert kind_of(out).name == "ct-fp8-static"
    logits = fewbit.load(out).model(torch.arange(32)[None]).logits
    assert bool(logits.isfinite().all())


def test_static_inputs_need_a_method_that_looks_at_them(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="static"):
        quantize_model(tiny_llama_dir, scheme="FP8-STATIC", out=tmp_path / "x", settings=WalkSettings(gate=GateChoice(enabled=False)))
    with pytest.raises(UsageError, match="unknown scheme"):
        checkpoint_scheme("FP8-NEW")
