"""`fewbit inspect`: what is in this checkpoint, who runs it, and is it at peace with itself? In a moment, whoever made it.

Only headers and configuration are read, and one linear of each kind in full: that is where a layout and a configuration that do not belong
together show. `fewbit verify` reads everything.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit.checkpoints.gguf_blocks import DENSE
from fewbit.checkpoints.gguf_source import GgufSource
from fewbit.checkpoints.layout import is_cache_scale
from fewbit.checkpoints.runtimes import kind_of, runtimes
from fewbit.checkpoints.sources import DirectorySource, open_source
from fewbit.errors import FewbitError, KernelError, UnsupportedModelError, UsageError
from fewbit.formats.grids import get_grid
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.dispatch import select
from fewbit.models.experts import is_router
from fewbit.models.names import disk_names
from fewbit.models.structure import build_empty_model
from fewbit.results import HardwareSupport, InspectResult, PassedOverKernel, RuntimeCell, StoredFormat

__all__ = ["inspect_checkpoint"]

_MOST = 10  # problems of one sort that are told
_FOREIGN_PARTS = (".qweight", ".weight_packed", ".weight_scale", ".SCB", "._weight_qdata", ".weight.absmax", ".weight_scale_inv")
_COMPANION_FIELDS = ("bits", "group_size", "sym", "desc_act", "quant_algo")


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the model as it is stored."""

    name: str
    shape: tuple[int, ...]
    stored_bytes: int
    format: str
    spec: QuantSpec | None
    linear: bool
    quantized: bool = False


def inspect_checkpoint(checkpoint: str | Path) -> InspectResult:
    """Describe a checkpoint.

    Args:
        checkpoint: a directory, a GGUF file or a hub id, in any layout that fewbit reads or in high precision.

    Raises:
        ModelNotFoundError: there is none.
        UnsupportedModelError: a layout or an architecture that fewbit does not read.
        CheckpointError: files that cannot be read at all.
    """
    source = open_source(checkpoint)
    if not isinstance(source, DirectorySource | GgufSource):
        raise UsageError(f"'{checkpoint}' is no checkpoint", "name a directory, a GGUF file or a hub id")
    model = build_empty_model(source.config)
    names = disk_names(model, source.names())
    of_model = {disk: name for name, disk in names.single.items()}
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors, problems = [], []
    for name in source.names():
        known = of_model.get(name, name)
        try:
            tensors.append(_tensor(source, name, shapes.get(known), known in linears))
        except FewbitError as error:
            problems.append(error.problem)
    problems += _inventory(model, [*names.single, *names.merged], names.unknown)
    problems += _samples(source, tensors, {name: shapes.get(of_model.get(name, name)) for name in source.names()})
    problems += _contradictions(source, tensors)
    quantized = [tensor for tensor in tensors if tensor.quantized]
    parameters, stored = sum(prod(t.shape) for t in tensors), sum(t.stored_bytes for t in tensors)
    weights = sum(prod(t.shape) for t in quantized)
    scheme = source.scheme
    kind, cells = _runtimes(Path(source.file.path if isinstance(source, GgufSource) else source.directory or checkpoint))
    return InspectResult(
        schema_version=1,
        checkpoint=str(checkpoint),
        architecture=source.config.model_type,
        layout=source.layout,
        kind=kind,
        scheme="" if scheme is None else scheme.name,
        weights=str(scheme.weights) if scheme is not None and scheme.weights is not None else "",
        input_activations=_inputs(scheme),
        kv_cache=str(scheme.kv_keys) if scheme is not None and scheme.kv_keys is not None else "",
        parameters=parameters,
        quantized_parameters=weights,
        stored_bytes=stored,
        effective_bits_per_weight=8 * sum(t.stored_bytes for t in quantized) / weights if weights else None,
        effective_bits_per_parameter=8 * stored / max(parameters, 1),
        formats=_formats(tensors, scheme),
        runtimes=cells,
        hardware=_hardware(scheme),
        problems=problems,
        notes=[*source.notes, *_notes(source)],
    )


def _inputs(scheme: Scheme | None) -> str:
    if scheme is None or scheme.input_activations is None:
        return ""
    return f"{scheme.input_activations}, {'dynamic' if scheme.input_activations.dynamic else 'static'}"


