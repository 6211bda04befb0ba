"""Model families as rows of a table: what the modules of each architecture are called and what they are for.

`families.toml` beside this file holds the rows by transformers' `model_type`; there is no if-chain over class names. A model that
is not in the table is still classified, by the names that most architectures share: what such a guess cannot tell it calls `rest`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

__all__ = ["FAMILIES", "Family", "OperatorClass", "get_family", "operator_class"]

OperatorClass = Literal["ffn", "attention_projection", "attention", "lm_head", "rest"]


@dataclass(frozen=True)
class Family:
    """Where things are in the models of one `model_type`. Names are relative to a block unless said otherwise.

    Attributes:
        model_type: transformers' name of the architecture. blocks: dotted name of the list of blocks, from the model's root.
        embeddings, final_norm, lm_head: dotted names from the root. attention: the last part of the module that computes attention,
        projections included. attention_projections, ffn_projections: the linears' names, their last part, or the last two where the
        last alone is not unique. norms: norm to all the linears that read its output. value_pairs: (producer, consumer): rows of the
        producer reach columns of the consumer through a product with the same channel only, so a channel can
            be scaled up in one and down in the other. A fused gate_up_proj has the rows meant last.
        head_pairs: the same through attention, values to the output projection. fused: linears that a runtime joins into one.
        packed_values: which rows of a fused projection of queries, keys and values are the values: the `last`, or the last of each head
            (`per_head`). needs: by the name of a field above, what the configuration must say for it to hold.
        norm_gain_offset: the norm multiplies by `offset + weight` (Gemma: 1).
        experts: the module that holds a mixture's experts, stacked by transformers and a list in fewbit; empty for dense models.
        sparse: what `norms`, `value_pairs` and `fused` are in blocks that have such a module.
    """

    model_type: str
    blocks: str
    embeddings: str
    final_norm: str
    lm_head: str
    attention: tuple[str, ...]
    attention_projections: tuple[str, ...]
    ffn_projections: tuple[str, ...]
    norms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    value_pairs: tuple[tuple[str, str], ...] = ()
    head_pairs: tuple[tuple[str, str], ...] = ()
    fused: tuple[tuple[str, ...], ...] = ()
    packed_values: Literal["last", "per_head"] = "last"
    needs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    norm_gain_offset: float = 0.0
    experts: str = ""
    sparse: Family | None = None


def _row(name: str, table: Mapping[str, Any]) -> dict[str, Any]:
    row = dict(table[name])
    parent = row.pop("like", None)
    return row if parent is None else {**_row(parent, table), **row}


def _family(model_type: str, row: Mapping[str, Any]) -> Family:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    fields["norms"] = {norm: tuple(linears) for norm, linears in row["norms"].items()}
    for key in ("value_pairs", "head_pairs", "fused"):
        fields[key] = tuple(tuple(names) for names in row[key])
    sparse = fields.pop("sparse", None)
    if sparse is not None:
        fields["sparse"] = _family(model_type, {**{key: value for key, value in row.items() if key != "sparse"}, **sparse})
    return Family(model_type=model_type, **fields)


def _read() -> dict[str, Family]:
    table = tomllib.loads(files("fewbit.models").joinpath("families.toml").read_text(encoding="utf-8"))
    return {name: _family(name, _row(name, table)) for name in table}


FAMILIES: Mapping[str, Family] = _read()

# What most architectures call things; for those that the table does not know.
_GENERIC = Family(
    model_type="",
    blocks="model.layers",
    embeddings="model.embed_tokens",
    final_norm="model.norm",
    lm_head="lm_head",
    attention=("self_attn", "self_attention", "attention", "attn"),
    attention_projections=(
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack"),
        *(
            "q_a_proj",
            "q_b_proj",
            "kv_a_proj_with_mqa",
            "kv_b_proj",
            "self_attn.dense",
            "self_attention.dense",
            "attention.dense",
            "attn.c_proj",
        ),
    ),
    ffn_projections=(
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "fc_in", "fc_out", "c_fc", "mlp.c_proj"),
        *("dense_h_to_4h", "dense_4h_to_h", "w1", "w2", "w3", "experts"),
    ),
)


def get_family(model_type: str) -> Family | None:
    """The family's row; None when the table does not know it."""
    return FAMILIES.get(model_type)


def operator_class(module_name: str, model_type: str) -> OperatorClass:
    """What a module's time counts as.

    Args:
        module_name: dotted, from the root, for example `model.layers.0.mlp.up_proj`. A block's attention module as a whole is
        `attention`: what is left of its time
            after its projections is attention itself.
        model_type: transformers' name of the architecture.
    """
    family = FAMILIES.get(model_type, _GENERIC)
    if module_name == family.lm_head:
        return "lm_head"
    if _ends_with_one_of(module_name, family.attention_projections):
        return "attention_projection"
    if _ends_with_one_of(module_name, family.ffn_projections):
        return "ffn"
    if _ends_with_one_of(module_name, family.attention):
        return "attention"
    return "rest"


def _ends_with_one_of(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in endings)
