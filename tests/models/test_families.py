"""The family table against the modules that transformers really builds."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from fewbit.models.experts import ExpertList
from fewbit.models.families import FAMILIES, get_family, operator_class
from fewbit.models.links import block_family, block_links
from fewbit.models.structure import build_empty_model


def tiny_config(model_type: str) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.for_model(model_type)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_name_of_the_table_exists(model_type: str) -> None:
    family = FAMILIES[model_type]
    model = build_empty_model(tiny_config(model_type))
    for path in (family.embeddings, family.final_norm, family.lm_head):
        model.get_submodule(path)
    block = next(model.get_submodule(family.blocks).children())
    row = block_family(family, block)
    for norm, linears in row.norms.items():
        width = block.get_submodule(norm).weight.shape[0]
        for name in linears:
            if "*" not in name:
                linear = block.get_submodule(name)
                assert width == linear.weight.shape[0 if isinstance(linear, Conv1D) else 1]
    for producer, consumer in (*row.value_pairs, *row.head_pairs):
        if "*" not in producer:
            block.get_submodule(producer)
            block.get_submodule(consumer)
    for group in row.fused:
        assert len({block.get_submodule(name).in_features for name in group if "*" not in name}) <= 1
    assert len(block_links(family, model.config, block)) >= len(row.norms)
    if family.experts:
        assert isinstance(block.get_submodule(family.experts), ExpertList)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_linear_is_classified(model_type: str) -> None:
    model = build_empty_model(tiny_config(model_type))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            expected = {
                "lm_head": "lm_head",
                "self_attn": "attention_projection",
                "attention": "attention_projection",
                "attn": "attention_projection",
            }
            parts = name.split(".")
            known = next((expected[part] for part in parts if part in expected), "rest" if parts[-1] == "shared_expert_gate" else "ffn")
            assert operator_class(name, model_type) == known, name
    counts = [operator_class(name, model_type) for name, _ in model.named_modules()]
    assert counts.count("attention") == 2
    assert counts.count("lm_head") == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", "attention_projection"),
        ("transformer.blocks.3.attn.Wqkv", "attention_projection"),
        ("model.layers.3.mlp.down_proj", "ffn"),
        ("model.layers.3.mlp.experts", "ffn"),
        ("model.layers.3.self_attn", "attention"),
        ("lm_head", "lm_head"),
        ("model.layers.3.input_layernorm", "rest"),
        ("model.layers.3.mlp", "rest"),
        ("", "rest"),
    ],
)
def test_unknown_architectures_are_classified_by_common_names(name: str, expected: str) -> None:
    assert get_family("no-such-model") is None
    assert operator_class(name, "no-such-model") == expected
