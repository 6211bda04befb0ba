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

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors import __version__ as library_version
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization import QuantizationConfig as LayoutConfig

from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.errors import CheckpointError, FormatError, ModelNotFoundError, UnsupportedModelError, UsageError
from fewbit.formats.grouping import scale_shape
from fewbit.formats.packing import packed_length
from fewbit.formats.spec import SCHEMES, QuantSpec, ScaleDtype, Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["CompressedTensorsReader", "layout_format", "quantization_config", "read_linear", "supports", "write_linear"]

_SCALE_DTYPES: Mapping[torch.dtype, ScaleDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.uint8: "e8m0",
}
_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
_INT8_INPUTS = QuantSpec(8, strategy="token", dynamic=True, scale_dtype="float32")  # what outlier columns are taken out of
_REWRITE = "the checkpoint is damaged or not in this layout: write or download it again"


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
        elif activations.outlier_threshold is not None and replace(activations, outlier_threshold=None) != _INT8_INPUTS:
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
        Name to tensor, as in the table of the module's header.

    Raises:
        UsageError: the layout cannot hold the scheme.
        FormatError: `q` is in another format, or its columns are out of order.
    """
    if q.spec != scheme.weights:
        raise FormatError(f"'{prefix}' is quantized as {q.spec}, the scheme {scheme.name} has {scheme.weights}")
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


class CompressedTensorsReader:
    """A checkpoint in the compressed-tensors layout, read linear by linear.

    Args:
        directory: config.json with a `quantization_config`, and safetensors.

    Raises:
        ModelNotFoundError: no config.json, or no weights.
        CheckpointError: damaged files.
        UnsupportedModelError: a `quantization_config` of another tool, or something of this layout that fewbit does not read yet.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._config = _read_config(self.directory)
        self.files = SafetensorsFiles(self.directory)
        self._layout = _only_group(self._config, self.directory)
        self._format = _checked_format(self._layout.format or self._config.format, self.directory)

    @property
    def ignore(self) -> tuple[str, ...]:
        """The linears that stay in high precision, as the checkpoint names them (`re:` marks a regular expression)."""
        return tuple(self._config.ignore or ())

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """The dotted names of the quantized linears."""
        return tuple(name.removesuffix(".weight_scale") for name in self.files.names() if name.endswith(".weight_scale"))

    @cached_property
    def scheme(self) -> Scheme:
        """The number formats; the preset's name where it is one.

        Raises:
            CheckpointError: no linear is quantized, although config.json says so.
        """
        if not self.linears:
            raise CheckpointError(f"'{self.directory}' says that it is quantized, and no linear in it is", _REWRITE)
        dtype = self.files.dtype(f"{self.linears[0]}.weight_scale")
        if dtype not in _SCALE_DTYPES:
            raise CheckpointError(f"'{self.directory}' has scales in {dtype}", _REWRITE)
        activations, cache = self._layout.input_activations, self._config.kv_cache_scheme
        own = _own_inputs(self.directory)
        scheme = Scheme(
            name="",
            weights=_spec(self._layout.weights, _SCALE_DTYPES[dtype]),
            input_activations=_spec(activations, "float32") if activations else own,
            kv_keys=_spec(cache, "bfloat16") if cache else None,
            kv_values=_spec(cache, "bfloat16") if cache else None,
        )
        presets = (preset.name for preset in SCHEMES.values() if _same_but_scales(preset, scheme))
        return replace(scheme, name=next(presets, _systematic_name(scheme)))

    def read(self, prefix: str) -> QuantizedTensor:
        """The weight of one linear, unpacked.

        Args:
            prefix: one of `linears`.

        Raises:
            CheckpointError: a tensor is missing, has a shape or dtype that contradicts the others, or a scale is not finite.
        """
        return _Linears(self.files, self.scheme, self._format).read(prefix)


def read_linear(files: SafetensorsFiles, prefix: str, scheme: Scheme) -> QuantizedTensor:
    """The inverse of `write_linear`: one linear out of files that hold its tensors.

    Raises:
        CheckpointError: as `CompressedTensorsReader.read`.
        UsageError: the layout cannot hold the scheme.
    """
    return _Linears(files, scheme, layout_format(scheme)).read(prefix)


