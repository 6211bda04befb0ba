"""Where an inventory comes from: a configuration, the weight files' own index, or a bare parameter count.

    read_inventory("7e9")                     a count: nothing but bytes follows from it
    read_inventory("llama-3-70b")             published shapes (`models/shapes.toml`)
    read_inventory("path/to/model")           config.json, checked against the safetensors headers or the index where they are there
    read_inventory("path/to/config.json")     the configuration alone
    read_inventory("Qwen/Qwen2.5-7B")         the hub's config.json and index; no weights are downloaded

Architectures of `architectures.toml` need neither torch nor transformers. For the others the tensors' names and shapes come from the
headers of the weight files when they are there, or from transformers' model on the `meta` device.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from fewbit.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError, UsageError
from fewbit.models.architectures import architecture_names, inventory_of_fields
from fewbit.models.inventory import Inventory, KVLayers, TensorClass
from fewbit.models.reference import reference_model_dir
from fewbit.models.tensor_roles import classes_of_tensors

__all__ = ["bare_inventory", "parse_count", "read_inventory"]

_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmbt]?)", re.IGNORECASE)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_LEAST, _MOST = 1e5, 1e14


def parse_count(text: str) -> float | None:
    """The number that `7e9`, `7B`, `0.5b` or `7000000000` is; None when it is none, and a name or a path is meant.

    Raises:
        UsageError: a number that no language model has.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        return None
    value = float(match[1]) * _UNITS[match[2].lower()]
    if not _LEAST <= value <= _MOST:
        raise UsageError(f"'{text}' is no number of parameters", "write for example 7e9 or 7B")
    return value


def bare_inventory(parameters: float, *, layers: int = 0, kv_heads: int = 0, head_dim: int = 0) -> Inventory:
    """What follows from a parameter count: bytes; and from the geometry of the cache, if it is given, what tokens take.

    Args:
        parameters: all of them, taken to be in linears.
        layers, kv_heads, head_dim: all three, or none.

    Raises:
        UsageError: some of the three, or negative ones.
    """
    geometry = (layers, kv_heads, head_dim)
    if min(geometry) < 0 or (any(geometry) and not all(geometry)):
        raise UsageError("layers, heads of keys and values, and head dimension go together", "give all three as positive numbers")
    notes = ["a parameter count says nothing of embedding, head and norms: all parameters are taken to be in linears"]
    if not layers:
        notes.append("the KV cache is unknown: give --layers, --kv-heads and --head-dim, or a model")
    return Inventory(
        name=f"{parameters:.12g} parameters",
        model_type="",
        tensors=(TensorClass("parameters", "other", (round(parameters),), 1, linear=True),),
        layers=layers,
        kv=(KVLayers(layers, kv_heads, head_dim),) if layers else (),
        source="parameter count",
        notes=tuple(notes),
    )


def read_inventory(model: str | Path | None = None, *, layers: int = 0, kv_heads: int = 0, head_dim: int = 0) -> Inventory:
    """The inventory of a model.

    Args:
        model: see the module's header; the bundled reference model when None.
        layers, kv_heads, head_dim: the cache's geometry, for a bare count only.

    Raises:
        UsageError: a count that cannot be meant, or a geometry beside a model that has its own.
        ModelNotFoundError: no such directory, configuration or name.
        UnsupportedModelError: an unknown architecture, or sizes that contradict each other.
        CheckpointError: config.json, the index or a header is damaged.
    """
    count = parse_count(model) if isinstance(model, str) and not Path(model).exists() else None
    if count is not None:
        return bare_inventory(count, layers=layers, kv_heads=kv_heads, head_dim=head_dim)
    if layers or kv_heads or head_dim:
        raise UsageError("layers and heads follow from the model's configuration", "give them with a bare parameter count only")
    if model is None:
        return _of_path(reference_model_dir(), "fewbit's reference model")
    if Path(model).exists():
        return _of_path(Path(model), str(model))
    name = str(model).removeprefix("shapes:").lower()
    published = tomllib.loads(files("fewbit.models").joinpath("shapes.toml").read_text(encoding="utf-8"))
    if name in published:
        return _of_fields({"model_type": published[name]["model_type"], **published[name]["config"]}, name)
    if _HUB_ID.fullmatch(str(model)):
        return _of_hub(str(model))
    near = [known for known in published if name and (name in known or known in name)]
    remedy = (
        f"did you mean {', '.join(near)}?"
        if near
        else "name a directory, a hub id, a count like 7e9, or published shapes (docs/reference.md)"
    )
    raise ModelNotFoundError(f"'{model}' is no directory, no number of parameters and no name of published shapes", remedy)


