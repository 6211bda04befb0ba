"""bitsandbytes' layouts, which transformers loads: NF4 and FP4 in blocks of 64, LLM.int8().

4 bits, a linear `P` of [out, in], N = out * in, blocks of B (64) neighbours in a row:

    P.weight                U8 [N / 2, 1]       two codes in a byte, the first in the high half (or the same bytes under another dtype,
                                                `bnb_4bit_quant_storage`)
    P.weight.absmax         F32 [N / B]         value = quant_map[code] * absmax
    P.weight.quant_map      F32 [16]            NF4's sixteen values; or FP4's, which are not OCP's E2M1, in the order of their codes
    P.weight.quant_state.bitsandbytes__nf4      U8: JSON with quant_type, blocksize, dtype, shape

    double quantization: absmax is U8, and  absmax = nested_quant_map[code] * nested_absmax + nested_offset
    P.weight.nested_absmax F32 [N / B / 256], P.weight.nested_quant_map F32 [256], nested_offset in the JSON

8 bits:

    P.weight I8 [out, in],  P.SCB F32 [out],  P.weight_format U8 [] = 0         value = q * SCB / 127

NF4 is fewbit's own; FP4 is a codebook of sixteen values in `QuantizedTensor`. Double quantization is read, its scales come as the float32
that they stand for, and it is not written: the codes of the scales would be chosen anew.

SCB / 127 has to come back as the scale that was meant. A scale with at most 17 significant bits times 127 fits float32, so INT8 is written
with scales in BF16, and read as BF16 where all of them are.

bitsandbytes multiplies INT8 weights by INT8 inputs, per token, columns beyond `llm_int8_threshold` in 16 bits: these are fewbit's schemes
LLM-INT8 and, without a threshold, W8A8. Weights alone in INT8 it does not have.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from fewbit.checkpoints.layout import REWRITE, Layout, LinearsReader, boolean, finite, named, part, sole_format
from fewbit.errors import CheckpointError, FormatError, UnsupportedModelError
from fewbit.formats.grids import NF4_VALUES
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["FP4_VALUES", "BitsAndBytesLayout", "BitsAndBytesReader"]

_BLOCK, _NESTED = 64, 256
_POSITIVE = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4_VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))
_NF4 = QuantSpec(4, "nf", "group", group_size=_BLOCK, scale_dtype="float32")
_FP4 = QuantSpec(4, "codebook", "group", group_size=_BLOCK, scale_dtype="float32")
_INT8 = QuantSpec(8, strategy="channel", scale_dtype="bfloat16")
_TOKENS = QuantSpec(8, strategy="token", dynamic=True, scale_dtype="float32")
_STATE = ".weight.quant_state.bitsandbytes__"
_MAX_STATE = 4096
_STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)


class BitsAndBytesLayout(Layout):
    """The writer."""

    name = "bitsandbytes"

    def supports(self, scheme: Scheme) -> str | None:
        spec, inputs = scheme.weights, scheme.input_activations
        if spec is None:
            return f"{scheme.name} quantizes no weights"
        if scheme.kv_keys is not None:
            return "bitsandbytes has no format of the KV cache"
        spec = self._as_written(spec)
        if spec in (_NF4, _FP4):
            return None if inputs is None else "bitsandbytes leaves the inputs of 4-bit weights in 16 bits"
        if spec != _INT8:
            return f"bitsandbytes has NF4 and FP4 in groups of 64 and INT8 per channel, no {spec}"
        if inputs is None or replace(inputs, outlier_threshold=None) != _TOKENS:
            return "bitsandbytes multiplies INT8 weights by INT8 inputs per token: choose LLM-INT8 or W8A8"
        return None

    def stored(self, scheme: Scheme) -> Scheme:
        assert scheme.weights is not None
        return replace(scheme, weights=self._as_written(scheme.weights))

    def nearest(self, spec: QuantSpec) -> QuantSpec | None:
        written = self._as_written(spec)
        return written if written in (_NF4, _FP4, _INT8) else None

    def check_shape(self, name: str, rows: int, columns: int, spec: QuantSpec) -> None:
        if spec.num_bits == 4 and columns % _BLOCK:
            raise FormatError(f"'{name}' has {columns} input columns, no whole blocks of {_BLOCK}", "leave this linear in high precision")

    def format_name(self, scheme: Scheme) -> str:
        assert scheme.weights is not None
        return {"nf": "nf4", "codebook": "fp4"}.get(scheme.weights.type, "int8")

    def write_linear(self, prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
        spec = sole_format(prefix, q, scheme)
        if q.g_idx is not None:
            raise FormatError(f"'{prefix}' has its columns out of order, which bitsandbytes cannot say", "quantize with static groups")
        if spec.num_bits == 8:
            return {
                f"{prefix}.weight": q.values,
                f"{prefix}.SCB": (q.scale.float() * 127).flatten(),
                f"{prefix}.weight_format": torch.tensor(0, dtype=torch.uint8),
            }
        self.check_shape(prefix, *q.shape, spec)
        kind = self.format_name(scheme)
        table = torch.tensor(NF4_VALUES if kind == "nf4" else FP4_VALUES)
        if q.codebook is not None and not torch.equal(q.codebook.float(), table):
            raise FormatError(f"'{prefix}' has a codebook of its own, and bitsandbytes only the one of its FP4")
        codes = q.values.reshape(-1, 2)
        state = {"quant_type": kind, "blocksize": _BLOCK, "dtype": "bfloat16", "shape": list(q.shape)}
        return {
            f"{prefix}.weight": ((codes[:, 0] << 4) | codes[:, 1]).unsqueeze(1),
            f"{prefix}.weight.absmax": q.scale.flatten(),
            f"{prefix}.weight.quant_map": table,
            f"{prefix}{_STATE}{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }

    def config_fields(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        assert scheme.weights is not None
        four = scheme.weights.num_bits == 4
        inputs = scheme.input_activations
        return {
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.format_name(scheme) if four else "fp4",
            "bnb_4bit_use_double_quant": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(ignore) or None,
            "llm_int8_threshold": 6.0 if four else ((inputs and inputs.outlier_threshold) or 0.0),
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "quant_method": "bitsandbytes",
        }

    @staticmethod
    def _as_written(spec: QuantSpec) -> QuantSpec:
        return replace(spec, scale_dtype="bfloat16" if spec.num_bits == 8 else "float32")


class BitsAndBytesReader(LinearsReader):
    """The reader, double quantization and any storage dtype included."""

    @property
    def ignore(self) -> tuple[str, ...]:
        names = self.fields.get("llm_int8_skip_modules")
        return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ("lm_head",)

    @cached_property
    def _four(self) -> bool:
        four, eight = (boolean(self.fields, f"load_in_{bits}bit", self.directory, False) for bits in (4, 8))
        if four == eight:
            raise CheckpointError(f"'{self.directory}' says load_in_4bit = {four} and load_in_8bit = {eight}", REWRITE)
        return four

    @cached_property
    def linears(self) -> tuple[str, ...]:
        end = ".weight.absmax" if self._four else ".SCB"
        return tuple(name.removesuffix(end) for name in self.files.names() if name.endswith(end))

    def linear_of(self, name: str) -> str:
        """Parts of a 4-bit weight are named behind it."""
        return name.partition(".weight")[0] if ".weight" in name else name.rpartition(".")[0]

    @cached_property
    def scheme(self) -> Scheme:
        if not self.linears:
            raise CheckpointError(f"'{self.directory}' says that it is quantized, and no linear in it is", REWRITE)
        if self._four:
            return named(Scheme("", weights=self._spec(self.linears[0])[0]))
        threshold = self.fields.get("llm_int8_threshold", 6.0)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < float("inf"):
            raise CheckpointError(f"'{self.directory}' says llm_int8_threshold = {threshold!r}", REWRITE)
        narrow = all(bool((scale.to(torch.bfloat16).float() == scale).all()) for scale in map(self._scale8, self.linears))
        spec = replace(_INT8, scale_dtype="bfloat16" if narrow else "float32")
        return named(Scheme("", weights=spec, input_activations=replace(_TOKENS, outlier_threshold=float(threshold) or None)))

    def read(self, prefix: str) -> QuantizedTensor:
        return self._read4(prefix) if self._four else self._read8(prefix)

    def _scale8(self, prefix: str) -> torch.Tensor:
        """float32 [out, 1]."""
        rows = self.files.shape(f"{prefix}.weight")[:1]
        scale = part(self.files, f"{prefix}.SCB", (torch.float32,), rows)
        return finite(scale, f"{prefix}.SCB", self.files).unsqueeze(1) / 127

    def _read8(self, prefix: str) -> QuantizedTensor:
        spec = self.scheme.weights
        assert spec is not None
        name = f"{prefix}.weight_format"
        if name in self.files and bool(part(self.files, name, (torch.uint8,), ()).item()):
            raise UnsupportedModelError(f"'{prefix}.weight' in '{self.directory}' is in an order for one kind of GPU", "save it again")
        values = part(self.files, f"{prefix}.weight", (torch.int8,))
        return QuantizedTensor(values, self._scale8(prefix).to(torch.bfloat16 if spec.scale_dtype == "bfloat16" else torch.float32), spec)

    def _spec(self, prefix: str) -> tuple[QuantSpec, dict[str, Any]]:
        """Format and quant_state of a 4-bit linear."""
        kind = next((kind for kind in ("nf4", "fp4") if f"{prefix}{_STATE}{kind}" in self.files), None)
        if kind is None:
            raise CheckpointError(f"'{prefix}.weight' in '{self.directory}' has no quant_state of NF4 or FP4", REWRITE)
        name = f"{prefix}{_STATE}{kind}"
        if self.files.nbytes(name) > _MAX_STATE:
            raise CheckpointError(f"'{name}' in '{self.directory}' has {self.files.nbytes(name):,} bytes", REWRITE)
        try:
            state = json.loads(bytes(part(self.files, name, (torch.uint8,), ndim=1).tolist()))
            rows, columns = state["shape"]
            block = state["blocksize"]
            right = all(type(number) is int and number > 0 for number in (rows, columns, block)) and columns % block == 0
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"'{name}' in '{self.directory}' is damaged", REWRITE) from error
        if not right:
            raise CheckpointError(f"'{name}' in '{self.directory}' says blocks of {block} in a weight {state['shape']}", REWRITE)
        return replace(_NF4 if kind == "nf4" else _FP4, group_size=block), state

    def _read4(self, prefix: str) -> QuantizedTensor:
        spec, state = self._spec(prefix)
        rows, columns = state["shape"]
        groups = columns // state["blocksize"]
        stored, name = self.files.entry(f"{prefix}.weight"), f"{prefix}.weight"
        if stored.dtype not in _STORAGES or stored.nbytes * 2 != rows * columns:
            raise CheckpointError(f"'{name}' in '{self.directory}' has {stored.nbytes} bytes for a weight {rows} x {columns}", REWRITE)
        packed = self.files.get(name).reshape(-1).view(torch.uint8)
        values = torch.stack((packed >> 4, packed & 0xF), dim=-1).view(rows, columns)
        table = part(self.files, f"{prefix}.weight.quant_map", (torch.float32,), (16,))
        if spec.type == "nf" and not torch.equal(table, torch.tensor(NF4_VALUES)):
            raise CheckpointError(f"'{prefix}.weight.quant_map' in '{self.directory}' is not NF4's", REWRITE)
        scale = self._absmax(prefix, rows * groups, state).view(rows, groups)
        return QuantizedTensor(values, scale, spec, codebook=None if spec.type == "nf" else finite(table, "quant_map", self.files))

    def _absmax(self, prefix: str, count: int, state: dict[str, Any]) -> torch.Tensor:
        """float32 [count], whether it is quantized once more or not."""
        name = f"{prefix}.weight.absmax"
        stored = part(self.files, name, (torch.float32, torch.uint8), (count,))
        if stored.dtype == torch.float32:
            return finite(stored, name, self.files)
        block, offset = state.get("nested_blocksize", _NESTED), state.get("nested_offset")
        if type(block) is not int or block < 1 or not isinstance(offset, int | float):
            raise CheckpointError(f"'{name}' in '{self.directory}' is quantized, and its quant_state does not say how", REWRITE)
        table = part(self.files, f"{prefix}.weight.nested_quant_map", (torch.float32,), (256,))
        outer = part(self.files, f"{prefix}.weight.nested_absmax", (torch.float32,), (-(-count // block),))
        scale = table[stored.long()] * outer.repeat_interleave(block)[:count] + offset
        return finite(scale, name, self.files)
