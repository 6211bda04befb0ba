"""Tiny random models of many architectures with a byte-level tokenizer, and settings small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    StableLmConfig,
)

from fewbit.walk.settings import CalibrationChoice, GateChoice, WalkSettings

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GATED = {**_SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
_OPT = {k: v for k, v in _SIZES.items() if k != "initializer_range"}
_OPT_SMALL = {**_OPT, "ffn_dim": 128, "init_std": 0.1}

ZOO: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_GATED, tie_word_embeddings=False),
    "mistral": MistralConfig(**_GATED, sliding_window=16),
    "qwen2": Qwen2Config(**_GATED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_GATED, head_dim=32, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**_GATED, head_dim=32, sliding_window=16),
    "gemma3": Gemma3TextConfig(**_GATED, head_dim=32, sliding_window=16),
    "phi3": Phi3Config(**_GATED),
    "gpt_neox": GPTNeoXConfig(**_SIZES, intermediate_size=128),
    "opt": OPTConfig(**_OPT_SMALL, word_embed_proj_dim=64),
    "opt_350m": OPTConfig(**_OPT_SMALL, word_embed_proj_dim=32, do_layer_norm_before=False),
    "gptj": GPTJConfig(
        vocab_size=512,
        n_positions=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        rotary_dim=8,
        n_inner=128,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    ),
    "stablelm": StableLmConfig(**_GATED),
    "cohere": CohereConfig(**_GATED),
    "mixtral": MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(
        **_GATED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64, decoder_sparse_step=1
    ),
}


@pytest.fixture(scope="session")
def zoo_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Callable[[str], Path]:
    """The directory of one architecture's tiny model with a tokenizer, written once. Copy it before you change it."""
    written: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in written:
            target = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(ZOO[name]).to(torch.bfloat16)
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.ndim == 1:
                            parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(target)
            for file in tiny_llama_dir.glob("tokenizer*"):
                (target / file.name).write_bytes(file.read_bytes())
            written[name] = target
        return written[name]

    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some kilobytes of text: reading the standard library would take longer than a test should."""
    import argparse
    import inspect

    path = tmp_path_factory.mktemp("text") / "argparse.txt"
    path.write_text(inspect.getsource(argparse)[:60_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small(text_file: Path) -> WalkSettings:
    """Four calibration windows and three of the gate, 32 tokens each; a gate that random weights pass."""
    return WalkSettings(
        precision="float32",
        calibration=CalibrationChoice(files=(text_file,), samples=4, sequence_length=32),
        gate=GateChoice(texts=(text_file,), windows=3, sequence_length=24, threshold=100.0),
    )


@pytest.fixture(scope="session")
def ungated(small: WalkSettings) -> WalkSettings:
    """The same without the gate."""
    return replace(small, gate=replace(small.gate, enabled=False))
