"""The rows of `architectures.toml`: an inventory from a configuration as it stands in config.json, without torch and transformers.

The names and sizes of an architecture's tensors are data; this file only multiplies them out. Architectures that the table does not have
are built by transformers on its `meta` device instead (`models.inventory_sources`), which is as exact and takes seconds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, cast

from fewbit.errors import UnsupportedModelError
from fewbit.models.expressions import evaluate
from fewbit.models.inventory import Inventory, KVLayers, Role, TensorClass

__all__ = ["architecture_names", "inventory_of_fields"]

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_LARGEST = 1 << 31


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(files("fewbit.models").joinpath("architectures.toml").read_text(encoding="utf-8"))


def architecture_names() -> list[str]:
    """The model types that the table has."""
    return [name for name in _table() if name not in ("part", "siglip_vision_model")]


def _row(name: str) -> dict[str, Any]:
    row = dict(_table()[name])
    parent = row.pop("like", None)
    return row if parent is None else {**_row(parent), **row}


def inventory_of_fields(config: Mapping[str, Any], name: str = "") -> Inventory | None:
    """The inventory of a configuration.

    Args:
        config: the fields of config.json.
        name: what a person calls the model.

    Returns:
        None when the table does not have its `model_type`.

    Raises:
        UnsupportedModelError: a size is missing, not a positive integer, or contradicts another.
    """
    model_type = str(config.get("model_type", ""))
    if model_type not in architecture_names():
        return None
    row = _row(model_type)
    outer: tuple[TensorClass, ...] = ()
    fields = config
    if "text" in row:
        text = row["text"]
        fields = config.get("text_config") or {}
        nested = {field: config.get(field) or {} for _, _, field in row["nested"]}
        names = _names(_row(text), fields, text)
        for prefix, table, field in row["nested"]:
            inner = _names(_row(table), nested[field], table)
            names[field.removesuffix("_config")] = inner
            outer += tuple(_decoder(_row(table), inner, f"{prefix}."))
        outer += tuple(_classes(row["outside"], names, 1, ""))
        row = _row(text)
    else:
        names = _names(row, fields, model_type)
    tied = bool(config.get("tie_word_embeddings", names["tie_word_embeddings"]))
    tensors = [c for c in _decoder(row, names, "") if not (tied and c.role == "head")]
    return Inventory(
        name=name or model_type,
        model_type=model_type,
        tensors=(*tensors, *outer),
        layers=names["layers"],
        hidden_size=names["hidden"],
        vocabulary=names["vocab"],
        heads=names["heads"],
        kv=_kv(row, names),
        tied=tied,
        max_context=names.get("max_position_embeddings") or None,
        extra=tuple(_extra(row, names)),
    )


def _names(row: Mapping[str, Any], fields: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """What the formulas' names mean."""
    names: dict[str, Any] = {**row["defaults"], **fields}
    for key in _SIZES + (("intermediate_size",) if "intermediate_size" in row["defaults"] else ()):
        value = names.get(key)
        least = 0 if row["defaults"].get(key) == 0 else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _LARGEST:
            raise UnsupportedModelError(f"the configuration of this '{model_type}' says {key} = {value!r}", "repair config.json")
    heads = names["num_attention_heads"]
    names |= {
        "hidden": names["hidden_size"],
        "inner": names.get("intermediate_size"),
        "vocab": names["vocab_size"],
        "layers": names["num_hidden_layers"],
        "heads": heads,
        "kv_heads": names.get("num_key_value_heads") or heads,
        "head_dim": names.get("head_dim") or names["hidden_size"] // heads,
    }
    if names["kv_heads"] > heads or heads % names["kv_heads"]:
        raise UnsupportedModelError(
            f"{names['kv_heads']} heads of keys and values do not divide {heads} heads of queries", "repair config.json"
        )
    if "experts" in row:
        count, per_token, inner = (names[key] for key in row["experts"])
        names |= {"experts": count, "experts_per_token": per_token, "expert_inner": inner}
        if count and not 0 < per_token <= count:
            raise UnsupportedModelError(f"{per_token} of {count} experts per token cannot be", "repair config.json")
    return names


def _blocks(row: Mapping[str, Any], names: Mapping[str, Any]) -> list[bool]:
    """For each block whether it is a sparse one."""
    rule = row.get("sparse", "0")
    return [bool(evaluate(rule, {**names, "i": i})) for i in range(names["layers"])]


def _decoder(row: Mapping[str, Any], names: Mapping[str, Any], prefix: str) -> Iterator[TensorClass]:
    sparse = _blocks(row, names)
    outside = list(_classes(row["outside"], names, 1, prefix))
    yield from (c for c in outside if c.role == "embedding")
    for kind, parts in ((False, "block"), (True, "sparse_block")):
        number = sparse.count(kind)
        if number:
            for part in row[parts]:
                tensors = _table()["part"][part]["tensors"]
                yield from _classes(tensors, names, number, f"{prefix}{row['blocks']}.*.")
    yield from (c for c in outside if c.role != "embedding")


def _classes(tensors: list[Any], names: Mapping[str, Any], number: int, prefix: str) -> Iterator[TensorClass]:
    for entry in tensors:
        options = entry[-1] if isinstance(entry[-1], dict) else {}
        name, role, *shape = entry[: len(entry) - bool(options)]
        if "if" in options and not evaluate(options["if"], names):
            continue
        sizes = tuple(_size(text, names) for text in shape)
        count = number * (_size(options["each"], names) if "each" in options else 1)
        share = float(evaluate(options["share"], names)) if "share" in options else 1.0
        linear = len(sizes) == 2 and options.get("linear", role not in ("embedding", "extra"))
        full = f"{prefix}{name}"
        yield TensorClass(full if options.get("bare") else f"{full}.weight", cast(Role, role), sizes, count, linear, share)
        if "bias" in options and evaluate(options["bias"], names):
            yield TensorClass(f"{full}.bias", cast(Role, role), sizes[:1], count, False, share)


def _size(text: str, names: Mapping[str, Any]) -> int:
    value = evaluate(text, names)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LARGEST:
        raise UnsupportedModelError(f"'{text}' is {value!r} in this configuration, which is no size", "repair config.json")
    return value


def _kv(row: Mapping[str, Any], names: Mapping[str, Any]) -> tuple[KVLayers, ...]:
    """Layers by whether a window bounds them."""
    if "latent" in row:
        return (KVLayers(names["layers"], 1, _size(row["latent"], names), tensors=1),)
    given = names.get("layer_types")
    types = given if isinstance(given, list) and len(given) == names["layers"] else None
    rule = row.get("sliding", "0")
    sliding = [
        kind == "sliding_attention" if types else bool(evaluate(rule, {**names, "i": i}))
        for i, kind in enumerate(types or [""] * names["layers"])
    ]
    window = names.get("sliding_window") or None
    counts = {True: sum(sliding) if window else 0}
    counts[False] = names["layers"] - counts[True]
    return tuple(KVLayers(n, names["kv_heads"], names["head_dim"], 2, window if slides else None) for slides, n in counts.items() if n)


def _extra(row: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[TensorClass]:
    """Blocks behind the last that guess further tokens: a sparse block, and what `extra` names beside it."""
    if not row.get("extra"):
        return
    field, part = row["extra"]
    number = int(names.get(field) or 0)
    if number:
        prefix = f"{row['blocks']}.{names['layers']}."
        for one in (*row["sparse_block"], part):
            for c in _classes(_table()["part"][one]["tensors"], names, number, prefix):
                yield TensorClass(c.name, "extra", c.shape, c.count, c.linear, c.share)
