"""Names on disk are found for every parameter, whatever transformers renames or merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from fewbit.models.experts import unfuse_experts
from fewbit.models.names import disk_names
from fewbit.models.structure import build_empty_model

_SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
_MOE: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "num_experts": 11, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**_SIZES),
    "mixtral": MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=11, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**_MOE, shared_expert_intermediate_size=64, decoder_sparse_step=1),
    "qwen3_moe": Qwen3MoeConfig(**_MOE, mlp_only_layers=[0]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_tensor_on_disk_is_one_parameter_with_the_same_values(name: str, tmp_path: Path) -> None:
    config: PretrainedConfig = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(tmp_path)
    disk = load_file(tmp_path / "model.safetensors")
    names = disk_names(build_empty_model(config), list(disk))
    assert not names.unknown and not names.merged
    unfuse_experts(model)
    parameters = dict(model.named_parameters())
    assert set(names.single) == set(parameters)
    for parameter, tensor in names.single.items():
        assert torch.equal(parameters[parameter], disk[tensor]), (parameter, tensor)


@pytest.mark.parametrize(
    ("name", "module", "prefix"),
    [
        ("mixtral", "model.layers.1.mlp.experts.10.up_proj", "model.layers.1.block_sparse_moe.experts.10.w3"),
        ("mixtral", "model.layers.1.mlp.experts.1.down_proj", "model.layers.1.block_sparse_moe.experts.1.w2"),
        ("qwen3_moe", "model.layers.1.mlp.experts.10.up_proj", "model.layers.1.mlp.experts.10.up_proj"),
        ("gpt_neox", "lm_head", "embed_out"),
    ],
)
def test_prefixes(name: str, module: str, prefix: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    assert disk_names(build_empty_model(CONFIGS[name]), list(load_file(tmp_path / "model.safetensors"))).prefix(module) == prefix


def test_what_the_model_lacks_is_unknown() -> None:
    model = build_empty_model(CONFIGS["mixtral"])
    stray = ["model.layers.0.block_sparse_moe.experts.11.w1.weight", "model.layers.0.block_sparse_moe.experts.0.w4.weight", "mtp.weight"]
    assert disk_names(model, stray).unknown == tuple(stray)
