"""TorchAO's layout as transformers saves it: tensor subclasses taken apart, and the header's metadata to put them together again.

A linear `P` of [out, in]:

    class                       parts                                                           value
    Int8Tensor                  P._weight_qdata I8, P._weight_scale F32 [out, 1],               (q - zero) * s
                                P._weight_zero_point I8 [out, 1]
    Float8Tensor                P._weight_qdata F8_E4M3, P._weight_scale F32 [out, 1]           q * s
    IntxUnpackedToInt8Tensor    P._weight_qdata I8 with values of -8 .. 7, one in a byte,       (q - zero) * s
                                P._weight_scale BF16 [out, in / g], P._weight_zero_point I8

The header's `__metadata__` has an entry for each tensor of the model, `{"_type": "Int8Tensor", "_data": {"block_size": [1, in], ...}}` or
`{"_type": "Tensor"}`, and `tensor_names` lists them. config.json has the configuration class by name under `quant_type.default`: that is
what `inspect` and the matrix of runtimes go by.

TorchAO's IntxUnpackedToInt8 takes a byte for four bits: it is a way to hand INT4 to kernels that pack it themselves, not to save disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from fewbit.checkpoints.layout import REWRITE, SCALE_DTYPES, Layout, LinearsReader, finite, named, part, sole_format
from fewbit.errors import CheckpointError, FormatError, UnsupportedModelError
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["TorchAOLayout", "TorchAOReader"]

_TOKENS = QuantSpec(8, strategy="token", dynamic=True, scale_dtype="float32")
_PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}, "_version": 1}
_BFLOAT16 = {"_type": "torch.dtype", "_data": "bfloat16"}
_INTX_BITS = range(2, 8)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _kind(scheme: Scheme) -> str | None:
    """The configuration class for a scheme; None when none fits."""
    spec, inputs = scheme.weights, scheme.input_activations
    if spec is None or scheme.kv_keys is not None or spec.scale_dtype not in ("float32", "bfloat16", "float16") or spec.global_scale:
        return None
    if spec.type == "float" and (spec.num_bits, spec.exponent_bits, spec.strategy) == (8, 4, "channel"):
        return "Float8WeightOnlyConfig" if inputs is None else None
    if spec.type != "int":
        return None
    if (spec.num_bits, spec.strategy, spec.symmetric) == (8, "channel", True):
        return {None: "Int8WeightOnlyConfig", _TOKENS: "Int8DynamicActivationInt8WeightConfig"}.get(inputs)
    if spec.num_bits in _INTX_BITS and spec.strategy in ("group", "channel") and inputs is None:
        return "IntxWeightOnlyConfig"
    return None


class TorchAOLayout(Layout):
    """The writer."""

    name = "torchao"

    def supports(self, scheme: Scheme) -> str | None:
        if scheme.weights is None:
            return f"{scheme.name} quantizes no weights"
        if _kind(scheme) is None:
            return (
                "TorchAO has INT8 per channel with 16-bit or INT8 inputs per token, FP8 E4M3 per channel with 16-bit inputs, "
                f"and integers of 2 to 7 bits in groups or per channel: no {scheme.name} ({scheme.weights})"
            )
        return None

    def stored(self, scheme: Scheme) -> Scheme:
        assert scheme.weights is not None
        return replace(scheme, weights=_as_written(scheme.weights))

    def nearest(self, spec: QuantSpec) -> QuantSpec | None:
        return _as_written(spec) if _kind(Scheme("", weights=spec)) is not None else None

    def format_name(self, scheme: Scheme) -> str:
        return str(_kind(scheme))

    def write_linear(self, prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
        spec = sole_format(prefix, q, scheme)
        if q.g_idx is not None:
            raise FormatError(f"'{prefix}' has its columns out of order, which TorchAO cannot say", "quantize with static groups")
        tensors = {f"{prefix}._weight_qdata": q.values, f"{prefix}._weight_scale": q.scale}
        if spec.type == "int":
            zeros = torch.zeros(q.scale.shape, dtype=torch.int8) if q.zero_point is None else q.zero_point
            tensors[f"{prefix}._weight_zero_point"] = zeros
        return tensors

    def config_fields(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        kind, spec = _kind(scheme), scheme.weights
        assert kind is not None and spec is not None
        data: dict[str, Any] = {"granularity": _PER_ROW, "set_inductor_config": True}
        if kind == "Int8WeightOnlyConfig":
            data["group_size"] = None
        elif kind == "Int8DynamicActivationInt8WeightConfig":
            data |= {"act_mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}, "reduce_range": False, "weight_only_decode": False}
        elif kind == "Float8WeightOnlyConfig":
            data["weight_dtype"] = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}
        else:
            group = {"_type": "PerGroup", "_data": {"group_size": spec.group_size}, "_version": 1}
            data = {
                "granularity": {"_type": "PerAxis", "_data": {"axis": 0}, "_version": 1} if spec.group_size is None else group,
                "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
                "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
                "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC" if spec.symmetric else "ASYMMETRIC"},
                "scale_dtype": None,
                "weight_dtype": {"_type": "torch.dtype", "_data": f"int{spec.num_bits}"},
            }
        return {
            "include_input_output_embeddings": False,
            "modules_to_not_convert": list(ignore) or None,
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": kind, "_data": data, "_version": 2}},
            "untie_embedding_weights": False,
        }

    def metadata(self, scheme: Scheme, shapes: Mapping[str, tuple[int, int]], names: Sequence[str]) -> dict[str, str]:
        assert scheme.weights is not None
        fields = {name: json.dumps({"_type": "Tensor"}) for name in names}
        for prefix, (_, columns) in shapes.items():
            fields[f"{prefix}.weight"] = json.dumps(_subclass(scheme.weights, columns, scheme.input_activations is not None))
        return {**fields, "tensor_names": json.dumps(list(names))}


def _as_written(spec: QuantSpec) -> QuantSpec:
    """INT8 and FP8 keep scales in float32, fewer bits in the model's dtype."""
    return replace(spec, scale_dtype="float32" if spec.num_bits == 8 else "bfloat16")


