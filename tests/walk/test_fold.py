"""Every row of the family table, proven: random scales folded at every link leave a random model's logits as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fewbit.errors import FormatError, UnsupportedModelError
from fewbit.models.families import FAMILIES
from fewbit.models.links import Link, block_links, fused_groups
from fewbit.walk.fold import channel_count, column_scale, fold_scale, representable_scale

_SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_OWN: dict[str, dict[str, object]] = {
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "phi": {"head_dim": None},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "num_key_value_heads": None, "head_dim": None},
    "phi3": {"head_dim": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "num_key_value_heads": None, "head_dim": None},
    "mixtral": {**_EXPERTS, "moe_intermediate_size": None},
    "qwen3_moe": {**_EXPERTS, "mlp_only_layers": [1]},
    "qwen2_moe": {**_EXPERTS, "mlp_only_layers": [1], "shared_expert_intermediate_size": 40, "head_dim": None},
}
VARIANTS: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in FAMILIES if name != "gpt2"),  # GPT-2 has Conv1D, which nothing folds into
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("opt", {"activation_function": "gelu"}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"enable_bias": False}),
]
LINKS = {"llama": 4, "phi3": 4, "gemma2": 4, "gpt_neox": 3, "phi": 2, "opt": 4, "mixtral": 4, "qwen3_moe": 4, "qwen2_moe": 5}


def build(model_type: str, changes: dict[str, object]) -> PreTrainedModel:
    """A tiny random model in float64, norms and biases random as well."""
    fields = {key: value for key, value in {**_SMALL, **_OWN.get(model_type, {}), **changes}.items() if value is not None}
    config: PretrainedConfig = AutoConfig.for_model(model_type, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = (
            AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").double().eval()
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_submodule(FAMILIES[model.config.model_type].blocks).children())


def links_of(model: PreTrainedModel, block: nn.Module) -> list[Link]:
    return block_links(FAMILIES[model.config.model_type], model.config, block)


def random_scale(block: nn.Module, link: Link, seed: int) -> torch.Tensor:
    """[channels] between 1/20 and 20, for each expert its own."""
    count = channel_count(block, link)
    experts = block.get_parameter(link.producer).shape[:1] if link.kind == "experts" else ()
    shape = (*experts, count)
    return torch.exp(6 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 3)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(1, 41).view(2, 20)
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else ",".join(value))
def test_folding_random_scales_everywhere_leaves_the_logits(model_type: str, changes: dict[str, object]) -> None:
    model = build(model_type, changes)
    before, folded = logits(model), 0
    for position, block in enumerate(blocks_of(model)):
        for link in links_of(model, block):
            fold_scale(block, link, random_scale(block, link, seed=10 * position + folded))
            folded += 1
    after = logits(model)
    # Folding computes in float32, so a weight moves by up to 2**-24 of itself; outputs of an uncompensated scale move by a factor.
    assert float((after - before).norm() / before.norm()) < 1e-5
    expected = {"do_layer_norm_before": 4, "activation_function": 6}.get(next(iter(changes), ""), 0)
    assert folded == (expected or 2 * LINKS.get(model_type, 4) - (model_type == "qwen2_moe"))


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe", "phi3", "gpt_neox"])
def test_every_link_matters(model_type: str) -> None:
    """Half a fold changes the logits: the test above could not pass by chance."""
    model = build(model_type, {})
    before = logits(model)
    for position in range(2):
        for index, link in enumerate(links_of(model, blocks_of(model)[position])):
            broken = copy.deepcopy(model)
            block = blocks_of(broken)[position]
            fold_scale(block, link, random_scale(block, link, seed=index))
            for name, parameter in block.named_parameters():
                if any(name.startswith(reader) for reader in link.readers):
                    parameter.data = dict(blocks_of(model)[position].named_parameters())[name].data
            assert float((logits(broken) - before).norm() / before.norm()) > 1e-3, link


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "gpt2"])
def test_the_readers_of_a_norm_are_all_its_readers(model_type: str) -> None:
    """What a norm's output tensor really reaches, seen in a forward pass, is what the table says."""
    model = build(model_type, {})
    for block in blocks_of(model):
        for link in links_of(model, block):
            if link.kind != "norm":
                continue
            produced: list[torch.Tensor] = []
            reached: set[str] = set()
            handles = [block.get_submodule(link.producer).register_forward_hook(lambda m, a, out, p=produced: p.append(out))]
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear | Conv1D) or type(module).__name__.endswith(("Router", "Experts")):
                    handles.append(
                        module.register_forward_pre_hook(
                            lambda m, a, n=name, p=produced, r=reached: (
                                r.add(n) if any(a[0].untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in p) else None
                            )
                        )
                    )
            logits(model)
            for handle in handles:
                handle.remove()
            stacked = {name.removesuffix(".gate_up_proj") if "experts" in name and "shared" not in name else name for name in link.readers}
            assert reached == stacked


