"""What GGUF calls a model's parts: metadata fields for config.json, `blk.3.attn_q.weight` for `model.layers.3.self_attn.q_proj.weight`.

The names of tensors are the gguf library's own table. Three things are not names:

    rows of q and k     llama.cpp rotates neighbouring pairs of a head's dimensions and transformers its two halves: for the architecture
                        `llama` (not for `qwen2` and `qwen3`) the rows of the two projections are put in another order. A whole row keeps
                        its scales, so a quantized weight is put in order as well as one in high precision
    rope_freqs.weight   Llama 3's scaling of frequencies is stored as the factors it comes to; which of the published settings made them
                        is found by computing those
    config.json         GGUF has a field for what llama.cpp needs. fewbit adds the whole config.json as `fewbit.config`, which other
                        programs pass over; a file without it gets its configuration from the fields

An architecture is a row of `ARCHITECTURES`. What has no row is refused: llama.cpp's own converter knows them all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from fewbit.checkpoints.gguf_header import GgufFile
from fewbit.errors import CheckpointError, UnsupportedModelError

__all__ = [
    "ARCHITECTURES",
    "CONFIG_KEY",
    "Architecture",
    "architecture_of",
    "configuration",
    "metadata",
    "rope_factors",
    "rows_of_heads",
    "tensor_names",
]

CONFIG_KEY = "fewbit.config"
_REMEDY = "llama.cpp's convert_hf_to_gguf.py knows more architectures"


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp's.

    Attributes:
        name: as `general.architecture` says it.
        model_types: of config.json; the first is what a file without `fewbit.config` becomes.
        permuted: whether the rows of q and k are in llama.cpp's order.
    """

    name: str
    model_types: tuple[str, ...]
    permuted: bool


ARCHITECTURES = (
    Architecture("llama", ("llama", "mistral"), True),
    Architecture("qwen2", ("qwen2",), False),
    Architecture("qwen3", ("qwen3",), False),
)

# config.json's word -> GGUF's, behind the architecture's name
_FIELDS: Mapping[str, str] = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "vocab_size": "vocab_size",
}
# (factor, low frequency factor, high frequency factor, original positions) of the models that were published with Llama 3's scaling
_LLAMA3_SETTINGS = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))


def architecture_of(model_type: str) -> Architecture:
    """The row of a model type of config.json.

    Raises:
        UnsupportedModelError: there is none.
    """
    found = next((row for row in ARCHITECTURES if model_type in row.model_types), None)
    if found is None:
        known = ", ".join(kind for row in ARCHITECTURES for kind in row.model_types)
        raise UnsupportedModelError(f"fewbit writes GGUF for {known}, not for '{model_type}'", _REMEDY)
    return found


def tensor_names(architecture: Architecture, names: Sequence[str], layers: int) -> dict[str, str]:
    """GGUF's names of a model's tensors; what it has no name for is left out.

    Args:
        names: as the model in transformers has them.
    """
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(kind, layers)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    return {name: known for name, known in found.items() if known is not None}


