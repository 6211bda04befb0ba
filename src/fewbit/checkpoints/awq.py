"""The AWQ layout, version GEMM: what AutoAWQ began, GPTQModel and AutoRound write, and vLLM, SGLang and transformers load.

A linear `P` of [out, in] with groups of g columns, always 4 bits and always with zero points:

    P.qweight I32 [in, out / 8]         eight neighbouring *outputs* of one input column in a word
    P.qzeros  I32 [in / g, out / 8]     likewise
    P.scales  F16 [in / g, out]

    bits 4i .. 4i + 3 of a word are output   0 2 4 6 1 3 5 7   of its eight, for i = 0 .. 7

    value = (code - zero) * scale       codes and zeros unsigned, 0 .. 15

The order of the nibbles suits the GPU kernel that came first: it takes the even outputs with one mask and shift, and the odd ones with the
next. Symmetric weights are the case zero = 8: a checkpoint in which all zeros are 8 is read as symmetric.

The layout says nothing of activation-aware scaling: its factors are folded into the layer in front, and what is stored is a plain model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from fewbit.checkpoints.gptq import weight_only_reason
from fewbit.checkpoints.layout import (
    REWRITE,
    SCALE_DTYPES,
    Layout,
    LinearsReader,
    finite,
    integer,
    named,
    part,
    quantizer_name,
    sole_format,
)
from fewbit.errors import CheckpointError, FormatError, UnsupportedModelError
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["AwqLayout", "AwqReader"]

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that nibble i holds
_ALL_EIGHT = 0x88888888 - 2**32
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class AwqLayout(Layout):
    """The writer."""

    name = "awq"

    def supports(self, scheme: Scheme) -> str | None:
        reason = weight_only_reason("AWQ", scheme)
        if reason is None and scheme.weights is not None and scheme.weights.num_bits != 4:
            reason = f"AWQ has 4 bits, not {scheme.weights.num_bits}"
        return reason

    def stored(self, scheme: Scheme) -> Scheme:
        assert scheme.weights is not None
        return replace(scheme, weights=replace(scheme.weights, scale_dtype="float16"))

    def nearest(self, spec: QuantSpec) -> QuantSpec | None:
        """Fewer bits are codes of INT4, too, and symmetric weights have zero points of 8."""
        if spec.type != "int" or spec.num_bits > 4 or spec.strategy not in ("group", "channel"):
            return None
        return QuantSpec(4, strategy=spec.strategy, group_size=spec.group_size, symmetric=spec.symmetric, scale_dtype="float16")

    def check_shape(self, name: str, rows: int, columns: int, spec: QuantSpec) -> None:
        if rows % 8:
            raise FormatError(
                f"'{name}' has {rows} output rows, and AWQ packs eight of them into a word",
                "leave this linear in high precision, or write compressed-tensors",
            )

    def format_name(self, scheme: Scheme) -> str:
        return "gemm"

    def write_linear(self, prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
        spec = sole_format(prefix, q, scheme)
        self.check_shape(prefix, *q.shape, spec)
        if q.g_idx is not None:
            raise FormatError(f"'{prefix}' has its columns out of order, which AWQ cannot say", "quantize with static groups")
        zeros = torch.zeros(q.scale.shape, dtype=torch.int8) if q.zero_point is None else q.zero_point
        return {f"{prefix}.qweight": _packed(q.values), f"{prefix}.qzeros": _packed(zeros), f"{prefix}.scales": q.scale.T.contiguous()}

    def config_fields(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        spec = scheme.weights
        assert spec is not None
        return {
            "bits": 4,
            "group_size": -1 if spec.group_size is None else spec.group_size,
            "zero_point": True,
            "version": "gemm",
            "quant_method": "awq",
            "modules_to_not_convert": list(ignore),
            "meta": {"quantizer": [quantizer_name()]},
        }


class AwqReader(LinearsReader):
    """The reader, for AutoAWQ's, GPTQModel's and AutoRound's files."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        version = self.fields.get("version") or self.fields.get("format") or "gemm"
        if not isinstance(version, str) or version.lower() not in ("gemm", "auto_round:auto_awq"):
            raise UnsupportedModelError(f"'{self.directory}' is AWQ packed as {version!r}", "fewbit reads the version 'gemm'")

    @property
    def ignore(self) -> tuple[str, ...]:
        names = self.fields.get("modules_to_not_convert")
        return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()

    @cached_property
    def linears(self) -> tuple[str, ...]:
        return tuple(name.removesuffix(".qweight") for name in self.files.names() if name.endswith(".qweight"))

    @cached_property
    def scheme(self) -> Scheme:
        if not self.linears:
            raise CheckpointError(f"'{self.directory}' says that it is quantized, and no linear in it is", REWRITE)
        bits, group_size = (integer(self.fields, name, self.directory) for name in ("bits", "group_size"))
        if bits != 4 or not (group_size == -1 or group_size > 0):
            raise CheckpointError(f"'{self.directory}' says bits = {bits} and group_size = {group_size}", "AWQ has 4 bits")
        dtype = self.files.dtype(f"{self.linears[0]}.scales")
        if dtype not in _FLOATS:
            raise CheckpointError(f"'{self.directory}' has scales in {dtype}", REWRITE)
        zeros = (f"{prefix}.qzeros" for prefix in self.linears)
        spec = QuantSpec(
            4,
            strategy="channel" if group_size == -1 else "group",
            group_size=None if group_size == -1 else group_size,
            symmetric=all(bool((part(self.files, name, (torch.int32,)) == _ALL_EIGHT).all()) for name in zeros),
            scale_dtype=SCALE_DTYPES[dtype],
        )
        return named(Scheme("", weights=spec))

    def read(self, prefix: str) -> QuantizedTensor:
        spec = self.scheme.weights
        assert spec is not None
        packed = part(self.files, f"{prefix}.qweight", (torch.int32,))
        columns, rows = packed.shape[0], packed.shape[1] * 8
        groups = 1 if spec.group_size is None else columns // spec.group_size
        if groups * (spec.group_size or columns) != columns:
            raise CheckpointError(f"'{prefix}.qweight' in '{self.directory}' has {columns} columns, no whole groups of {spec}", REWRITE)
        values = _unpacked(packed)
        zeros = _unpacked(part(self.files, f"{prefix}.qzeros", (torch.int32,), (groups, rows // 8)))
        scale = finite(part(self.files, f"{prefix}.scales", _FLOATS, (groups, rows)), f"{prefix}.scales", self.files)
        stored = replace(spec, scale_dtype=SCALE_DTYPES[scale.dtype])
        return QuantizedTensor(values, scale.T.clone(memory_format=torch.contiguous_format), stored, None if spec.symmetric else zeros)


def _packed(values: torch.Tensor) -> torch.Tensor:
    """int8 [out, n] in -8 .. 7 -> int32 [n, out / 8]."""
    codes = (values.T.contiguous() + 8).view(torch.uint8).view(values.shape[1], -1, 8)[..., list(_ORDER)]
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous().view(torch.int32).squeeze(-1)


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, out / 8] -> int8 [out, n] in -8 .. 7."""
    pairs = words.contiguous().view(torch.uint8).view(words.shape[0], -1, 4)
    codes = torch.empty(*pairs.shape[:2], 8, dtype=torch.uint8)
    for nibble, output in enumerate(_ORDER):
        codes[..., output] = pairs[..., nibble // 2] >> 4 if nibble % 2 else pairs[..., nibble // 2] & 0xF
    return codes.view(torch.int8).sub_(8).flatten(1).T.contiguous()
