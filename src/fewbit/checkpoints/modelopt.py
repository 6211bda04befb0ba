"""The layout of NVIDIA's ModelOpt, as `hf_quant_config.json` and config.json's `quantization_config` name it by `quant_algo`.

A linear `P` of [out, in]:

    quant_algo                  tensors                                                         value
    FP8                         P.weight F8_E4M3, P.weight_scale F32 [], P.input_scale F32 []   q * s, inputs static per tensor
    FP8_PER_CHANNEL_PER_TOKEN   P.weight F8_E4M3, P.weight_scale F32 [out]                      q * s, inputs dynamic per token
    fp8_pb_wo                   P.weight F8_E4M3, P.weight_scale F32 [out/128, 1, in/128, 1]    q * s of the block, inputs in 16 bits
    W4A16_AWQ                   P.weight U8 [out/2, in], P.weight_scale F32 [out, in/g]         q * s; two's complement, the even output
                                                                                                row in the low half
    NVFP4                       P.weight U8 [out, in/2], P.weight_scale F8_E4M3 [out, in/16],   E2M1(code) * s * s2, low half first
                                P.weight_scale_2 F32 [], P.input_scale F32 []
    W4A16_NVFP4                 the same without P.input_scale                                  the same, inputs in 16 bits
    KV cache in FP8             self_attn.k_proj.k_scale, self_attn.v_proj.v_scale F32 []

NVFP4's global scale multiplies here as in `QuantizedTensor` (compressed-tensors divides by it). The inputs of `NVFP4` are FP4 under a
calibrated scale; in fewbit they stay in high precision, and `notes` says so. What fewbit writes is the weight-only `W4A16_NVFP4`.

`P.pre_quant_scale` multiplies a linear's inputs where AWQ or SmoothQuant could not fold its factors into the layer in front. A weight alone
does not say what such a linear computes, so these are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoints.layout import REWRITE, Layout, LinearsReader, finite, named, part, sole_format
from fewbit.errors import CheckpointError, FormatError, UnsupportedModelError
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["ModelOptLayout", "ModelOptReader"]

_FP8_TENSOR = QuantSpec(8, "float", "tensor", exponent_bits=4, scale_dtype="float32")
_FP8_CHANNEL = QuantSpec(8, "float", "channel", exponent_bits=4, scale_dtype="float32")
_FP8_BLOCK = QuantSpec(8, "float", "block", block_shape=(128, 128), exponent_bits=4, scale_dtype="float32")
_FP8_TOKENS = QuantSpec(8, "float", "token", dynamic=True, exponent_bits=4, scale_dtype="float32")
_FP8_STATIC = QuantSpec(8, "float", "tensor", exponent_bits=4, scale_dtype="float32")
_NVFP4 = QuantSpec(4, "float", "group", group_size=16, exponent_bits=2, scale_dtype="float8_e4m3fn", global_scale=True)
_ALGORITHMS: dict[str, tuple[QuantSpec, QuantSpec | None]] = {
    "FP8": (_FP8_TENSOR, _FP8_STATIC),
    "FP8_PER_CHANNEL_PER_TOKEN": (_FP8_CHANNEL, _FP8_TOKENS),
    "FP8_PB_WO": (_FP8_BLOCK, None),
    "W4A16_NVFP4": (_NVFP4, None),
    "NVFP4": (_NVFP4, None),
}
_INT4, _PRODUCER = "W4A16_AWQ", {"name": "fewbit"}
_KV = QuantSpec(8, "float", "tensor", exponent_bits=4)


def _algorithm(scheme: Scheme) -> str | None:
    """What ModelOpt calls a scheme that fewbit writes; None when it has no name."""
    spec, inputs = scheme.weights, scheme.input_activations
    if spec is None:
        return None
    spec = replace(spec, scale_dtype="float32") if spec.scale_dtype in ("float32", "bfloat16", "float16") else spec
    if spec.type == "int":
        grouped = (spec.num_bits, spec.strategy, spec.symmetric) == (4, "group", True)
        return _INT4 if grouped and inputs is None else None
    return next((name for name, pair in _ALGORITHMS.items() if pair == (spec, inputs)), None)


class ModelOptLayout(Layout):
    """The writer."""

    name = "modelopt"

    def supports(self, scheme: Scheme) -> str | None:
        if scheme.weights is None:
            return f"{scheme.name} quantizes no weights"
        if scheme.kv_keys is not None:
            return "fewbit writes no scales of the KV cache in ModelOpt's layout"
        if _algorithm(scheme) is None:
            return (
                "ModelOpt's layout has FP8 per tensor with static inputs, FP8 per channel with inputs per token, FP8 in blocks of 128 with "
                f"16-bit inputs, NVFP4 and INT4 in symmetric groups: no {scheme.name} ({scheme.weights})"
            )
        return None

    def stored(self, scheme: Scheme) -> Scheme:
        assert scheme.weights is not None
        return scheme if scheme.weights == _NVFP4 else replace(scheme, weights=replace(scheme.weights, scale_dtype="float32"))

    def nearest(self, spec: QuantSpec) -> QuantSpec | None:
        if spec == _NVFP4:
            return spec
        if spec.scale_dtype not in ("float32", "bfloat16", "float16") or spec.type not in ("int", "float"):
            return None
        written = replace(spec, scale_dtype="float32")
        inputs = (None, _FP8_STATIC, _FP8_TOKENS)
        return written if any(_algorithm(Scheme("", written, one)) for one in inputs) else None

    def check_shape(self, name: str, rows: int, columns: int, spec: QuantSpec) -> None:
        if spec.type == "int" and rows % 2:
            raise FormatError(f"'{name}' has {rows} output rows, and two share a byte", "leave this linear in high precision")

    def format_name(self, scheme: Scheme) -> str:
        name = _algorithm(scheme)
        return "fp8_pb_wo" if name == "FP8_PB_WO" else str(name)

    def write_linear(self, prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
        spec = sole_format(prefix, q, scheme)
        self.check_shape(prefix, *q.shape, spec)
        if q.g_idx is not None:
            raise FormatError(f"'{prefix}' has its columns out of order, which ModelOpt cannot say", "quantize with static groups")
        if spec.type == "int":
            codes = q.values.view(torch.uint8) & 0xF
            return {f"{prefix}.weight": codes[0::2] | (codes[1::2] << 4), f"{prefix}.weight_scale": q.scale}
        if spec == _NVFP4:
            assert q.global_scale is not None
            return {
                f"{prefix}.weight": q.values[:, 0::2] | (q.values[:, 1::2] << 4),
                f"{prefix}.weight_scale": q.scale,
                f"{prefix}.weight_scale_2": q.global_scale.float().reshape(()),
            }
        shape: dict[str, tuple[int, ...]] = {"tensor": (), "channel": (q.scale.shape[0],)}
        scale = q.scale.reshape(shape.get(spec.strategy, (q.scale.shape[0], 1, q.scale.shape[1], 1)))
        tensors = {f"{prefix}.weight": q.values, f"{prefix}.weight_scale": scale}
        if scheme.input_activations is not None and not scheme.input_activations.dynamic:
            if q.input_scale is None:
                raise FormatError(f"'{prefix}' has no scale for its static inputs", "calibrate it: gptq")
            tensors[f"{prefix}.input_scale"] = q.input_scale.float().reshape(())
        return tensors

    def config_fields(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "ignore": list(ignore),
            "quant_algo": self.format_name(scheme),
            "producer": _PRODUCER,
            "quant_method": "modelopt",
        }
        if scheme.weights == _NVFP4:
            four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
            fields["config_groups"] = {"group_0": {"weights": four, "targets": ["Linear"]}}
        if fields["quant_algo"] == "FP8":
            eight = {"dynamic": False, "num_bits": 8, "type": "float"}
            fields["config_groups"] = {"group_0": {"input_activations": eight, "weights": eight, "targets": ["Linear"]}}
        return fields

    def companions(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        assert scheme.weights is not None
        fields: dict[str, Any] = {"quant_algo": self.format_name(scheme), "kv_cache_quant_algo": None}
        if scheme.weights.type == "int":
            fields |= {"group_size": scheme.weights.group_size, "has_zero_point": False, "pre_quant_scale": False}
        if scheme.weights == _NVFP4:
            fields["group_size"] = 16
        return {"hf_quant_config.json": {"producer": _PRODUCER, "quantization": {**fields, "exclude_modules": list(ignore)}}}


class ModelOptReader(LinearsReader):
    """The reader."""

    def __init__(self, directory: str | Path, fields: Mapping[str, Any] | None = None) -> None:
        super().__init__(directory, fields)
        self._name = self._algorithm()

    @property
    def ignore(self) -> tuple[str, ...]:
        names = self.fields.get("ignore", self.fields.get("exclude_modules"))
        return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()

    @property
    def notes(self) -> tuple[str, ...]:
        return ("its inputs are NVFP4 under a calibrated scale; here they stay in high precision",) if self._name == "NVFP4" else ()

    def _algorithm(self) -> str:
        name = str(self.fields.get("quant_algo"))
        if name.upper() not in (*_ALGORITHMS, _INT4):
            known = ", ".join((*_ALGORITHMS, _INT4))
            raise UnsupportedModelError(f"'{self.directory}' is quantized by ModelOpt's algorithm '{name}'", f"fewbit reads {known}")
        return name.upper()

    @cached_property
    def linears(self) -> tuple[str, ...]:
        return tuple(name.removesuffix(".weight_scale") for name in self.files.names() if name.endswith(".weight_scale"))

    @cached_property
    def scheme(self) -> Scheme:
        if not self.linears:
            raise CheckpointError(f"'{self.directory}' says that it is quantized, and no linear in it is", REWRITE)
        cache = _KV if self.fields.get("kv_cache_scheme") or self.fields.get("kv_cache_quant_algo") == "FP8" else None
        if self._name != _INT4:
            weights, inputs = _ALGORITHMS[self._name]
            return named(Scheme("", weights, inputs, cache, cache))
        packed, scales = (self.files.shape(f"{self.linears[0]}.{name}") for name in ("weight", "weight_scale"))
        if len(packed) != 2 or len(scales) != 2 or not scales[1] or packed[1] % scales[1]:
            raise CheckpointError(f"'{self.linears[0]}' in '{self.directory}' has scales {list(scales)} for {list(packed)}", REWRITE)
        spec = QuantSpec(4, strategy="group", group_size=packed[1] // scales[1], scale_dtype="float32")
        return named(Scheme("", spec, None, cache, cache))

    def read(self, prefix: str) -> QuantizedTensor:
        spec = self.scheme.weights
        assert spec is not None
        if f"{prefix}.pre_quant_scale" in self.files:
            raise UnsupportedModelError(
                f"'{prefix}' in '{self.directory}' scales its inputs by a pre_quant_scale", "fewbit reads checkpoints without it"
            )
        if spec.num_bits == 4:
            return self._read4(prefix, spec)
        values = part(self.files, f"{prefix}.weight", (torch.float8_e4m3fn,))
        rows, columns = values.shape
        blocks = (-(-rows // 128), 1, -(-columns // 128), 1)
        shape = {"tensor": (), "channel": (rows,)}.get(spec.strategy, blocks)
        scale = self._scale(prefix, "weight_scale", shape)
        expected = {"tensor": (1, 1), "channel": (rows, 1)}.get(spec.strategy, (blocks[0], blocks[2]))
        static = self._name == "FP8"
        return QuantizedTensor(
            values, scale.reshape(expected), spec, input_scale=self._scale(prefix, "input_scale", ()).reshape(1) if static else None
        )

    def _read4(self, prefix: str, spec: QuantSpec) -> QuantizedTensor:
        packed = part(self.files, f"{prefix}.weight", (torch.uint8,))
        assert spec.group_size is not None
        if spec.type == "int":
            codes = torch.stack((packed & 0xF, packed >> 4), dim=1).flatten(0, 1).view(torch.int8)
            values = torch.where(codes > 7, codes - 16, codes)
        else:
            values = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)
        rows, columns = values.shape
        if columns % spec.group_size:
            raise CheckpointError(f"'{prefix}.weight' in '{self.directory}' has {columns} columns, no whole groups of {spec}", REWRITE)
        shape = (rows, columns // spec.group_size)
        if spec.type == "int":
            return QuantizedTensor(values, self._scale(prefix, "weight_scale", shape), spec)
        name = f"{prefix}.weight_scale"
        scale = finite(part(self.files, name, (torch.float8_e4m3fn,), shape), name, self.files)
        return QuantizedTensor(values, scale, spec, global_scale=self._scale(prefix, "weight_scale_2", ()).reshape(1))

    def _scale(self, prefix: str, what: str, shape: tuple[int, ...]) -> torch.Tensor:
        name = f"{prefix}.{what}"
        found = self.files.shape(name)
        wanted = found if prod(shape) == prod(found) == 1 else shape  # some versions write [1] for a number, or a number for one block
        return finite(part(self.files, name, (torch.float32,), wanted), name, self.files)
