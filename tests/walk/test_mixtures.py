"""Mixtures of experts in the walk: every expert is found, calibrated and rounded, also one that no token reaches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from fewbit.models.experts import ExpertList, expert_lists, unfuse_experts
from fewbit.walk.capture import find_groups, stages

_SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    "initializer_range": 0.2,
}
_MOE = {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**_MOE, shared_expert_intermediate_size=64, decoder_sparse_step=1),
    "qwen3_moe": Qwen3MoeConfig(**_MOE, head_dim=8),
}


def _mixture(windows: list[list[int]]) -> tuple[nn.Module, ExpertList, list[tuple[torch.Tensor, ...]]]:
    """A mixture, and for each window hidden states routed in turns to the experts that the window lists."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"], dtype=torch.float32).eval().requires_grad_(False)
    unfuse_experts(model)
    mixture = next(experts for _, experts in expert_lists(model))
    calls = []
    for experts in windows:
        index = torch.tensor([[experts[t % len(experts)], experts[(t + 1) % len(experts)]] for t in range(32)])
        calls.append((torch.randn(32, 32), index, torch.full((32, 2), 0.5)))
    return model, mixture, calls


@pytest.mark.parametrize("calibrating", [False, True])
def test_groups_of_experts_wherever_their_tokens_come_first(calibrating: bool) -> None:
    _, mixture, calls = _mixture([[0, 2], [1, 2]])
    if calibrating:
        mixture.start_calibration()
    linears = {name: module for name, module in mixture.named_modules() if isinstance(module, nn.Linear)}
    groups = find_groups({f"experts.{name}": linear for name, linear in linears.items()}, lambda window: mixture(*calls[window]), 2)
    expected = {(f"experts.{e}.gate_proj", f"experts.{e}.up_proj") for e in range(4)} | {(f"experts.{e}.down_proj",) for e in range(4)}
    assert {group.names for group in groups} == expected
    assert [len(stage) for stage in stages(groups)] == [4, 4]
    assert stages(groups)[0][0].names[0].endswith("gate_proj")