def _subclass(spec: QuantSpec, columns: int, dynamic: bool) -> dict[str, Any]:
    """What the metadata says of one linear."""
    block = [1, spec.group_size or columns]
    data: dict[str, Any]
    if spec.type == "float":
        data = {"block_size": block, "mm_config": None, "act_quant_kwargs": None, "dtype": _BFLOAT16}
        data["kernel_preference"] = {"_type": "KernelPreference", "_data": "AUTO"}
        return {"_type": "Float8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]}
    if spec.num_bits == 8:
        inputs = {
            "_type": "QuantizeTensorToInt8Kwargs",
            "_data": {
                "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
                "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
                "reduce_range": False,
            },
        }
        data = {"act_quant_kwargs": inputs if dynamic else None, "reduce_range": False, "block_size": block, "dtype": _BFLOAT16}
        return {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["zero_point", "qdata", "scale"]}
    data = {
        "target_dtype": {"_type": "torch.dtype", "_data": f"int{spec.num_bits}"},
        "block_size": block,
        "dtype": _BFLOAT16,
        "activation_quantization": None,
    }
    return {"_type": "IntxUnpackedToInt8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale", "zero_point"]}


class TorchAOReader(LinearsReader):
    """The reader, by config.json and the tensors themselves."""

    @property
    def ignore(self) -> tuple[str, ...]:
        names = self.fields.get("modules_to_not_convert")
        return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ("lm_head",)

    @cached_property
    def linears(self) -> tuple[str, ...]:
        return tuple(name.removesuffix("._weight_qdata") for name in self.files.names() if name.endswith("._weight_qdata"))

    @cached_property
    def _config(self) -> tuple[str, Mapping[str, Any]]:
        try:
            default = self.fields["quant_type"]["default"]
            kind, data = default["_type"], default["_data"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"'{self.directory}' has no quant_type.default in its quantization_config", REWRITE) from error
        known = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig")
        if kind not in known or not isinstance(data, dict):
            raise UnsupportedModelError(f"'{self.directory}' is quantized by TorchAO's {kind!r}", f"fewbit reads {', '.join(known)}")
        return kind, data

    @cached_property
    def scheme(self) -> Scheme:
        if not self.linears:
            raise CheckpointError(f"'{self.directory}' says that it is quantized, and no linear in it is", REWRITE)
        kind, data = self._config
        dtype = self.files.dtype(f"{self.linears[0]}._weight_scale")
        if dtype not in _FLOATS:
            raise CheckpointError(f"'{self.directory}' has scales in {dtype}", REWRITE)
        scale_dtype = SCALE_DTYPES[dtype]
        if kind == "Float8WeightOnlyConfig":
            return named(Scheme("", weights=QuantSpec(8, "float", "channel", exponent_bits=4, scale_dtype=scale_dtype)))
        bits = self._bits(data) if kind == "IntxWeightOnlyConfig" else 8
        group = self._group(self.linears[0])
        spec = QuantSpec(
            bits,
            strategy="channel" if group is None else "group",
            group_size=group,
            symmetric=not any(bool(self._zeros(prefix).any()) for prefix in self.linears),
            scale_dtype=scale_dtype,
        )
        return named(Scheme("", weights=spec, input_activations=_TOKENS if kind == "Int8DynamicActivationInt8WeightConfig" else None))

    def _bits(self, data: Mapping[str, Any]) -> int:
        said = data.get("weight_dtype")
        name = said.get("_data") if isinstance(said, dict) else None
        known: dict[str, int] = {f"int{bits}": bits for bits in (*_INTX_BITS, 8)}
        bits = known.get(str(name))
        if bits is None:
            raise UnsupportedModelError(f"'{self.directory}' has weights in {name!r}", "fewbit reads int2 to int8")
        return bits

    def _group(self, prefix: str) -> int | None:
        """Columns that share a scale; None when all of a row do."""
        shape, scales = self.files.shape(f"{prefix}._weight_qdata"), self.files.shape(f"{prefix}._weight_scale")
        if len(shape) != 2 or len(scales) != 2 or not scales[1] or shape[1] % scales[1]:
            raise CheckpointError(f"'{prefix}._weight_scale' in '{self.directory}' is {list(scales)} for {list(shape)}", REWRITE)
        return None if scales[1] == 1 else shape[1] // scales[1]

    def _zeros(self, prefix: str) -> torch.Tensor:
        name = f"{prefix}._weight_zero_point"
        return part(self.files, name, (torch.int8,), self.files.shape(f"{prefix}._weight_scale"))

    def read(self, prefix: str) -> QuantizedTensor:
        spec = self.scheme.weights
        assert spec is not None
        values = part(self.files, f"{prefix}._weight_qdata", (torch.int8 if spec.type == "int" else torch.float8_e4m3fn,))
        if self._group(prefix) != spec.group_size and values.shape[1] != spec.group_size:
            raise CheckpointError(
                f"'{prefix}' in '{self.directory}' has groups of {self._group(prefix)}, others of {spec.group_size}", REWRITE
            )
        shape = (values.shape[0], 1 if spec.group_size is None else values.shape[1] // spec.group_size)
        scale = finite(part(self.files, f"{prefix}._weight_scale", _FLOATS, shape), f"{prefix}._weight_scale", self.files)
        half = 2 ** (spec.num_bits - 1)
        if spec.type == "int" and spec.num_bits < 8 and (int(values.min()) < -half or int(values.max()) >= half):
            raise CheckpointError(f"'{prefix}._weight_qdata' in '{self.directory}' has values beyond {spec.num_bits} bits", REWRITE)
        zero = None if spec.symmetric or spec.type != "int" else self._zeros(prefix)
        return QuantizedTensor(values, scale, replace(spec, scale_dtype=SCALE_DTYPES[scale.dtype]), zero)