def rows_of_heads(architecture: Architecture, name: str, rows: int, config: PretrainedConfig) -> torch.Tensor | None:
    """int64 [rows]: which of the model's rows stands in each of the file's, for q and k; None where the order is the same.

    Args:
        name: of the tensor in the model.
    """
    module = name.rpartition(".")[0].rpartition(".")[2]
    if not architecture.permuted or module not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
    if rows % (2 * heads):
        raise CheckpointError(f"'{name}' has {rows} rows, which {heads} heads do not share evenly")
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def metadata(config: PretrainedConfig, fields: Mapping[str, Any]) -> dict[str, int | float | str]:
    """The architecture's fields of a model, `general.architecture` first.

    Args:
        config: transformers' configuration.
        fields: config.json itself, kept whole.

    Raises:
        UnsupportedModelError: an architecture, or a scaling of positions, that has no row here.
    """
    architecture = architecture_of(config.model_type)
    prefix = architecture.name
    found: dict[str, int | float | str] = {"general.architecture": prefix}
    for ours, theirs in _FIELDS.items():
        found[f"{prefix}.{theirs}"] = int(getattr(config, ours))
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    rope = _rope(config)
    found |= {
        f"{prefix}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{prefix}.attention.key_length": head_dim,
        f"{prefix}.attention.value_length": head_dim,
        f"{prefix}.rope.dimension_count": head_dim,
        f"{prefix}.rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found |= {f"{prefix}.rope.scaling.type": kind, f"{prefix}.rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            found[f"{prefix}.rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):
        raise UnsupportedModelError(f"fewbit writes no GGUF with positions scaled by '{kind}'", _REMEDY)
    found[CONFIG_KEY] = json.dumps(dict(fields), ensure_ascii=False)
    return found


def _rope(config: PretrainedConfig) -> Mapping[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope if isinstance(rope, Mapping) else {}


def rope_factors(config: PretrainedConfig) -> torch.Tensor | None:
    """float32 [head_dim / 2]: by what each wavelength is stretched, for Llama 3's scaling; None for the others."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return _llama3(float(rope["rope_theta"]), head_dim, *(float(rope[name]) for name in names))


def _llama3(theta: float, head_dim: int, factor: float, low: float, high: float, positions: float) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones not at all, and those between the two limits smoothly."""
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    smooth = (positions / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    long, short = wavelength > positions / low, wavelength < positions / high
    return torch.where(long, torch.tensor(factor), torch.where(short, torch.tensor(1.0), between))


def configuration(file: GgufFile) -> PretrainedConfig:
    """transformers' configuration of a file.

    Raises:
        UnsupportedModelError: an architecture that has no row here.
        CheckpointError: fields are missing or wrong.
    """
    own = file.text(CONFIG_KEY)
    name = file.text("general.architecture")
    architecture = next((row for row in ARCHITECTURES if row.name == name), None)
    if architecture is None:
        known = ", ".join(row.name for row in ARCHITECTURES)
        raise UnsupportedModelError(f"'{file.path}' is a model of the architecture '{name}'", f"fewbit reads GGUF files of {known}")
    fields = _own_fields(file, own, architecture) if own is not None else _fields(file, architecture)
    fields.pop("quantization_config", None)
    kind = fields.pop("model_type")
    layers = fields.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= len(file.tensors):
        raise CheckpointError(f"'{file.path}' says that it has {layers!r} blocks, and has {len(file.tensors)} tensors", "download it again")
    try:
        config: PretrainedConfig = CONFIG_MAPPING[kind](**fields)
    except Exception as error:  # a configuration class may raise anything on values that it does not expect
        raise CheckpointError(f"the fields of '{file.path}' make no configuration of '{kind}': {error}", "download it again") from error
    return config


def _own_fields(file: GgufFile, text: str, architecture: Architecture) -> dict[str, Any]:
    """config.json as fewbit has left it; it must not contradict the fields that llama.cpp reads."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{file.path}' has a damaged field {CONFIG_KEY}", "download it again") from error
    if not isinstance(fields, dict) or fields.get("model_type") not in architecture.model_types:
        raise CheckpointError(f"'{file.path}' has a field {CONFIG_KEY} of another architecture", "download it again")
    for ours, theirs in _FIELDS.items():
        said = file.fields.get(f"{architecture.name}.{theirs}")
        if ours in fields and said is not None and fields[ours] != said:
            raise CheckpointError(f"'{file.path}' says {theirs} = {said} and {ours} = {fields[ours]}", "download it again")
    return fields


def _fields(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    """config.json's fields by what llama.cpp's mean."""
    prefix = architecture.name

    def number(key: str, default: float | None = None) -> Any:
        value = file.fields.get(f"{prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
            raise CheckpointError(f"'{file.path}' says {prefix}.{key} = {value!r}", "download it again")
        return value

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"'{file.path}' has no token_embd.weight", "download it again")
    heads = number("attention.head_count")
    fields: dict[str, Any] = {
        ours: number(theirs) for ours, theirs in _FIELDS.items() if theirs not in ("vocab_size", "attention.head_count_kv")
    }
    fields |= {
        "model_type": architecture.model_types[0],
        "vocab_size": embedding.shape[0],
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", number("rope.dimension_count", number("embedding_length") // heads)),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_fields(file, prefix, number),
    }
    if architecture.name == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    for ours in ("bos", "eos", "pad"):
        token = file.fields.get(f"tokenizer.ggml.{'padding' if ours == 'pad' else ours}_token_id")
        fields[f"{ours}_token_id"] = token if isinstance(token, int) and 0 <= token < embedding.shape[0] else None
    return fields


def _rope_fields(file: GgufFile, prefix: str, number: Any) -> dict[str, Any]:
    theta = float(number("rope.freq_base", 10000.0))
    kind = file.fields.get(f"{prefix}.rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        fields = {"rope_type": kind, "rope_theta": theta, "factor": float(number("rope.scaling.factor"))}
        if kind == "yarn":
            fields["original_max_position_embeddings"] = number("rope.scaling.original_context_length")
        return fields
    if kind != "none":
        raise UnsupportedModelError(f"'{file.path}' scales positions by '{kind}'", "fewbit reads none, linear, yarn and Llama 3's")
    if "rope_freqs.weight" not in file.tensors:
        return {"rope_type": "default", "rope_theta": theta}
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.type != gguf.GGMLQuantizationType.F32 or tensor.nbytes > 4096:
        raise CheckpointError(f"'{file.path}' has odd rope_freqs.weight", "download it again")
    factors = file.get("rope_freqs.weight").view(torch.float32)
    for setting in _LLAMA3_SETTINGS:
        if torch.allclose(_llama3(theta, 2 * factors.numel(), *setting), factors, rtol=1e-4):
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            return {"rope_type": "llama3", "rope_theta": theta, **dict(zip(names, setting, strict=True))}
    raise UnsupportedModelError(f"'{file.path}' scales its frequencies in a way that fewbit does not know", "name the model in safetensors")
