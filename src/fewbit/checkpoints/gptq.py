"""The GPTQ layout: what AutoGPTQ began, GPTQModel and AutoRound write, and vLLM, SGLang and transformers load.

A linear `P` of [out, in] with b bits and groups of g columns (per channel: one group, `group_size` -1):

    P.qweight I32 [in * b / 32, out]        the codes of one column of the stored matrix, one dense stream of bits along `in`
    P.qzeros  I32 [in / g, out * b / 32]    the zero points, one dense stream along `out`
    P.scales  F16 [in / g, out]
    P.g_idx   I32 [in]                      the group of each input column; i // g unless columns were reordered (`desc_act`)

    value = (code - zero) * scale           codes and zeros unsigned, 0 .. 2**b - 1; lowest bits first, a 3-bit code may straddle words

**Version 1** (`checkpoint_format: gptq`) stores zero - 1, and the 1 is taken from the *packed word*: a zero of 0 borrows from its
neighbour, and who reads field by field gets that neighbour wrong. GPTQModel subtracts and adds whole words for 2, 4 and 8 bits, and
fields, modulo 8, for 3 bits; so does this reader. **Version 2** (`gptq_v2`) stores the zero itself. Symmetric weights have zero 2**(b-1)
everywhere and no such trouble: they are written in version 1, which every runtime knows, unless `gptq_v2` is asked for. Affine weights are
always written in version 2, in which each of them has one meaning.

vLLM does not look at `qzeros` when `sym` is true, GPTQModel does: a file whose version and zeros contradict each other is therefore refused
here. It also refuses `desc_act`, so columns are written in their order (quantize with static groups), and read in any.

Linears that stay in high precision are named in `dynamic` with a leading `-:`, a regular expression each, and in
`modules_to_not_convert`; the head by `lm_head: false`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from fewbit.checkpoints.layout import (
    REWRITE,
    SCALE_DTYPES,
    Layout,
    LinearsReader,
    boolean,
    finite,
    integer,
    named,
    part,
    quantizer_name,
    sole_format,
)
from fewbit.errors import CheckpointError, FormatError, UnsupportedModelError
from fewbit.formats.packing import pack_values, unpack_bits, unpack_values
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["GptqLayout", "GptqReader", "weight_only_reason"]

_BITS = (2, 3, 4, 8)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class GptqLayout(Layout):
    """The writer.

    Args:
        version: 1 or 2; affine weights are written in version 2 whatever it is.
    """

    def __init__(self, version: int = 1) -> None:
        self._version = version
        self.name = "gptq" if version == 1 else "gptq_v2"

    def supports(self, scheme: Scheme) -> str | None:
        reason = weight_only_reason("GPTQ", scheme)
        if reason is None and scheme.weights is not None and scheme.weights.num_bits not in _BITS:
            reason = f"GPTQ has 2, 3, 4 and 8 bits, not {scheme.weights.num_bits}"
        return reason

    def stored(self, scheme: Scheme) -> Scheme:
        assert scheme.weights is not None
        return replace(scheme, weights=replace(scheme.weights, scale_dtype="float16"))

    def nearest(self, spec: QuantSpec) -> QuantSpec | None:
        if self.supports(Scheme("", weights=spec)) is not None:
            return None
        return replace(spec, scale_dtype="float16")

    def check_shape(self, name: str, rows: int, columns: int, spec: QuantSpec) -> None:
        for count, what in ((columns, "input columns"), (rows, "output rows")):
            if count * spec.num_bits % 32:
                raise FormatError(
                    f"'{name}' has {count} {what}, and {count} codes of {spec.num_bits} bits fill no whole 32-bit words, as GPTQ needs",
                    "leave this linear in high precision, or write compressed-tensors",
                )

    def format_name(self, scheme: Scheme) -> str:
        assert scheme.weights is not None
        return "gptq" if self._version == 1 and scheme.weights.symmetric else "gptq_v2"

    def write_linear(self, prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
        spec = sole_format(prefix, q, scheme)
        rows, columns = q.shape
        self.check_shape(prefix, rows, columns, spec)
        groups = q.scale.shape[1]
        if q.g_idx is not None:
            raise FormatError(f"'{prefix}' has its columns out of order, which vLLM refuses", "quantize with static groups")
        if q.zero_point is not None:
            zeros = q.zero_point.T.contiguous()
        else:  # version 1 stores one less than the zero, and the signed zero is 0
            zeros = torch.full((groups, rows), -1 if self.format_name(scheme) == "gptq" else 0, dtype=torch.int8)
        return {
            f"{prefix}.qweight": pack_values(q.values, spec).view(torch.int32).T.contiguous(),
            f"{prefix}.qzeros": pack_values(zeros, spec).view(torch.int32),
            f"{prefix}.scales": q.scale.T.contiguous(),
            f"{prefix}.g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
        }

    def config_fields(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        spec = scheme.weights
        assert spec is not None
        skipped = [name for name in ignore if name != "lm_head"]
        return {
            "bits": spec.num_bits,
            "group_size": -1 if spec.group_size is None else spec.group_size,
            "sym": spec.symmetric,
            "desc_act": False,
            "true_sequential": True,
            "lm_head": "lm_head" not in ignore,
            "quant_method": "gptq",
            "checkpoint_format": self.format_name(scheme),
            "pack_dtype": "int32",
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in skipped},
            "modules_to_not_convert": skipped,
            "meta": {"quantizer": [quantizer_name()]},
        }

    def companions(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        return {"quantize_config.json": self.config_fields(scheme, ignore)}


def weight_only_reason(label: str, scheme: Scheme) -> str | None:
    """Why a layout of integer weights in groups or channels cannot hold a scheme; None when it can."""
    spec = scheme.weights
    if spec is None:
        return f"{scheme.name} quantizes no weights"
    if scheme.input_activations is not None:
        return f"{label} has no format of input activations"
    if scheme.kv_keys is not None:
        return f"{label} has no format of the KV cache"
    if spec.type != "int":
        return f"{label} has integers only, no {spec.grid_name.upper()}"
    if spec.strategy not in ("group", "channel"):
        return f"{label} has a scale per group or per output channel, none {spec.strategy}"
    return None


class GptqReader(LinearsReader):
    """The reader, for versions 1 and 2, any column order, and AutoRound's `auto_round:auto_gptq`."""

    @property
    def ignore(self) -> tuple[str, ...]:
        dynamic = self.fields.get("dynamic")
        patterns = [name[2:] for name in dynamic if isinstance(name, str) and name.startswith("-:")] if isinstance(dynamic, dict) else []
        return (*(() if self.fields.get("lm_head") else ("lm_head",)), *(f"re:{pattern}" for pattern in patterns))

    @cached_property
    def linears(self) -> tuple[str, ...]:
        return tuple(name.removesuffix(".qweight") for name in self.files.names() if name.endswith(".qweight"))

    @cached_property
    def version(self) -> int:
        """1 or 2.

        Raises:
            UnsupportedModelError: packed for one kernel only (Marlin, BitBLAS, ...).
        """
        name = self.fields.get("checkpoint_format") or self.fields.get("packing_format") or self.fields.get("format") or "gptq"
        versions = {"gptq": 1, "gptq_v2": 2, "auto_round:auto_gptq": 1, "auto_round:gptqmodel": 2}
        if not isinstance(name, str) or name not in versions:
            raise UnsupportedModelError(f"'{self.directory}' is packed as {name!r}", f"fewbit reads {', '.join(versions)}")
        return versions[name]

    @cached_property
    def scheme(self) -> Scheme:
        if not self.linears:
            raise CheckpointError(f"'{self.directory}' says that it is quantized, and no linear in it is", REWRITE)
        bits, group_size = integer(self.fields, "bits", self.directory), integer(self.fields, "group_size", self.directory)
        if bits not in _BITS or not (group_size == -1 or group_size > 0):
            raise CheckpointError(f"'{self.directory}' says bits = {bits} and group_size = {group_size}", "GPTQ has 2, 3, 4 or 8 bits")
        dtype = self.files.dtype(f"{self.linears[0]}.scales")
        if dtype not in _FLOATS:
            raise CheckpointError(f"'{self.directory}' has scales in {dtype}", REWRITE)
        spec = QuantSpec(
            bits,
            strategy="channel" if group_size == -1 else "group",
            group_size=None if group_size == -1 else group_size,
            symmetric=boolean(self.fields, "sym", self.directory, True),
            scale_dtype=SCALE_DTYPES[dtype],
        )
        return named(Scheme("", weights=spec))

    def read(self, prefix: str) -> QuantizedTensor:
        spec = self.scheme.weights
        assert spec is not None
        packed = part(self.files, f"{prefix}.qweight", (torch.int32,))
        rows, columns = packed.shape[1], packed.shape[0] * 32 // spec.num_bits
        groups = 1 if spec.group_size is None else columns // spec.group_size
        if groups * (spec.group_size or columns) != columns or packed.shape[0] * 32 % spec.num_bits:
            raise CheckpointError(f"'{prefix}.qweight' in '{self.directory}' has {columns} columns, no whole groups of {spec}", REWRITE)
        values = unpack_values(packed.T.contiguous().view(torch.uint8), spec, columns)
        del packed
        scale = finite(part(self.files, f"{prefix}.scales", _FLOATS, (groups, rows)), f"{prefix}.scales", self.files)
        stored = replace(spec, scale_dtype=SCALE_DTYPES[scale.dtype])
        return QuantizedTensor(
            values,
            scale.T.clone(memory_format=torch.contiguous_format),
            stored,
            self._zero_point(prefix, rows, groups, spec),
            self._columns(prefix, columns, groups),
        )

    def _zero_point(self, prefix: str, rows: int, groups: int, spec: QuantSpec) -> torch.Tensor | None:
        """int8 [rows, groups] in the signed range; None for symmetric weights, whose stored zeros must say so."""
        bits, half = spec.num_bits, 2 ** (spec.num_bits - 1)
        name = f"{prefix}.qzeros"
        if rows * bits % 32:
            raise CheckpointError(f"'{name}' in '{self.directory}': {rows} zeros of {bits} bits fill no whole words", REWRITE)
        words = part(self.files, name, (torch.int32,), (groups, rows * bits // 32))
        if self.version == 1 and bits != 3:
            words = words + _ones(bits)  # as GPTQModel does it: on the whole word, with its carries
        codes = unpack_bits(words.contiguous().view(torch.uint8), bits, rows)
        if self.version == 1 and bits == 3:
            codes = (codes + 1) & 7
        if spec.symmetric:
            wrong = codes[codes != half]
            if wrong.numel():
                raise CheckpointError(
                    f"'{name}' in '{self.directory}' has the zero point {int(wrong[0])} where symmetric {bits}-bit weights have {half}",
                    "config.json says sym or checkpoint_format wrongly: versions 1 and 2 of GPTQ differ by one in the zero points",
                )
            return None
        signed: torch.Tensor = (codes.to(torch.int16) - half).to(torch.int8)
        return signed.T.contiguous()

    def _columns(self, prefix: str, columns: int, groups: int) -> torch.Tensor | None:
        """The group of each column; None when columns are in order."""
        name = f"{prefix}.g_idx"
        if name not in self.files:
            return None
        g_idx = part(self.files, name, (torch.int32,), (columns,))
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise CheckpointError(f"'{name}' in '{self.directory}' points to groups from {int(g_idx.min())} to {int(g_idx.max())}", REWRITE)
        in_order = torch.equal(g_idx, torch.arange(columns, dtype=torch.int32) // (columns // groups))
        return None if in_order else g_idx


def _ones(bits: int) -> int:
    """A 32-bit word with a 1 in each field, as a signed integer."""
    return sum(1 << shift for shift in range(0, 32, bits))
