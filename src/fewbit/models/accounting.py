"""How many parameters a model has and how many bytes a cached token takes, before any weight is read.

Parameters are counted on the model that transformers builds on torch's `meta` device: exact for every architecture, biases, norms
and experts included, and without a formula per family that could drift. Tied parameters count once.

A cached token takes, over all layers,

    2 x layers x kv_heads x head_dim x bytes                   (keys and values; Qwen2.5-7B in BF16: 2 x 28 x 4 x 128 x 2 = 57,344 = 56 KiB)

and, when quantized, num_bits / 8 bytes per value plus a scale and, if affine, a zero point of a byte for each group of values that
share them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import nn
from transformers import PretrainedConfig

from fewbit.errors import ModelError
from fewbit.formats.sizes import cached_bytes
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.models.structure import build_empty_model

__all__ = [
    "check_token_ids",
    "count_parameters",
    "kv_bytes_per_token",
    "kv_scheme_bytes_per_token",
    "kv_shape",
    "parameter_count",
    "resident_bytes",
]


def parameter_count(config: PretrainedConfig) -> int:
    """All parameters of the model; tied ones count once.

    Raises:
        UnsupportedModelError: transformers knows no causal language model of this type.
    """
    model = build_empty_model(config)
    return count_parameters(model, model.all_tied_weights_keys)


def count_parameters(model: nn.Module, tied: Container[str]) -> int:
    """All parameters of a model but those of the names `tied`, which are other names for parameters that it has anyway."""
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


def resident_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors keep resident: of their storages, each storage once.

    oneDNN's packed weights are opaque tensors without a storage that could be asked; they count elements times element size.
    """
    opaque, storages = 0, {}
    for tensor in tensors:
        if tensor.is_mkldnn:
            opaque += tensor.numel() * tensor.element_size()
        else:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return opaque + sum(storages.values())


def check_token_ids(largest: int, config: PretrainedConfig) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        largest: the largest token id of a text.
        config: the model's.

    Raises:
        ModelError: the tokenizer's ids reach beyond the model's vocabulary.
    """
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    if largest >= vocabulary:
        raise ModelError(
            f"the tokenizer gives the token id {largest} and the model's vocabulary has {vocabulary} entries",
            "the tokenizer belongs to another model: copy the right one into the model's directory",
        )


def kv_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """(layers, kv_heads, head_dim) of the text decoder."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, kv_heads, head_dim


def kv_bytes_per_token(config: PretrainedConfig, spec: QuantSpec | None, dtype_bytes: int = 2) -> float:
    """Bytes that one more cached token of one sequence takes, keys and values, all layers.

    Args:
        config: the model's configuration.
        spec: format of keys and values alike; None for high precision.
        dtype_bytes: bytes of one value in high precision.
    """
    layers, kv_heads, head_dim = kv_shape(config)
    return 2 * layers * kv_heads * cached_bytes(spec, head_dim, dtype_bytes)


def kv_scheme_bytes_per_token(config: PretrainedConfig, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> float:
    """The same for a scheme, whose keys and values may differ."""
    layers, kv_heads, head_dim = kv_shape(config)
    keys, values = (cached_bytes(spec, head_dim, dtype.itemsize) for spec in (scheme.kv_keys, scheme.kv_values))
    return layers * kv_heads * (keys + values)
