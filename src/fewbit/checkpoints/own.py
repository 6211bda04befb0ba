"""fewbit's own layout: what no other one has a word for. NF4 in groups of any size, 2- and 3-bit groups, FP8 E5M2, outlier columns.

A linear `P` of [out, in] with b bits:

    P.weight_codes        U8 [out, in * b / 8]      values, densely packed, the lowest bits first (`formats.packing`)
    P.weight_scale        [1, 1], [out, 1], [out, in / g] or [out / r, in / c], in the scheme's dtype of scales
    P.weight_zero_point   I8, as the scales         affine formats
    P.weight_global_scale F32 [1]                   NVFP4
    P.input_scale         F32 [1]                   static formats of inputs

and config.json's `quantization_config` is `{"quant_method": "fewbit", "format_version": 1, "scheme": {...}, "ignore": [...]}` with the
scheme in the words of `formats.spec`. The rows of every tensor are the rows of the weight, so that a runtime that merges q, k and v can
put their tensors under each other as they are.

transformers loads it after `import fewbit` (`runtime.transformers_quantizer`) and vLLM with fewbit installed beside it
(`runtime.vllm_plugin`); both run fewbit's kernels. Other programs do not read it: where another layout holds the scheme, take that one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from fewbit.checkpoints.layout import REWRITE, Layout, LinearsReader, finite, part, sole_format, torch_dtype
from fewbit.checkpoints.steps import keep_linear
from fewbit.errors import CheckpointError, FormatError, UnsupportedModelError
from fewbit.formats.packing import unpack_values
from fewbit.formats.sizes import packed_length, scale_shape
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["METHOD", "OwnLayout", "OwnReader", "is_ignored", "parse_scheme", "stored_shapes", "stored_tensor"]

METHOD = "fewbit"
_VERSION = 1


def parse_scheme(fields: Mapping[str, Any], where: str) -> Scheme:
    """The scheme of a `quantization_config`.

    Args:
        where: the checkpoint, for the message.

    Raises:
        UnsupportedModelError: a newer version of the layout.
        CheckpointError: fields that are missing, of wrong types, or contradict each other.
    """
    if fields.get("format_version") != _VERSION:
        raise UnsupportedModelError(
            f"'{where}' is in version {fields.get('format_version')!r} of fewbit's layout, this fewbit reads {_VERSION}", "upgrade fewbit"
        )
    try:
        scheme = TypeAdapter(Scheme).validate_json(json.dumps(fields["scheme"]), strict=True)
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the quantization_config of '{where}' has no valid scheme: {what}", REWRITE) from error
    except FormatError as error:
        raise CheckpointError(f"the quantization_config of '{where}' contradicts itself: {error.problem}", REWRITE) from error
    if scheme.weights is None or scheme.weights.type == "codebook":
        raise CheckpointError(f"the quantization_config of '{where}' has no format of weights that this layout stores", REWRITE)
    return scheme


def stored_shapes(
    spec: QuantSpec, rows: int, columns: int, *, static_inputs: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors of one linear [rows, columns]: name to shape and dtype.

    Raises:
        FormatError: groups or blocks that do not divide it.
    """
    scale = scale_shape(spec, rows, columns)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_codes": ((rows, packed_length(columns, spec.num_bits)), torch.uint8),
        "weight_scale": (scale, torch_dtype(spec.scale_dtype)),
    }
    if not spec.symmetric:
        tensors["weight_zero_point"] = (scale, torch.int8)
    if spec.global_scale:
        tensors["weight_global_scale"] = ((1,), torch.float32)
    if static_inputs:
        tensors["input_scale"] = ((1,), torch.float32)
    return tensors


def stored_tensor(tensors: Mapping[str, torch.Tensor], spec: QuantSpec, columns: int) -> QuantizedTensor:
    """One linear's weight out of its tensors by the last part of their names."""
    return QuantizedTensor(
        unpack_values(tensors["weight_codes"], spec, columns),
        tensors["weight_scale"],
        spec,
        zero_point=tensors.get("weight_zero_point"),
        global_scale=tensors.get("weight_global_scale"),
        input_scale=tensors.get("input_scale"),
    )


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether the linear of that dotted name is stored in high precision: it stands in the list, or its last part does."""
    return any(fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern for pattern in ignore)


class OwnLayout(Layout):
    """The writer."""

    name = METHOD

    def supports(self, scheme: Scheme) -> str | None:
        if scheme.weights is None:
            return f"{scheme.name} quantizes no weights"
        return "fewbit's layout has no codebooks" if scheme.weights.type == "codebook" else None

    def nearest(self, spec: QuantSpec) -> QuantSpec | None:
        return None if spec.type == "codebook" else spec

    def check_shape(self, name: str, rows: int, columns: int, spec: QuantSpec) -> None:
        if columns * spec.num_bits % 8:
            raise FormatError(
                f"'{name}' has {columns} input columns, and {columns} codes of {spec.num_bits} bits fill no whole bytes",
                "leave this linear in high precision",
            )

    def format_name(self, scheme: Scheme) -> str:
        assert scheme.weights is not None
        return scheme.weights.grid_name

    def write_linear(self, prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
        spec = sole_format(prefix, q, scheme)
        self.check_shape(prefix, *q.shape, spec)
        if q.g_idx is not None or q.codebook is not None:
            raise FormatError(f"'{prefix}' has its columns out of order, or a codebook, which fewbit's layout does not store")
        return keep_linear(prefix, q, scheme)

    def config_fields(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        return {"quant_method": METHOD, "format_version": _VERSION, "scheme": asdict(scheme), "ignore": list(ignore)}


class OwnReader(LinearsReader):
    """The reader."""

    @property
    def ignore(self) -> tuple[str, ...]:
        given = self.fields.get("ignore")
        return tuple(name for name in given if isinstance(name, str)) if isinstance(given, list) else ()

    @cached_property
    def linears(self) -> tuple[str, ...]:
        return tuple(name.removesuffix(".weight_codes") for name in self.files.names() if name.endswith(".weight_codes"))

    @cached_property
    def scheme(self) -> Scheme:
        scheme = parse_scheme(self.fields, str(self.directory))
        if not self.linears:
            raise CheckpointError(f"'{self.directory}' says that it is quantized, and no linear in it is", REWRITE)
        return scheme

    def read(self, prefix: str) -> QuantizedTensor:
        spec, inputs = self.scheme.weights, self.scheme.input_activations
        assert spec is not None
        shape = self.files.shape(f"{prefix}.weight_codes")
        if len(shape) != 2 or not all(shape):
            raise CheckpointError(f"'{prefix}.weight_codes' in '{self.directory}' is {list(shape)}, not a matrix", REWRITE)
        columns = shape[1] * 8 // spec.num_bits
        try:
            expected = stored_shapes(spec, shape[0], columns, static_inputs=inputs is not None and not inputs.dynamic)
        except FormatError as error:
            raise CheckpointError(f"'{prefix}' in '{self.directory}': {error.problem}", REWRITE) from error
        tensors = {name: part(self.files, f"{prefix}.{name}", (dtype,), wanted) for name, (wanted, dtype) in expected.items()}
        for name, tensor in tensors.items():
            finite(tensor, f"{prefix}.{name}", self.files)
        return stored_tensor(tensors, spec, columns)