def _of_hub(hub_id: str) -> Inventory:
    """config.json and the index; not the weights."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        config = Path(hf_hub_download(hub_id, "config.json"))
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"'{hub_id}' is neither a local directory nor a model on the hub", "check the spelling") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(
            f"'{hub_id}' is no local directory, and the hub cannot be reached ({type(error).__name__})",
            "name a directory or a config.json, or connect to the network",
        ) from error
    index: dict[str, Any] = {}
    with suppress(EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError):  # a small model has no index
        index = _json(Path(hf_hub_download(hub_id, _INDEX)))
    return _with_index(_of_fields(_json(config), hub_id), index)


def _json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{file}' cannot be read: {str(error)[:160]}", "download it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"'{file}' holds no JSON object", "download it again")
    return document


def _of_path(path: Path, name: str) -> Inventory:
    if path.is_file() and path.suffix != ".json":
        raise ModelNotFoundError(f"'{path}' is neither a model directory nor a config.json", "name one of them")
    directory, config = (path, path / "config.json") if path.is_dir() else (path.parent, path)
    if not config.is_file():
        raise ModelNotFoundError(f"no config.json in '{directory}'", "name a directory that save_pretrained() or the hub has made")
    fields = _json(config)
    headers = _headers(directory) if path.is_dir() else {}
    index = _json(directory / _INDEX) if path.is_dir() and (directory / _INDEX).is_file() else {}
    inventory = _of_fields(fields, name, headers)
    return _with_headers(inventory, headers) if headers else _with_index(inventory, index)


def _headers(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every stored tensor; empty unless all shards are there."""
    shards = sorted(directory.glob("*.safetensors"))
    if (directory / _INDEX).is_file():
        wanted = set(_json(directory / _INDEX).get("weight_map", {}).values())
        if wanted - {shard.name for shard in shards}:
            return {}
        shards = [shard for shard in shards if shard.name in wanted]
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in shards:
        found |= _header(shard)
    return found


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    remedy = "download or copy the file again"
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER:
                raise CheckpointError(f"the header of '{file}' claims {length:,} bytes", remedy)
            document = json.loads(stream.read(length))
        entries = {name: (str(e["dtype"]), tuple(int(n) for n in e["shape"])) for name, e in document.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the header of '{file}' is damaged: {type(error).__name__}", remedy) from error
    if any(n < 0 for _, shape in entries.values() for n in shape):
        raise CheckpointError(f"the header of '{file}' has a negative size", remedy)
    return entries


def _of_fields(fields: Mapping[str, Any], name: str, headers: Mapping[str, tuple[str, tuple[int, ...]]] | None = None) -> Inventory:
    """From the table; else from the weight files; else from transformers."""
    if not isinstance(fields.get("model_type"), str):
        raise UnsupportedModelError(f"the configuration of '{name}' has no model_type", "repair config.json")
    quantized = _quantized_as(fields)
    inventory = inventory_of_fields(fields, name)
    if inventory is None:
        shapes = {tensor: shape for tensor, (_, shape) in headers.items()} if headers and not quantized else None
        inventory = _of_transformers(fields, name, shapes)
    return replace(inventory, quantized_as=quantized)


def _quantized_as(fields: Mapping[str, Any]) -> str:
    quantization = fields.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return ""
    bits = quantization.get("bits") or quantization.get("w_bit")
    return f"{quantization.get('quant_method', 'unknown layout')}{f', {bits} bit' if bits else ''}"


def _of_transformers(fields: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]] | None) -> Inventory:
    """An architecture that the table does not have, built without weights unless the files say what its tensors are."""
    from transformers import CONFIG_MAPPING

    from fewbit.models.accounting import kv_shape
    from fewbit.models.structure import build_empty_model

    kind = fields["model_type"]
    if kind not in CONFIG_MAPPING:
        known = ", ".join(architecture_names())
        raise UnsupportedModelError(
            f"the architecture '{kind}' of '{name}' is unknown to fewbit and to transformers", f"fewbit's own table has {known}"
        )
    try:
        config = CONFIG_MAPPING[kind].from_dict(dict(fields))
    except Exception as error:  # a configuration class may raise anything on values that it does not expect
        raise UnsupportedModelError(
            f"the configuration of '{name}' does not fit '{kind}': {str(error)[:160]}", "repair config.json"
        ) from error
    text = config.get_text_config(decoder=True)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if shapes is None:
        model = build_empty_model(config)
        left_out = set(model.all_tied_weights_keys)
        shapes = {tensor: tuple(p.shape) for tensor, p in model.named_parameters() if tensor not in left_out}
    layers = int(text.num_hidden_layers)
    experts = next(
        (int(getattr(text, key)) for key in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(text, key, None)), 1
    )
    share = min(1.0, int(getattr(text, "num_experts_per_tok", None) or 1) / experts)
    tensors, extra = classes_of_tensors(shapes, layers=layers, expert_share=share)
    notes: list[str] = []
    try:
        kv = _kv_of_types(text, *kv_shape(config))
    except (AttributeError, TypeError, ZeroDivisionError):
        kv = ()
        notes.append("the configuration does not say what attention caches: memory of the KV cache is unknown")
    types = getattr(text, "layer_types", None) or ()
    if any(kind not in ("full_attention", "sliding_attention") for kind in types):
        notes.append("layers without attention keep a state of constant size per sequence, which is not counted")
    return Inventory(
        name=name,
        model_type=kind,
        tensors=tensors,
        extra=extra,
        layers=layers,
        hidden_size=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        heads=int(text.num_attention_heads),
        kv=kv,
        tied=tied,
        max_context=getattr(text, "max_position_embeddings", None),
        notes=tuple(notes),
    )


