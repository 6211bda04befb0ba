"""Experts as linears compute what transformers computes; starved ones are shown other tokens without changing the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from fewbit.models.experts import ExpertList, expert_lists, is_router, same_routing, unfuse_experts

_SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
_MOE: dict[str, Any] = {**_SIZES, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CONFIGS = {
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=6, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**_MOE, shared_expert_intermediate_size=64, decoder_sparse_step=1),
    "qwen3_moe": Qwen3MoeConfig(**_MOE, mlp_only_layers=[0]),
}


def _model(config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def _tokens(length: int = 40) -> torch.Tensor:
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits_names_and_memory(name: str) -> None:
    model = _model(CONFIGS[name])
    expected = model(_tokens()).logits
    stacked = {n: p.data_ptr() for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj")}
    replaced = unfuse_experts(model)
    assert [f"{module}.gate_up_proj" for module in replaced] == list(stacked)
    assert len(replaced) == (1 if name == "qwen3_moe" else 2)
    torch.testing.assert_close(model(_tokens()).logits, expected, rtol=1e-5, atol=1e-6)
    first = model.get_submodule(replaced[0])
    assert first.get_submodule("0.gate_proj").weight.data_ptr() == stacked[f"{replaced[0]}.gate_up_proj"]
    linears = [n for n, m in first.named_modules() if isinstance(m, nn.Linear)]
    assert linears[:3] == ["0.gate_proj", "0.up_proj", "0.down_proj"] and len(linears) == 18
    assert unfuse_experts(model) == []


def test_other_equations_are_left_alone() -> None:
    config = GptOssConfig(**{**_SIZES, "head_dim": 8, "num_hidden_layers": 1}, num_local_experts=4, num_experts_per_tok=2)
    assert unfuse_experts(_model(config)) == []  # biases, interleaved and clamped gates
    assert unfuse_experts(_model(LlamaConfig(**_SIZES))) == []


def test_on_meta() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"], dtype=torch.bfloat16)
    unfuse_experts(model)
    weight = model.get_parameter("model.layers.1.mlp.experts.5.down_proj.weight")
    assert weight.is_meta and weight.dtype == torch.bfloat16 and tuple(weight.shape) == (32, 64)


def _mixture(experts: int = 4, columns: int = 16) -> ExpertList:
    model = _model(MixtralConfig(**{**_SIZES, "hidden_size": columns, "num_hidden_layers": 1}, num_local_experts=experts))
    unfuse_experts(model)
    return next(module for _, module in expert_lists(model))


def _routing(tokens: int, experts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two experts per token, in turns."""
    first = torch.tensor([experts[t % len(experts)] for t in range(tokens)])
    second = torch.tensor([experts[(t + 1) % len(experts)] for t in range(tokens)])
    return torch.stack([first, second], dim=1), torch.full((tokens, 2), 0.5)


def test_never_routed_expert_is_calibrated_and_changes_nothing() -> None:
    mixture = _mixture()
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(2))
    index, weights = _routing(400, [0, 1, 3])
    plain = mixture(x, index, weights)
    rows: dict[str, list[int]] = {}
    for name, linear in mixture.named_modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_pre_hook(lambda _, args, name=name: rows.setdefault(name, []).append(len(args[0])))

    mixture(x, index, weights)
    assert not any(name.startswith("2.") for name in rows)
    rows.clear()
    mixture.start_calibration()
    mixture(x, index, weights)
    assert rows["2.gate_proj"] == rows["2.down_proj"] == [0] and list(rows)[:3] == ["0.gate_proj", "0.up_proj", "0.down_proj"]
    coverage = mixture.cover()
    assert sum(coverage.tokens) == 800 and coverage.tokens[2] == 0
    assert coverage.starved == (2,) and coverage.required == 64 and coverage.sampled == 200  # as many as an expert sees on average
    rows.clear()
    shown = mixture(x, index, weights)
    assert rows["2.gate_proj"] == rows["2.up_proj"] == rows["2.down_proj"] == [200]
    assert rows["0.gate_proj"] == [coverage.tokens[0]]
    assert torch.equal(shown, plain)
    mixture.stop_calibration()
    rows.clear()
    mixture(x, index, weights)
    assert not any(name.startswith("2.") for name in rows)


def test_rare_expert_sees_its_own_tokens_once() -> None:
    mixture = _mixture()
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(3))
    index, weights = _routing(100, [0, 1])
    index[10, 1] = 2
    plain = mixture(x, index, weights)
    seen: list[torch.Tensor] = []
    mixture.get_submodule("2.up_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mixture.start_calibration()
    mixture(x, index, weights)
    assert mixture.cover().starved == (2, 3)
    shown = mixture(x, index, weights)
    assert torch.equal(seen[0], x[10:11])
    assert torch.equal(seen[1][0], x[10])  # its own token comes first
    assert len(seen[1]) == 100 and len(seen[1].unique(dim=0)) == 100  # fewer than 64 others would be too few: all are shown
    torch.testing.assert_close(shown, plain, rtol=0, atol=1e-6)


def test_two_runs_with_the_same_routing_see_the_same_tokens() -> None:
    mixture = _mixture()
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(4))
    one, weights = _routing(100, [0, 1, 3])
    other, _ = _routing(100, [2, 3])
    seen: list[torch.Tensor] = []
    mixture.get_submodule("0.gate_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mixture.start_calibration()
    mixture(x, one, weights)
    with same_routing(mixture):
        mixture(x + 1, other, weights)
    mixture(x, other, weights)
    assert torch.equal(seen[0] + 1, seen[1]) and len(seen[2]) == 0


def test_an_index_beyond_the_experts_is_none() -> None:
    mixture = _mixture()
    x = torch.randn(8, 16)
    index, weights = _routing(8, [0, 1])
    index[:, 1] = 4
    assert torch.equal(mixture(x, index, weights), mixture(x, index, torch.tensor([[0.5, 9.0]]).expand(8, 2)))


def test_routers_by_name() -> None:
    assert is_router("model.layers.0.mlp.gate") and is_router("model.layers.0.block_sparse_moe.gate")
    assert is_router("model.layers.3.mlp.shared_expert_gate")
    assert not is_router("model.layers.0.mlp.gate_proj") and not is_router("model.layers.0.mlp.experts.0.gate_proj")
