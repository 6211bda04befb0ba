"""Tiny random models of several architectures, written to disk as transformers writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoHybridConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

_SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GATED = {**_SIZES, "intermediate_size": 128, "num_key_value_heads": 2}

ZOO: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_GATED, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**_GATED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_GATED, head_dim=32, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**_GATED, head_dim=32, sliding_window=8),
    "gpt_neox": GPTNeoXConfig(**_SIZES, intermediate_size=128),
    "opt": OPTConfig(**{k: v for k, v in _SIZES.items() if k != "initializer_range"}, ffn_dim=128, word_embed_proj_dim=64, init_std=0.1),
    "phi3": Phi3Config(**_GATED),
}
GPT2 = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1)
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
MIXTURES: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**_GATED, **_MOE, shared_expert_intermediate_size=128, decoder_sparse_step=1),
    "qwen3_moe": Qwen3MoeConfig(**_GATED, **_MOE, head_dim=32, mlp_only_layers=[0]),
}
# transformers merges three tensors of the disk into one parameter of its linear attention.
MERGED = OlmoHybridConfig(**_GATED, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=32)


def write_model(config: PretrainedConfig, directory: Path, *, dtype: torch.dtype = torch.bfloat16, **save: object) -> Path:
    """Random weights; biases and norms get random values too, so that a loader that forgets them is caught."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, **save)
    return directory


@pytest.fixture(scope="session")
def zoo_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of one architecture's tiny model, written once: those of ZOO and of MIXTURES, gpt2 and merged."""
    configs = {**ZOO, **MIXTURES, "gpt2": GPT2, "merged": MERGED}
    written: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in written:
            written[name] = write_model(configs[name], tmp_path_factory.mktemp(name))
        return written[name]

    return directory


@pytest.fixture
def write_tiny() -> Callable[..., Path]:
    """`write_model`, for tests that need a model of their own."""
    return write_model
