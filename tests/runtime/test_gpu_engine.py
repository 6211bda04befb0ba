"""The GPU engine against transformers over the same kernels: logits and greedy tokens, in the interpreter and on a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fewbit.checkpoints.sources import open_source
from fewbit.errors import KernelError, UnsupportedModelError, UsageError
from fewbit.formats.spec import get_scheme
from fewbit.runtime import gpu_model
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.gpu_engine import GpuEngine
from fewbit.runtime.gpu_model import gpu_engine_refusal, model_of, random_model
from fewbit.runtime.load import LoadedModel, load_model
from fewbit.runtime.runner import GpuRunner

_TINY: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip


def _config(family: str) -> Any:
    return AutoConfig.for_model(family, **_TINY)


def _loaded(family: str, scheme: str, device: str) -> LoadedModel:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(_config(family), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return load_model(open_source(directory), QuantizationConfig(get_scheme(scheme)), device=device, dtype=torch.float32)


def check(family: str, scheme: str, device: str) -> None:
    """A prompt of five tokens and two steps; then a second sequence beside the first."""
    loaded = _loaded(family, scheme, device)
    prompt = torch.tensor([3, 14, 15, 9, 26], device=device)
    cache = loaded.new_cache()
    with torch.inference_mode():
        steps = [loaded.model(input_ids=prompt[None], past_key_values=cache, use_cache=True).logits[0, -1]]
        for _ in range(2):
            token = steps[-1].argmax().view(1, 1)
            steps.append(loaded.model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1])
    engine = GpuEngine(model_of(loaded))
    ours = engine.new_cache(16, 2)
    got = [engine.prefill(prompt, ours, 0).clone()]
    engine.prefill(prompt[:2], ours, 1)
    for _ in range(2):
        got.append(engine.decode(ours)[0].clone())
    for expected, logits in zip(steps, got, strict=True):
        assert float((expected - logits).abs().max()) < (0.05 if device == "cuda" else 1e-4) * float(expected.abs().max()), (family, scheme)
    assert ours.lengths == [7, 4] and ours.positions.tolist() == [7, 4]
    if family == "mistral":
        runner = GpuRunner(loaded)
        again = runner.new_cache(16)
        first = runner.prefill(prompt[None], again)[0].clone()
        second = runner.decode(first.argmax().view(1, 1), again)[0]
        assert torch.equal(first, got[0]) and float((second - got[1]).abs().max()) < 1e-4 * float(second.abs().max())


def check_random(device: str) -> None:
    """Models without a checkpoint: every scheme's step gives finite logits, apart from LLM.int8() all can be captured."""
    for scheme in ("NVFP4", "FP8-BLOCK", "LLM-INT8", "W3A16-ASYM"):
        config = _config("llama")
        config.hidden_size, config.intermediate_size = 128, 256
        engine = GpuEngine(random_model(config, get_scheme(scheme), device, torch.float32))
        cache = engine.new_cache(4)
        engine.prefill(torch.tensor([1]), cache)
        assert bool(engine.decode(cache).isfinite().all()), scheme
        assert (engine.graphs_refusal() or "").startswith(
            "kernel" if scheme == "LLM-INT8" and device == "cuda" else "the model" if device == "cpu" else ""
        )
    with pytest.raises(UsageError, match="do not fit"):
        engine.prefill(torch.zeros(9, dtype=torch.long), cache)


def everything(device: str) -> None:
    """All checks of this file."""
    for family, scheme in (("qwen2", "W4A16-G32"), ("qwen3", "W8A8"), ("llama", "KV-INT8"), ("mistral", "BF16")):
        check(family, scheme, device)
    check_random(device)


def test_everything_in_the_interpreter(in_the_interpreter: Callable[[str, str], None]) -> None:
    in_the_interpreter(__file__, "checks.everything('cpu')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_everything_on_the_gpu() -> None:
    everything("cuda")


def test_no_memory_for_weights_or_cache_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_model, "refuse_device", lambda *_: None)
    monkeypatch.setattr(gpu_model, "random_quantized", full)
    config = _config("llama")
    with pytest.raises(KernelError, match="no memory for the model's weights"):
        random_model(config, get_scheme("W4A16-G32"), "cpu", torch.float32, kernel="reference")
    engine = GpuEngine(random_model(config, get_scheme("BF16"), "cpu", torch.float32))
    assert engine.graphs_refusal() == "the model is on cpu"
    pytest.importorskip("triton", reason="Triton is not installed")
    from fewbit.kernels.triton import attention

    monkeypatch.setattr(attention, "new_layer", full)
    with pytest.raises(KernelError, match="no memory for the cache of 2 sequences of 99 tokens"):
        engine.new_cache(99, 2)


def test_a_window_larger_than_what_a_layer_sees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rotary:
        rope_type = "default"

    monkeypatch.setattr(gpu_model, "refuse_device", lambda *_: None)
    config = _config("mistral")
    config.sliding_window = 16
    reason = gpu_engine_refusal(config, get_scheme("KV-INT4"), "cpu", torch.bfloat16, Rotary())
    assert get_scheme("KV-INT4").kv_residual_window > 16
    assert reason is not None and "layers that see 16 tokens" in reason


def test_what_it_cannot_run_it_refuses_with_a_reason() -> None:
    class Rotary:
        rope_type = "dynamic"

    config, bf16 = _config("llama"), get_scheme("BF16")
    reason = gpu_engine_refusal(config, bf16, "cpu", torch.bfloat16, Rotary())
    assert reason == "runs on NVIDIA GPUs, not on cpu"
    if not torch.cuda.is_available():
        assert gpu_engine_refusal(config, bf16, "cuda", torch.bfloat16, Rotary()) == "this torch sees no CUDA device"
    with pytest.raises(UnsupportedModelError, match="runs on NVIDIA GPUs, not on cpu"):
        random_model(config, bf16, "cpu")
