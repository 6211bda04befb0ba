"""The compressed-tensors layout: what llm-compressor writes and vLLM, SGLang and transformers load.

A linear `P` of [out, in] with groups of g columns becomes, by the `format` that stands in config.json's `quantization_config`:

    format                  tensors                                                     value
    pack-quantized          P.weight_packed I32 [out, ceil(in*b/32)]                    (q - 2**(b-1)) * s; affine (q - z) * s
                            P.weight_scale [out, in/g], P.weight_shape I64 [2]
                            affine: P.weight_zero_point I32 [ceil(out*b/32), in/g]
    int-quantized           P.weight I8 [out, in], P.weight_scale [out, 1]              q * s
    float-quantized         P.weight F8_E4M3 [out, in], P.weight_scale                  q * s;  blocks: s is [out/128, in/128],
                                                                                        per tensor [1]
    naive-quantized         as float-quantized, the activations stay in high precision
    nvfp4-pack-quantized    P.weight_packed U8 [out, in/2], P.weight_scale F8_E4M3      q * s / global
                            [out, in/16], P.weight_global_scale F32 [1]
    mxfp4-pack-quantized    P.weight_packed U8 [out, in/2], P.weight_scale U8           q * 2**(e - 127)
                            [out, in/32]

Packed integers are stored unsigned, q + 2**(b-1), as one dense stream of bits per row, lowest bit first: eight INT4 in an int32, and a
3-bit value may straddle two of them. Zero points are packed likewise but along `out`. Two FP4 codes share a byte, the first in the low
half.

Which bits go where is the library's business: configuration classes, the choice of `format` and integer packing are its own code, so that
what is written here is what its other users read. FP4 is packed here: the library's function packs floats, and ours are codes already.

**LLM.int8()** (inputs with an outlier threshold) is a way to run INT8 weights, and compressed-tensors has no word for it: written as W8A8
it would collapse elsewhere just where it is needed. So it is written as W8A16, and the inputs' format stands under `fewbit` beside the
layout's fields, `{"input_activations": {"outlier_threshold": 6.0}}`: fewbit takes it back, others run INT8 weights with 16-bit inputs.

NVFP4's global scale divides here and multiplies in `QuantizedTensor`: it is stored as the reciprocal, which in FP32 may lose the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from compressed_tensors import __version__ as library_version
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization import QuantizationConfig as LayoutConfig

from fewbit.checkpoints.compressed_tensors_reader import INT8_INPUTS, CompressedTensorsReader, StoredLinears
from fewbit.checkpoints.layout import Layout
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.checkpoints.steps import keep_linear, kept_linear
from fewbit.errors import FormatError, UsageError
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = [
    "CompressedTensorsLayout",
    "CompressedTensorsReader",
    "layout_format",
    "quantization_config",
    "read_linear",
    "supports",
    "write_linear",
]


def supports(scheme: Scheme) -> str | None:
    """None when the layout can hold the scheme, else the reason why not, one line."""
    if scheme.weights is None:
        what = "quantizes only the KV cache, at run time" if scheme.kv_keys else "quantizes nothing"
        return f"{scheme.name} {what}: its weights are those of the source"
    reason = _weights_reason(scheme.weights)
    if reason is None and scheme.input_activations is not None:
        activations = scheme.input_activations
        if not activations.dynamic and (activations.strategy != "tensor" or not activations.symmetric):
            reason = "compressed-tensors has static scales of input activations only per tensor and symmetric"
        elif activations.outlier_threshold is not None and replace(activations, outlier_threshold=None) != INT8_INPUTS:
            reason = "fewbit writes outlier columns only beside INT8 inputs per token"
        elif _is_e5m2(activations):
            reason = "compressed-tensors has no FP8 E5M2, only E4M3"
    if reason is None and scheme.kv_keys is not None:
        reason = _kv_reason(scheme)
    return reason


def _is_e5m2(spec: QuantSpec) -> bool:
    return spec.type == "float" and spec.num_bits == 8 and spec.exponent_bits != 4


def _weights_reason(spec: QuantSpec) -> str | None:
    if spec.type in ("nf", "codebook"):
        return f"compressed-tensors has no {spec.grid_name.upper()}, only integers and floats"
    if _is_e5m2(spec):
        return "compressed-tensors has no FP8 E5M2, only E4M3"
    if spec.type == "float" and spec.num_bits == 4:
        if (spec.group_size, spec.scale_dtype, spec.global_scale) in ((16, "float8_e4m3fn", True), (32, "e8m0", False)):
            return None
        return "compressed-tensors has FP4 only as NVFP4 (group 16, E4M3 scales and a global scale) and as MXFP4 (group 32, E8M0 scales)"
    if spec.type == "float" and spec.num_bits != 8:
        return f"compressed-tensors has no {spec.num_bits}-bit float of this kind"
    if spec.scale_dtype not in ("float32", "bfloat16", "float16"):
        return f"compressed-tensors has no {spec.scale_dtype} scales for {spec.grid_name.upper()}"
    return None


def _kv_reason(scheme: Scheme) -> str | None:
    keys, values = scheme.kv_keys, scheme.kv_values
    assert keys is not None
    if keys.type != "float" or keys.num_bits != 8 or keys.exponent_bits != 4:
        return f"compressed-tensors has a KV cache only in FP8 E4M3, not in {keys.grid_name.upper()}"
    if keys != values or keys.strategy != "tensor" or keys.dynamic:
        return "compressed-tensors has one static FP8 scale per KV tensor; a cache with dynamic scales is chosen when the model is served"
    return None


def _layout_args(spec: QuantSpec) -> QuantizationArgs:
    """The library's words for a spec."""
    four_bit_float = spec.type == "float" and spec.num_bits == 4
    return QuantizationArgs(
        num_bits=spec.num_bits,
        type=spec.type,
        symmetric=spec.symmetric,
        strategy="tensor_group" if spec.global_scale else spec.strategy,
        group_size=spec.group_size,
        block_structure=list(spec.block_shape) if spec.block_shape else None,
        dynamic=spec.dynamic,
        scale_dtype={"e8m0": "torch.uint8", "float8_e4m3fn": "torch.float8_e4m3fn"}[spec.scale_dtype] if four_bit_float else None,
        **({} if spec.symmetric else {"zp_dtype": "torch.int8"}),
    )