def _tensor(source: DirectorySource | GgufSource, name: str, shape: tuple[int, ...] | None, linear: bool) -> _Tensor:
    """How one tensor is stored; of a quantized linear by the scheme, since its numbers are not read."""
    prefix = name.removesuffix(".weight")
    quantized = name.endswith(".weight") and prefix in source.quantized_linears
    if isinstance(source, GgufSource):
        stored = source.file.tensors[source.disk_name(name)]
        q = source.spec_of(prefix) if quantized else None
        kind = stored.type.name if q is None else f"{q} ({stored.type.name})"
        return _Tensor(name, stored.shape, stored.nbytes, kind, q, linear, stored.type not in DENSE.values())
    if not quantized:
        dtype = str(source.files.dtype(name)).removeprefix("torch.")
        return _Tensor(name, source.files.shape(name), source.files.nbytes(name), dtype, None, linear)
    assert source.reader is not None and source.scheme is not None
    parts = [part for part in source.reader.parts(prefix) if not is_cache_scale(part)]
    spec = source.scheme.weights
    size = sum(source.files.nbytes(part) for part in parts)
    return _Tensor(name, shape or source.shape(name), size, str(spec), spec, linear, True)


def _formats(tensors: Iterable[_Tensor], scheme: Scheme | None) -> list[StoredFormat]:
    """What is stored how, and which kernel runs it here."""
    groups: dict[str, list[_Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.format].append(tensor)
    found = []
    for name, members in groups.items():
        linears = [tensor for tensor in members if tensor.linear]
        kernel, passed_over = _kernel(max(linears, key=lambda t: prod(t.shape)), scheme) if linears else (None, [])
        found.append(
            StoredFormat(
                format=name,
                linears=len(linears),
                others=len(members) - len(linears),
                parameters=sum(prod(tensor.shape) for tensor in members),
                stored_bytes=sum(tensor.stored_bytes for tensor in members),
                example=members[0].name,
                kernel=kernel,
                passed_over=passed_over,
            )
        )
    return sorted(found, key=lambda one: -one.parameters)


def _kernel(linear: _Tensor, scheme: Scheme | None) -> tuple[str | None, list[PassedOverKernel]]:
    inputs = scheme.input_activations if scheme is not None and linear.spec is not None else None
    try:
        chosen = select(KernelRequest(linear.spec, inputs, linear.shape[0], linear.shape[1], "cpu", torch.bfloat16))
    except KernelError as error:
        return None, [PassedOverKernel(kernel="all", reason=error.problem)]
    return chosen.kernel.name, [PassedOverKernel(kernel=p.kernel, reason=p.reason) for p in chosen.passed_over]


def _runtimes(path: Path) -> tuple[str | None, list[RuntimeCell]]:
    """The row of the matrix."""
    try:
        kind = kind_of(path)
    except UnsupportedModelError:
        return None, []
    cells = []
    for runtime in runtimes():
        reason = kind.reason_against(runtime.name)
        cells.append(RuntimeCell(runtime.title, reason is None, reason, runtime.versions))
    return kind.title, cells


def _hardware(scheme: Scheme | None) -> list[HardwareSupport]:
    """Who multiplies weights and inputs in the formats they have; weights alone are widened first everywhere."""
    if scheme is None or scheme.weights is None or scheme.input_activations is None:
        return []
    weights, inputs = (get_grid(spec.grid_name).native for spec in (scheme.weights, scheme.input_activations))
    return [HardwareSupport(hardware=one.hardware, source=one.source) for one in weights if one in inputs]


# --------------------------------------------------------------------------------------------------------------- contradictions


def _inventory(model: nn.Module, found: Iterable[str], unknown: Iterable[str]) -> list[str]:
    """Tensors that the architecture needs and the checkpoint lacks, and the other way round."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    missing = sorted(set(model.state_dict()) - set(found) - tied)
    problems = _told("tensor '{}' of the architecture is missing", missing)
    foreign = sorted(name for name in unknown if not name.endswith("rotary_emb.inv_freq"))
    return problems + _told("tensor '{}' belongs to no part of the architecture", foreign)


def _told(sentence: str, names: list[str]) -> list[str]:
    more = [f"... and {len(names) - _MOST} more like it"] if len(names) > _MOST else []
    return [sentence.format(name) for name in names[:_MOST]] + more


def _samples(source: DirectorySource | GgufSource, tensors: Iterable[_Tensor], shapes: Mapping[str, tuple[int, ...] | None]) -> list[str]:
    """One quantized linear of each kind, read in full."""
    problems, seen = [], set()
    for tensor in tensors:
        kind = tensor.name.split(".")[-2]
        if tensor.spec is None or kind in seen:
            continue
        seen.add(kind)
        try:
            q = source.get_quantized(tensor.name.removesuffix(".weight"))
        except FewbitError as error:
            problems.append(error.problem)
            continue
        expected = shapes.get(tensor.name)
        if q is not None and expected is not None and tuple(q.shape) != expected:
            problems.append(f"'{tensor.name}' holds {list(q.shape)} numbers, the configuration says {list(expected)}")
    return problems


def _contradictions(source: DirectorySource | GgufSource, tensors: list[_Tensor]) -> list[str]:
    problems = []
    linears = [tensor for tensor in tensors if tensor.linear]
    if isinstance(source, DirectorySource):
        if source.reader is None:
            foreign = [name for name in source.files.names() if name.endswith(_FOREIGN_PARTS)]
            problems += _told("'{}' belongs to a quantized layout, and config.json names none", foreign)
        else:
            problems += _quantized_contradictions(source, linears)
        problems += _companions(source)
    integers = [
        t.name for t in tensors if t.spec is None and t.linear and not t.format.startswith(("float", "bfloat", "F", "B", "Q", "I", "T"))
    ]
    return problems + _told("linear '{}' holds integers, and nothing says how to read them", integers)


def _quantized_contradictions(source: DirectorySource, linears: list[_Tensor]) -> list[str]:
    """Between what config.json says and what is there."""
    assert source.reader is not None
    problems = []
    kept = [tensor.name for tensor in linears if tensor.spec is None and not is_router(tensor.name.removesuffix(".weight"))]
    if not source.quantized_linears and source.scheme is not None and source.scheme.weights is not None:
        problems.append("config.json says that it is quantized, and no linear is")
    named = source.reader.ignore
    kinds = Counter(tensor.name.split(".")[-2] for tensor in linears if tensor.spec is not None)
    unnamed = [name for name in kept if name.split(".")[-2] in kinds and not any(_names(entry, name) for entry in named)]
    problems += _told("linear '{}' is in high precision, others of its kind are quantized, and config.json does not name it", unnamed)
    wrongly = [t.name for t in linears if t.spec is not None and any(entry == t.name.removesuffix(".weight") for entry in named)]
    problems += _told("linear '{}' is quantized, and config.json names it among those that are not", wrongly)
    said = source.scheme is not None and source.scheme.kv_keys is not None and not source.scheme.kv_keys.dynamic
    if said and not source.reader.cache_scales:
        problems.append("config.json says that the KV cache has static scales, and there are none")
    if source.reader.cache_scales and not said:
        problems.append(f"'{source.reader.cache_scales[0]}' is a scale of the KV cache, and config.json says nothing of it")
    return problems


def _names(entry: str, name: str) -> bool:
    """Whether an entry of a list of exceptions means a linear: its dotted name, a part of it, or a regular expression."""
    return entry.startswith("re:") or entry in name


def _companions(source: DirectorySource) -> list[str]:
    """Other files that describe the quantization, where they say something else than config.json."""
    assert source.directory is not None
    problems = []
    own = source.reader.fields if source.reader is not None else {}
    for file in ("quantize_config.json", "hf_quant_config.json"):
        path = source.directory / file
        if not path.is_file():
            continue
        try:
            fields: Any = json.loads(path.read_text(encoding="utf-8"))
            fields = fields.get("quantization", fields)
            differing = [key for key in _COMPANION_FIELDS if key in fields and key in own and fields[key] != own[key]]
        except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
            problems.append(f"'{file}' cannot be read: {error}")
            continue
        problems += [f"'{file}' says {key} = {fields[key]!r}, config.json {own[key]!r}" for key in differing]
    return problems


def _notes(source: DirectorySource | GgufSource) -> list[str]:
    """What a server would miss."""
    try:
        tokenizer = source.tokenizer()
    except FewbitError as error:
        return [error.problem]
    vocabulary = int(source.config.get_text_config(decoder=True).vocab_size)
    notes = [] if len(tokenizer) <= vocabulary else [f"the tokenizer has {len(tokenizer)} tokens, the embedding {vocabulary} rows"]
    return notes if tokenizer.chat_template else [*notes, "no chat template: a server answers completions, not chats"]