class _Linears:
    """Linears of one format in safetensors files."""

    def __init__(self, files: SafetensorsFiles, scheme: Scheme, layout: str) -> None:
        assert scheme.weights is not None
        self.files, self._spec, self._format = files, scheme.weights, layout
        self._static_inputs = scheme.input_activations is not None and not scheme.input_activations.dynamic
        self.directory = files.directory

    def read(self, prefix: str) -> QuantizedTensor:
        """The weight of one linear."""
        spec = self._spec
        values = self._values(prefix, spec)
        shape = scale_shape(spec, *values.shape)
        stored = (1,) if spec.strategy == "tensor" else shape
        scale = self._tensor(prefix, "weight_scale", _dtype_of(spec.scale_dtype), stored).view(shape)
        if scale.is_floating_point() and not bool(scale.float().isfinite().all()):
            raise CheckpointError(f"'{prefix}.weight_scale' in '{self.directory}' has NaN or infinite scales", _REWRITE)
        zero_point, global_scale = self._zero_point(prefix, spec, scale), self._global_scale(prefix, spec)
        return QuantizedTensor(values, scale, spec, zero_point, global_scale=global_scale, input_scale=self._input_scale(prefix))

    def _values(self, prefix: str, spec: QuantSpec) -> torch.Tensor:
        if self._format == "pack-quantized":
            out, columns = self._tensor(prefix, "weight_shape", torch.int64, (2,)).tolist()
            packed = self._tensor(prefix, "weight_packed", torch.int32, (out, _words(columns, spec.num_bits)))
            return _unpacked(packed, spec.num_bits, out, columns, dim=1)
        if self._format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            packed = self._tensor(prefix, "weight_packed", torch.uint8)
            return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)
        return self._tensor(prefix, "weight", torch.int8 if spec.type == "int" else torch.float8_e4m3fn)

    def _zero_point(self, prefix: str, spec: QuantSpec, scale: torch.Tensor) -> torch.Tensor | None:
        if spec.symmetric:
            return None
        rows, groups = scale.shape
        if self._format != "pack-quantized":
            return self._tensor(prefix, "weight_zero_point", torch.int8, (rows, groups))
        packed = self._tensor(prefix, "weight_zero_point", torch.int32, (_words(rows, spec.num_bits), groups))
        return _unpacked(packed, spec.num_bits, rows, groups, dim=0)

    def _global_scale(self, prefix: str, spec: QuantSpec) -> torch.Tensor | None:
        if not spec.global_scale:
            return None
        divisor = self._tensor(prefix, "weight_global_scale", torch.float32, (1,))
        if not bool((divisor.isfinite() & (divisor > 0)).all()):
            raise CheckpointError(f"'{prefix}.weight_global_scale' in '{self.directory}' is no positive number", _REWRITE)
        return 1 / divisor

    def _input_scale(self, prefix: str) -> torch.Tensor | None:
        """float32 [1], where inputs are static; stored in any floating dtype."""
        name = f"{prefix}.input_scale"
        if not self._static_inputs:
            return None
        if name not in self.files:
            raise CheckpointError(f"'{name}' is missing in '{self.directory}', and its inputs are static", _REWRITE)
        scale = self.files.get(name).float().reshape(-1)
        if scale.shape != (1,) or not bool((scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(f"'{name}' in '{self.directory}' is no positive number", _REWRITE)
        return scale

    def _tensor(self, prefix: str, part: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """One tensor of a linear, checked before it is read; `shape` None accepts any matrix."""
        name = f"{prefix}.{part}"
        found, has = self.files.shape(name), self.files.dtype(name)
        if has != dtype or (found != shape if shape is not None else len(found) != 2):
            expected = f"{list(shape)} in {dtype}" if shape is not None else f"a matrix in {dtype}"
            raise CheckpointError(f"'{name}' in '{self.directory}' is {list(found)} in {has}, not {expected}", _REWRITE)
        return self.files.get(name)


def _unpacked(packed: torch.Tensor, num_bits: int, rows: int, columns: int, dim: Literal[0, 1]) -> torch.Tensor:
    """int8 [rows, columns] of the words that were packed along `dim`."""
    values: torch.Tensor = unpack_from_int32(packed, num_bits, torch.Size((rows, columns)), packed_dim=dim)
    return values.contiguous()


def _words(count: int, num_bits: int) -> int:
    """int32 words that hold `count` values."""
    return -(-packed_length(count, num_bits) // 4)


def _dtype_of(scale_dtype: ScaleDtype) -> torch.dtype:
    return next(dtype for dtype, name in _SCALE_DTYPES.items() if name == scale_dtype)


def _read_config(directory: Path) -> LayoutConfig:
    path = directory / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(f"no config.json in '{directory}'", "give the directory of a Hugging Face model")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))["quantization_config"]
        if fields["quant_method"] != "compressed-tensors":
            raise UnsupportedModelError(f"'{path}' describes a checkpoint of '{fields['quant_method']}'", "this reads compressed-tensors")
        if fields.get("sparsity_config") or fields.get("transform_config"):
            raise UnsupportedModelError(f"'{path}' has a sparsity or transform configuration", "fewbit reads plain quantization only")
        return LayoutConfig.model_validate(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"'{path}' has no valid quantization_config: {reason}", _REWRITE) from error


def _own_inputs(directory: Path) -> QuantSpec | None:
    """The inputs' format that fewbit has left beside the layout's fields; None when there is none."""
    fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"].get("fewbit")
    if fields is None:
        return None
    try:
        return replace(_INT8_INPUTS, outlier_threshold=float(fields["input_activations"]["outlier_threshold"]))
    except (KeyError, TypeError, ValueError, FormatError) as error:
        raise CheckpointError(f"'{directory / 'config.json'}' has damaged fields of fewbit's own: {fields}", _REWRITE) from error


def _checked_format(name: Any, directory: Path) -> str:
    """The format as a plain string (the library hands out strings and members of an enumeration)."""
    text = str(getattr(name, "value", name))
    if text not in _FORMATS:
        raise UnsupportedModelError(f"'{directory}' is in the format '{text}'", f"fewbit reads {', '.join(_FORMATS)}")
    return text


def _only_group(config: LayoutConfig, directory: Path) -> QuantizationScheme:
    groups = list(config.config_groups.values())
    if len(groups) != 1 or groups[0].weights is None:
        raise UnsupportedModelError(f"'{directory}' mixes {len(groups)} formats of weights", "fewbit reads checkpoints with one")
    activations = groups[0].input_activations
    if activations is not None and activations.dynamic is not True:
        if activations.dynamic is not False or str(getattr(activations.strategy, "value", activations.strategy)) != "tensor":
            raise UnsupportedModelError(
                f"'{directory}' has scales of activations that are neither dynamic nor one per tensor", "fewbit reads those two"
            )
        if not activations.symmetric:
            raise UnsupportedModelError(f"'{directory}' has zero points of activations", "fewbit reads symmetric activation formats")
    return groups[0]


def _spec(args: QuantizationArgs, scale_dtype: ScaleDtype) -> QuantSpec:
    """A spec in the library's words, put back into ours."""
    exponent_bits = {4: 2, 8: 4}.get(args.num_bits) if args.type == "float" else None
    grouped = args.strategy in ("group", "tensor_group")
    return QuantSpec(
        num_bits=args.num_bits,
        type=args.type,
        strategy="group" if grouped else args.strategy,
        group_size=args.group_size if grouped else None,
        block_shape=tuple(args.block_structure) if args.block_structure else None,
        symmetric=args.symmetric,
        dynamic=bool(args.dynamic),
        scale_dtype=scale_dtype,
        exponent_bits=exponent_bits,
        global_scale=args.strategy == "tensor_group",
    )


def _same_but_scales(preset: Scheme, scheme: Scheme) -> bool:
    """Whether a scheme is the preset, whatever dtype the stored scales of its weights have."""
    if preset.weights is None or scheme.weights is None:
        return False
    return replace(preset, name="", weights=replace(preset.weights, scale_dtype=scheme.weights.scale_dtype)) == scheme


def _systematic_name(scheme: Scheme) -> str:
    """W4A16-G64 and the like, for what is no preset."""
    assert scheme.weights is not None
    spec, activations = scheme.weights, scheme.input_activations
    kind = "FP" if spec.type == "float" else "W"
    parts = [f"{kind}{spec.num_bits}A{activations.num_bits if activations else 16}"]
    parts += [f"G{spec.group_size}"] if spec.strategy == "group" else [spec.strategy.upper()]
    return "-".join(parts + ([] if spec.symmetric else ["ASYM"]) + (["KV8"] if scheme.kv_keys else []))