def test_fused_groups_share_their_input_and_lie_in_the_block() -> None:
    model = build("qwen2_moe", {})
    sparse, dense = (fused_groups(FAMILIES["qwen2_moe"], block) for block in blocks_of(model))
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert sparse == [attention, ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")]
    assert dense == [attention, ("mlp.gate_proj", "mlp.up_proj")]
    assert fused_groups(FAMILIES["phi3"], blocks_of(build("phi3", {}))[0]) == []


def test_experts_that_are_modules_are_linked_one_by_one() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 24), nn.Linear(32, 24), nn.Linear(24, 32)

    model = build("mixtral", {})
    block = blocks_of(model)[0]
    block.mlp.experts = nn.ModuleList(Expert() for _ in range(3))
    links = links_of(model, block)
    norm = next(link for link in links if link.producer == "post_attention_layernorm")
    assert norm.readers == ("mlp.gate", *(f"mlp.experts.{e}.gate_proj" for e in range(3)), *(f"mlp.experts.{e}.up_proj" for e in range(3)))
    assert [(link.producer, link.readers) for link in links[-3:]] == [
        (f"mlp.experts.{e}.up_proj", (f"mlp.experts.{e}.down_proj",)) for e in range(3)
    ]
    assert ("mlp.experts.2.gate_proj", "mlp.experts.2.up_proj") in fused_groups(FAMILIES["mixtral"], block)


def test_a_scale_for_columns_is_taken_where_heads_share_channels() -> None:
    model = build("llama", {})
    block = blocks_of(model)[0]
    link = next(link for link in links_of(model, block) if link.kind == "heads")
    before, scale = logits(model), random_scale(block, link, seed=3)
    assert scale.shape == (32,)
    columns = column_scale(block, link, scale)
    assert columns.shape == (64,)
    assert torch.equal(columns[:16], columns[16:32]) and torch.equal(columns[:16], scale[:16])
    fold_scale(block, link, columns)
    assert float((logits(model) - before).norm() / before.norm()) < 1e-5


def test_representable_scales_only_move_norms() -> None:
    model = build("gemma2", {})
    block = blocks_of(model)[0]
    for link in links_of(model, block):
        wanted = random_scale(block, link, seed=1)
        scale = representable_scale(block, link, wanted, torch.bfloat16)
        if link.kind != "norm":
            assert torch.equal(scale, wanted)
            continue
        norm = block.get_submodule(link.producer)
        norm.weight.data = norm.weight.data.bfloat16().double()
        fold_scale(block, link, scale)
        torch.testing.assert_close(norm.weight.bfloat16().double(), norm.weight.data, rtol=1e-5, atol=1e-6)


def test_refusals() -> None:
    model = build("gpt2", {})
    block = blocks_of(model)[0]
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(UnsupportedModelError, match="Conv1D"):
        fold_scale(block, links_of(model, block)[0], torch.ones(32))
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())
    model = build("llama", {})
    block = blocks_of(model)[0]
    with pytest.raises(FormatError):
        fold_scale(block, links_of(model, block)[0], torch.ones(31))