def _layout_scheme(scheme: Scheme) -> QuantizationScheme:
    reason = supports(scheme)
    if reason is not None:
        raise UsageError(f"scheme {scheme.name} cannot be written as compressed-tensors: {reason}", "choose another scheme")
    assert scheme.weights is not None
    activations = None if _outlier_threshold(scheme) is not None else scheme.input_activations
    layout = QuantizationScheme(
        targets=["Linear"],
        weights=_layout_args(scheme.weights),
        input_activations=_layout_args(activations) if activations else None,
    )
    layout.format = infer_module_format(torch.nn.Linear, layout).value
    return layout


def _outlier_threshold(scheme: Scheme) -> float | None:
    return None if scheme.input_activations is None else scheme.input_activations.outlier_threshold


def layout_format(scheme: Scheme) -> str:
    """The name of the layout's format for a scheme, for example `pack-quantized`.

    Raises:
        UsageError: the layout cannot hold the scheme.
    """
    return str(_layout_scheme(scheme).format)


def quantization_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        ignore: dotted names of the linears that stay in high precision.

    Raises:
        UsageError: the layout cannot hold the scheme.
    """
    layout = _layout_scheme(scheme)
    config = LayoutConfig(
        config_groups={"group_0": layout},
        format=layout.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        kv_cache_scheme=_layout_args(scheme.kv_keys) if scheme.kv_keys else None,
        ignore=list(ignore),
    )
    fields: dict[str, Any] = config.model_dump(mode="json")
    threshold = _outlier_threshold(scheme)
    if threshold is not None:
        fields["fewbit"] = {"input_activations": {"outlier_threshold": threshold}}
    return {**fields, "sparsity_config": {}, "transform_config": {}, "version": library_version}


def write_linear(prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of one linear.

    Args:
        prefix: the linear's dotted name.
        q: its weight, in the format `scheme.weights`.
        scheme: decides the layout's format together with the activations: INT8 weights are packed for W8A16 and plain for W8A8.

    Returns:
        Name to tensor, as in the table of the module's header; of a scheme that the layout lacks, as in `checkpoints.steps`: work in
        progress goes through here whatever layout it is meant for.

    Raises:
        FormatError: `q` is in another format, or its columns are out of order.
    """
    if q.spec != scheme.weights:
        raise FormatError(f"'{prefix}' is quantized as {q.spec}, the scheme {scheme.name} has {scheme.weights}")
    if supports(scheme) is not None:
        return keep_linear(prefix, q, scheme)
    if q.g_idx is not None:
        raise FormatError(f"'{prefix}' has a group index, which compressed-tensors does not store", "quantize with static groups")
    out, columns = q.shape
    layout = layout_format(scheme)
    tensors = {"weight_scale": q.scale.view(1) if q.spec.strategy == "tensor" else q.scale}
    if layout == "pack-quantized":
        tensors["weight_packed"] = pack_to_int32(q.values, q.spec.num_bits)
        tensors["weight_shape"] = torch.tensor([out, columns], dtype=torch.int64)
        if q.zero_point is not None:
            tensors["weight_zero_point"] = pack_to_int32(q.zero_point, q.spec.num_bits, packed_dim=0)
    elif layout in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        tensors["weight_packed"] = q.values[:, 0::2] | (q.values[:, 1::2] << 4)
        if q.global_scale is not None:
            tensors["weight_global_scale"] = 1 / q.global_scale
    else:
        tensors["weight"] = q.values
        if q.zero_point is not None:
            tensors["weight_zero_point"] = q.zero_point
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        if q.input_scale is None:
            raise FormatError(f"'{prefix}' has no scale for its static inputs", "calibrate it: smoothquant or gptq")
        tensors["input_scale"] = q.input_scale.float()
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def read_linear(files: SafetensorsFiles, prefix: str, scheme: Scheme) -> QuantizedTensor:
    """The inverse of `write_linear`: one linear out of files that hold its tensors.

    Raises:
        CheckpointError: as `CompressedTensorsReader.read`.
    """
    if supports(scheme) is not None:
        return kept_linear(files, prefix, scheme)
    return StoredLinears(files, scheme, layout_format(scheme)).read(prefix)


class CompressedTensorsLayout(Layout):
    """The writer, as one of several layouts."""

    name = "compressed-tensors"

    def supports(self, scheme: Scheme) -> str | None:
        return supports(scheme)

    def stored(self, scheme: Scheme) -> Scheme:
        """Loaders keep this layout's scales in the model's dtype; rounded to BF16 before the integers are computed, they lose nothing."""
        if scheme.weights is None or scheme.weights.scale_dtype != "float32":
            return scheme
        return replace(scheme, weights=replace(scheme.weights, scale_dtype="bfloat16"))

    def nearest(self, spec: QuantSpec) -> QuantSpec | None:
        return None if _weights_reason(spec) is not None else spec

    def format_name(self, scheme: Scheme) -> str:
        return layout_format(scheme)

    def write_linear(self, prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
        return write_linear(prefix, q, scheme)

    def config_fields(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        return quantization_config(scheme, ignore)
