"""Outliers put in by hand: the function stays, per-token activation quantization breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
)

from fewbit.errors import UnsupportedModelError, UsageError
from fewbit.formats.quantize import fake_quantize
from fewbit.formats.spec import get_scheme
from fewbit.walk.outliers import inject_outliers, write_outlier_model

IDS = torch.arange(100)[None]
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = [
    LlamaConfig(**_SIZES, intermediate_size=256, num_key_value_heads=2, initializer_range=0.1),
    Gemma2Config(**_SIZES, intermediate_size=256, num_key_value_heads=2, head_dim=32, initializer_range=0.1),
    Phi3Config(**_SIZES, intermediate_size=256, num_key_value_heads=2, initializer_range=0.1),
    OPTConfig(**_SIZES, ffn_dim=256, word_embed_proj_dim=128, init_std=0.1),
]


def build(config: PretrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    return model


@torch.no_grad()
def logits_and_inputs(model: PreTrainedModel, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and what the linear reads."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(linear).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = model(IDS, use_cache=False).logits.float()
    handle.remove()
    return logits, seen[0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("factor", [64.0, 50.0])
def test_the_function_stays(config: PretrainedConfig, factor: float) -> None:
    model = build(config)
    with torch.no_grad():
        before = model(IDS).logits.float()
        inject_outliers(model, [3, 77], factor)
        after = model(IDS).logits.float()
    error = float((after - before).norm() / before.norm())
    assert error < (0.02 if factor == 64 else 0.05)  # a power of two changes exponents only; Gemma's 1 + gain rounds


def test_per_token_quantization_breaks_and_only_that() -> None:
    """The relative error of a linear's output under W8A8's activation format grows tenfold."""
    linear = "model.layers.0.self_attn.q_proj"
    spec = get_scheme("W8A8").input_activations
    assert spec is not None
    model = build(CONFIGS[0])
    errors, largest = [], []
    for _ in range(2):
        _, x = logits_and_inputs(model, linear)
        weight = model.get_submodule(linear).weight.float()
        exact, rounded = (y.float() @ weight.T for y in (x, fake_quantize(x, spec)))
        errors.append(float((rounded - exact).norm() / exact.norm()))
        largest.append(float(x.abs().amax() / x.float().square().mean().sqrt()))
        inject_outliers(model, [3, 77], 64.0)
    assert errors[0] < 0.02
    assert errors[1] > 10 * errors[0]
    assert largest[1] > 1.5 * largest[0]


def test_down_proj_reads_outliers_too() -> None:
    model = build(CONFIGS[0])
    _, before = logits_and_inputs(model, "model.layers.1.mlp.down_proj")
    inject_outliers(model, [5], 128.0)
    _, after = logits_and_inputs(model, "model.layers.1.mlp.down_proj")
    ratio = after[..., 5].abs().mean() / before[..., 5].abs().mean()
    assert float(ratio) == pytest.approx(128, rel=0.1)
    others = [c for c in range(256) if c != 5]
    torch.testing.assert_close(after[..., others], before[..., others], rtol=0.05, atol=0.05)


def test_write_outlier_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "outliers"
    write_outlier_model(tiny_llama_dir, out, [7], 64.0)
    original, written = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.bfloat16).eval() for d in (tiny_llama_dir, out))
    gain = "model.layers.1.input_layernorm"
    assert float(written.get_submodule(gain).weight[7]) == 64 * float(original.get_submodule(gain).weight[7])
    torch.testing.assert_close(written(IDS).logits, original(IDS).logits, rtol=0.02, atol=0.05)
    assert (out / "tokenizer.json").read_bytes() == (tiny_llama_dir / "tokenizer.json").read_bytes()
    assert not out.with_name("outliers.partial").exists()


@pytest.mark.parametrize(("channels", "factor"), [([128], 8.0), ([-1], 8.0), ([], 8.0), ([1], 0.0)])
def test_arguments_out_of_range(channels: list[int], factor: float) -> None:
    with pytest.raises(UsageError):
        inject_outliers(build(CONFIGS[0]), channels, factor)


def test_models_without_plain_linears_are_refused_unchanged() -> None:
    model = build(GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match="Conv1D"):
        inject_outliers(model, [1], 8.0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
