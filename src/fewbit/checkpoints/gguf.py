"""The GGUF layout: one file with weights, configuration and tokenizer, which llama.cpp, OpenVINO and transformers load.

    checkpoints.gguf_header       the file's bytes
    checkpoints.gguf_blocks       Q4_0, Q4_1, Q8_0, MXFP4: 32 weights and their scale side by side
    checkpoints.gguf_models       names, the order of q's and k's rows, config.json
    checkpoints.gguf_vocabulary   the tokenizer
    checkpoints.gguf_source       reading

Sizes follow from shapes and types, so the header is written first and then one tensor after the other: the peak is one linear in two forms,
and nothing waits on the disk. Matrices that are not quantized keep their dtype, vectors become F32, as llama.cpp needs them.

The K-types are llama.cpp's own: groups of 32 or 16 under scales that are themselves quantized in super-blocks of 256. They are made from
a model in high precision by its own quantizer (`workflows.llama_quantize`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from transformers import PretrainedConfig

from fewbit.checkpoints.assemble import Feed
from fewbit.checkpoints.gguf_blocks import WRITTEN, dense_bytes, pack, type_of
from fewbit.checkpoints.gguf_models import architecture_of, metadata, rope_factors, rows_of_heads, tensor_names
from fewbit.checkpoints.gguf_vocabulary import write_tokenizer
from fewbit.checkpoints.layout import Layout, sole_format
from fewbit.errors import CheckpointError, FormatError
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.models.structure import build_empty_model

__all__ = ["GgufIdentity", "GgufLayout", "write_gguf"]

_FILE_TYPES: Mapping[Type, LlamaFileType] = {
    Type.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Type.MXFP4: LlamaFileType.MOSTLY_MXFP4_MOE,
    Type.BF16: LlamaFileType.MOSTLY_BF16,
    Type.F16: LlamaFileType.MOSTLY_F16,
    Type.F32: LlamaFileType.ALL_F32,
}


class GgufLayout(Layout):
    """The writer's choice of types."""

    name = "gguf"
    single_file = True

    def supports(self, scheme: Scheme) -> str | None:
        spec = scheme.weights
        if spec is None:
            return f"{scheme.name} quantizes no weights"
        if scheme.input_activations is not None:
            return "GGUF has no format of input activations: llama.cpp chooses its own"
        if scheme.kv_keys is not None:
            return "GGUF has no format of the KV cache: llama.cpp takes it as an option"
        if type_of(_as_written(spec)) is None:
            held = ", ".join(f"{stored.name} ({held})" for stored, held in WRITTEN.items())
            return f"GGUF has no type for {spec}; it has {held}, e.g. W4A16-G32, MXFP4, or W8A16 with --group-size 32"
        return None

    def stored(self, scheme: Scheme) -> Scheme:
        assert scheme.weights is not None
        return replace(scheme, weights=_as_written(scheme.weights))

    def nearest(self, spec: QuantSpec) -> QuantSpec | None:
        """Groups that are multiples of 32 repeat their scale; fewer bits are codes of INT4 or INT8, too."""
        fits = spec.strategy in ("tensor", "channel") or (spec.strategy == "group" and (spec.group_size or 1) % 32 == 0)
        if spec.type == "int" and fits:
            bits = 4 if spec.num_bits <= 4 else 8
            held = QuantSpec(bits, strategy="group", group_size=32, symmetric=spec.symmetric, scale_dtype="float16")
            return held if type_of(held) is not None else None
        return spec if type_of(spec) is not None else None

    def check_shape(self, name: str, rows: int, columns: int, spec: QuantSpec) -> None:
        if columns % 32:
            raise FormatError(f"'{name}' has {columns} input columns, no whole blocks of 32", "leave this linear in high precision")

    def format_name(self, scheme: Scheme) -> str:
        stored = None if scheme.weights is None else type_of(scheme.weights)
        return stored.name if stored is not None else "BF16"

    def write_linear(self, prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
        sole_format(prefix, q, scheme)
        return {f"{prefix}.weight": pack(q)}

    def config_fields(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        return {}


def _as_written(spec: QuantSpec) -> QuantSpec:
    """With scales in F16 where they are plain floats."""
    return replace(spec, scale_dtype="float16") if spec.type == "int" else spec


@dataclass(frozen=True)
class GgufIdentity:
    """What a file says beside its tensors.

    Attributes:
        name: of the model, for people.
        config: transformers' configuration. fields: config.json itself.
        directory: holds the tokenizer; None: the file gets none, and llama.cpp cannot load it alone.
    """

    name: str
    config: PretrainedConfig
    fields: Mapping[str, Any]
    directory: Path | None


def write_gguf(
    feed: Feed, scheme: Scheme | None, path: Path, identity: GgufIdentity, tell: Callable[[int, int], None] | None = None
) -> tuple[int, list[str]]:
    """Write one file.

    Args:
        feed: its quantized linears are in the format of `scheme.weights`.
        scheme: None when nothing is quantized.
        path: the file to make; it is not whole until this returns.
        tell: called with (tensors done, tensors).

    Returns:
        Bytes of all tensors, and what is not carried over, one line each.

    Raises:
        UnsupportedModelError: an architecture or a tokenizer that fewbit does not write, or a tensor that GGUF has no name for.
        FormatError: a linear that GGUF cannot hold.
        OSError: the system refuses a write.
    """
    architecture = architecture_of(identity.config.model_type)
    model = build_empty_model(identity.config)
    names = tensor_names(architecture, [*model.state_dict(), *feed.names], identity.config.num_hidden_layers)
    nameless = next((name for name in feed.names if name not in names), None)
    if nameless is not None:
        raise CheckpointError(f"GGUF has no name for the tensor '{nameless}'", "use llama.cpp's converter, or another layout")
    main = None if scheme is None or scheme.weights is None else type_of(scheme.weights)
    writer = GGUFWriter(path, architecture.name)
    notes = _describe(writer, identity, main or _main_type(feed))
    factors = rope_factors(identity.config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", list(factors.shape), np.dtype(np.float32), factors.nbytes, Type.F32)
    for name in feed.names:
        stored, shape = _stored(feed, name, main)
        block, size = GGML_QUANT_SIZES[stored]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(names[name], list(shape), np.dtype(np.float16), nbytes, stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        total = 0
        for done, name in enumerate(feed.names):
            if tell is not None:
                tell(done, len(feed.names))
            data = _bytes(feed, name, scheme, rows_of_heads(architecture, name, feed.shape(name)[0], identity.config))
            writer.write_tensor_data(data)
            total += data.nbytes
    finally:
        writer.close()
    return total, notes


def _is_quantized(feed: Feed, name: str) -> bool:
    return name.endswith(".weight") and name.removesuffix(".weight") in feed.quantized


def _dtype(feed: Feed, name: str) -> torch.dtype:
    entry = feed.entry(name)
    return feed.dense(name).dtype if entry is None else entry.dtype


def _stored(feed: Feed, name: str, main: Type | None) -> tuple[Type, tuple[int, ...]]:
    """A tensor's type and shape, without its numbers where that can be."""
    shape = feed.shape(name)
    if _is_quantized(feed, name):
        assert main is not None
        return main, shape
    return dense_bytes(torch.empty(shape, dtype=_dtype(feed, name), device="meta"))[0], shape


def _main_type(feed: Feed) -> Type:
    """Of a model in high precision: the type of its largest matrix."""
    matrices = [name for name in feed.names if len(feed.shape(name)) > 1]
    largest = max(matrices, key=lambda name: int(np.prod(feed.shape(name))), default=None)
    return Type.F32 if largest is None else _stored(feed, largest, None)[0]


def _bytes(feed: Feed, name: str, scheme: Scheme | None, order: torch.Tensor | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A tensor's bytes as the file has them."""
    if _is_quantized(feed, name):
        q = feed.linear(name.removesuffix(".weight"))
        assert scheme is not None
        sole_format(name, q, scheme)
        data = pack(q)
    else:
        data = dense_bytes(feed.dense(name))[1]
    if order is not None:
        data = data[order]
    return data.contiguous().view(torch.uint8).reshape(-1).numpy()


def _describe(writer: GGUFWriter, identity: GgufIdentity, main: Type) -> list[str]:
    """Everything but the tensors."""
    from fewbit import __version__

    writer.add_type("model")
    writer.add_name(identity.name)
    writer.add_file_type(_FILE_TYPES.get(main, LlamaFileType.GUESSED))
    writer.add_quantization_version(2)
    writer.add_string("fewbit.version", __version__)
    for key, value in metadata(identity.config, identity.fields).items():
        if key == "general.architecture":
            continue  # the writer has said it
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    if identity.directory is None:
        return ["the file has no tokenizer"]
    return write_tokenizer(writer, identity.directory, int(identity.config.vocab_size))