def _kv_of_types(text: Any, layers: int, kv_heads: int, head_dim: int) -> tuple[KVLayers, ...]:
    types = getattr(text, "layer_types", None) or ["full_attention"] * layers
    window = getattr(text, "sliding_window", None) or None
    sliding = sum(kind == "sliding_attention" for kind in types) if window else 0
    full = sum(kind in ("full_attention", "sliding_attention", "attention") for kind in types) - sliding
    return tuple(KVLayers(n, kv_heads, head_dim, 2, w) for n, w in ((sliding, window), (full, None)) if n)


def _with_headers(inventory: Inventory, headers: Mapping[str, tuple[str, tuple[int, ...]]]) -> Inventory:
    """Compared with what the files hold."""
    dtypes: dict[str, int] = {}
    stored_bytes = 0
    for dtype, shape in headers.values():
        dtypes[dtype] = dtypes.get(dtype, 0) + math.prod(shape)
        stored_bytes += math.prod(shape) * _BYTES.get(dtype, 1)
    notes = list(inventory.notes)
    stored = sum(dtypes.values())
    head = inventory.vocabulary * inventory.hidden_size
    allowed = {inventory.parameters, inventory.parameters + inventory.extra_parameters}
    if inventory.tied and stored == inventory.parameters + head:
        notes.append("the files hold the tied output head a second time")
    elif not inventory.quantized_as and stored not in allowed:
        notes.append(
            f"the configuration gives {inventory.parameters:,} parameters and the weight files hold {stored:,}: they are of different "
            "models, or a shard is missing or stale"
        )
    return replace(inventory, stored_bytes=stored_bytes, stored_dtypes=dtypes, notes=tuple(notes), source="configuration and tensor index")


def _with_index(inventory: Inventory, index: Mapping[str, Any]) -> Inventory:
    """Compared with the index alone: total bytes, and the blocks that its names have."""
    if not index:
        return inventory
    metadata, names = index.get("metadata"), index.get("weight_map")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    notes = list(inventory.notes)
    if isinstance(names, Mapping) and inventory.layers:
        blocks = {int(m[1]) for name in names if (m := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}")) and "vision" not in name}
        if blocks and max(blocks) + 1 < inventory.layers:
            notes.append(f"the configuration has {inventory.layers} blocks and the index names {max(blocks) + 1}")
    if isinstance(total, int | float) and not inventory.quantized_as:
        sizes = {size * (inventory.parameters + more) for size in (2, 4) for more in (0, inventory.extra_parameters)}
        if all(abs(total - size) > 0.001 * size for size in sizes):
            notes.append(f"the index says {total:,.0f} bytes, which {inventory.parameters:,} parameters take in neither 16 nor 32 bit")
    source = "configuration and tensor index"
    return replace(inventory, stored_bytes=int(total) if isinstance(total, int | float) else None, notes=tuple(notes), source=source)
