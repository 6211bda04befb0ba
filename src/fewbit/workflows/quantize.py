"""`fewbit quantize`: a model in, a checkpoint out that vLLM, SGLang and transformers load.

The source streams through: one tensor is read, quantized, written and forgotten before the next, so that the peak is about one tensor
however large the model. Everything that can be known to fail - the scheme, group sizes, the output directory - fails before the first
tensor is read, and what was written is compared with the source before the directory gets its name.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbit.checkpoints.compressed_tensors import CompressedTensorsReader, layout_format, quantization_config, supports, write_linear
from fewbit.checkpoints.directory import MAX_SHARD_BYTES, ShardWriter, output_directory
from fewbit.checkpoints.model_card import model_card, source_licence
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.checkpoints.sources import TensorSource, open_source
from fewbit.errors import CheckpointError, FormatError, OutputError, UnsupportedModelError, UsageError
from fewbit.formats.cost import packed_bytes
from fewbit.formats.grouping import scale_shape
from fewbit.formats.scales import Observer
from fewbit.formats.spec import SCHEMES, QuantSpec, Scheme, get_scheme
from fewbit.methods.rtn import rtn
from fewbit.models.structure import build_empty_model, is_ignored
from fewbit.results import QuantizeResult
from fewbit.workflows.environment import environment

__all__ = ["METHODS", "quantize_model"]

ProgressCallback = Callable[[int, int, str], None]
METHODS = ("rtn",)
_LAYOUT = "compressed-tensors"
# What a complete directory has beside weights and config.json. No Python: fewbit neither runs nor passes on code of a checkpoint.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "*preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)


def quantize_model(
    model: str | Path | None = None,
    *,
    scheme: str | Scheme,
    out: str | Path,
    method: str = "rtn",
    group_size: int | None = None,
    observer: str = "minmax",
    ignore: Sequence[str] = ("lm_head",),
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressCallback | None = None,
) -> QuantizeResult:
    """Quantize a model into a new Hugging Face directory in the compressed-tensors layout.

    Args:
        model: a directory or a hub id; the bundled reference model when None.
        scheme: a preset's name or a scheme.
        out: the directory to make; work in progress lives in `out` with `.partial` appended.
        method: how the numbers are chosen; `rtn`.
        group_size: weights that share a scale, in place of an integer scheme's own.
        observer: `minmax` or `mse`.
        ignore: linears that stay in high precision: shell patterns on the dotted name or its last part.
        overwrite: replace an existing checkpoint.
        progress: called with (tensors done, tensors, name).

    Raises:
        UsageError: an unknown scheme or method, a scheme that the layout lacks, a pattern that matches nothing.
        ModelError, CheckpointError: the source cannot be used, or has NaN or infinite weights.
        FormatError: a group size that does not divide a layer.
        OutputError: the directory exists or cannot be written.
    """
    started = time.monotonic()
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}'", f"only {', '.join(METHODS)} exists yet")
    scales_by = _checked_observer(observer)
    resolved = _resolve_scheme(scheme, group_size)
    source = open_source(model)
    plan = _plan(source, resolved, tuple(ignore))
    if source.directory is not None and Path(out).resolve() == source.directory.resolve():
        raise UsageError(f"'{out}' is the source itself", "name another directory")
    with output_directory(out, overwrite=overwrite) as partial:
        totals = _write_weights(source, resolved, plan, scales_by, ShardWriter(partial, max_shard_bytes), progress)
        _compare_inventories(source, plan, partial)
        result = QuantizeResult(
            model=source.describe(),
            out=str(out),
            scheme=resolved.name,
            weights=str(resolved.weights),
            input_activations=str(resolved.input_activations or "BF16"),
            method=method,
            observer=observer,
            layout=_LAYOUT,
            layout_format=layout_format(resolved),
            quantized_linears=len(plan.quantized),
            ignored_linears=plan.ignored,
            kept_tensors=len(source.names()) - len(plan.quantized),
            parameters=totals.parameters,
            quantized_parameters=totals.quantized_parameters,
            source_bytes=totals.source_bytes,
            checkpoint_bytes=totals.checkpoint_bytes,
            effective_bits_per_weight=8 * totals.quantized_bytes / totals.quantized_parameters,
            effective_bits_per_parameter=8 * totals.checkpoint_bytes / totals.parameters,
            duration_s=time.monotonic() - started,
            source_sha256=source.sha256(),
        )
        _write_companions(plan, resolved, result, partial)
    return result


@dataclass(frozen=True)
class _Plan:
    """What happens to which tensor.

    Attributes:
        directory: the source's.
        quantized: dotted names of the linears to quantize, with their shapes [out, in].
        ignored: linears that stay in high precision, those that transformers does not build (extra heads) included.
    """

    directory: Path
    quantized: dict[str, tuple[int, int]]
    ignored: list[str]


def _checked_observer(name: str) -> Observer:
    names: tuple[Observer, ...] = get_args(Observer)
    for observer in names:
        if observer == name:
            return observer
    raise UsageError(f"unknown observer '{name}'", f"choose one of {', '.join(names)}")


def _resolve_scheme(scheme: str | Scheme, group_size: int | None) -> Scheme:
    """The scheme with another group size put in, and refused when the layout lacks it."""
    resolved = get_scheme(scheme) if isinstance(scheme, str) else scheme
    reason = supports(resolved)
    if reason is not None:
        raise UsageError(f"scheme {resolved.name} cannot be written: {reason}", "choose another scheme, or run it without a checkpoint")
    spec = resolved.weights
    assert spec is not None
    if spec.scale_dtype == "float32":
        # Loaders keep this layout's scales in the model's dtype. Rounded here, before the integers are computed, they lose nothing there.
        spec = replace(spec, scale_dtype="bfloat16")
        resolved = replace(resolved, weights=spec)
    if group_size is None or group_size == spec.group_size:
        return resolved
    if spec.type != "int" or resolved.input_activations is not None:
        raise UsageError(
            f"scheme {resolved.name} has no choice of group size", "leave the group size out, or take an integer weight-only scheme"
        )
    regrouped = replace(resolved, name="", weights=replace(spec, strategy="group", group_size=group_size))
    base = resolved.name.split("-G")[0].removesuffix("-CHANNEL")
    presets = (preset.name for preset in SCHEMES.values() if replace(preset, name="") == regrouped)
    return replace(regrouped, name=next(presets, f"{base}-G{group_size}"))


def _plan(source: TensorSource, scheme: Scheme, ignore: tuple[str, ...]) -> _Plan:
    if source.directory is None:
        raise UsageError(f"'{source.describe()}' has no weights to keep", "name a model directory or a hub id")
    if source.scheme is not None:
        raise UsageError(f"'{source.describe()}' is quantized already ({source.scheme.name})", "name the model in high precision")
    empty = build_empty_model(source.config)
    if any(isinstance(module, Conv1D) for module in empty.modules()):
        raise UnsupportedModelError(
            f"'{source.describe()}' has Conv1D layers, which no layout of compressed-tensors holds", "choose another model"
        )
    linears = {name: (m.out_features, m.in_features) for name, m in empty.named_modules() if isinstance(m, nn.Linear)}
    for pattern in ignore:
        if pattern != "lm_head" and not any(is_ignored(name, (pattern,)) for name in linears):
            raise UsageError(f"'{pattern}' matches no linear to leave out", f"linears are named like {next(iter(linears), '')}")
    names = source.names()
    experts = next((name for name in names if ".experts." in name), None)
    if experts is not None:
        raise UnsupportedModelError(
            f"'{source.describe()}' is a mixture of experts ({experts})", "fewbit quantizes dense models only, so far"
        )
    quantized = {name: shape for name, shape in linears.items() if not is_ignored(name, ignore)}
    if not quantized:
        raise UsageError("every linear is ignored, nothing would be quantized", "ignore fewer linears")
    present, known = set(names), set(empty.state_dict())
    for name, (rows, columns) in quantized.items():
        if f"{name}.weight" not in present:
            raise UnsupportedModelError(
                f"'{source.describe()}' has no tensor '{name}.weight'",
                "it is tied or stored under another name: leave this linear out",
            )
        _checked_for(name, scheme.weights, rows, columns)
    tied = {name for pair in empty.all_tied_weights_keys.items() for name in pair}
    missing = next((name for name, _ in empty.named_parameters() if name not in present | tied), None)
    if missing is not None:
        raise UnsupportedModelError(
            f"'{source.describe()}' has no tensor '{missing}': it stores tensors under other names than the model's",
            "such a checkpoint cannot be written yet; compare, evaluate, bench and generate read it",
        )
    extra = [name.removesuffix(".weight") for name in names if name.endswith(".weight") and name not in known]
    return _Plan(source.directory, quantized, [name for name in linears if name not in quantized] + extra)


def _checked_for(name: str, spec: QuantSpec | None, rows: int, columns: int) -> None:
    assert spec is not None
    try:
        scale_shape(spec, rows, columns)
    except FormatError as error:
        raise FormatError(f"'{name}' [{rows}, {columns}]: {error.problem}", error.remedy) from error


@dataclass
class _Totals:
    """Sums over the tensors that went through."""

    parameters: int = 0
    quantized_parameters: int = 0
    source_bytes: int = 0
    quantized_bytes: int = 0
    checkpoint_bytes: int = 0


def _write_weights(
    source: TensorSource, scheme: Scheme, plan: _Plan, observer: Observer, writer: ShardWriter, progress: ProgressCallback | None
) -> _Totals:
    """Stream every tensor of the source into shards."""
    assert scheme.weights is not None
    names, totals = source.names(), _Totals()
    with writer as shards:
        for done, name in enumerate(names):
            if progress is not None:
                progress(done, len(names), name)
            tensor = source.get(name)
            _check_values(name, tensor)
            totals.parameters += tensor.numel()
            totals.source_bytes += tensor.nbytes
            prefix = name.removesuffix(".weight")
            if not name.endswith(".weight") or prefix not in plan.quantized:
                shards.add(name, tensor)
                continue
            if tuple(tensor.shape) != plan.quantized[prefix]:
                what = f"tensor '{name}' is {list(tensor.shape)}, config.json says {list(plan.quantized[prefix])}"
                raise CheckpointError(what, "they belong to different models")
            q = rtn(tensor, scheme.weights, observer=observer)
            totals.quantized_parameters += tensor.numel()
            totals.quantized_bytes += packed_bytes(q)
            shards.add_all(write_linear(prefix, q, scheme))
    totals.checkpoint_bytes = writer.total_bytes
    if progress is not None:
        progress(len(names), len(names), "done")
    return totals


def _check_values(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        return
    bad = int((~tensor.float().isfinite()).sum()) if tensor.dtype.itemsize == 1 else int((~tensor.isfinite()).sum())
    if bad:
        raise CheckpointError(f"tensor '{name}' has {bad} NaN or infinite values", "the checkpoint is damaged: download or train it again")


def _compare_inventories(source: TensorSource, plan: _Plan, partial: Path) -> None:
    """Read the headers of what was written and find every tensor of the source in it, quantized or as it was."""
    written = SafetensorsFiles(partial)
    for name in source.names():
        prefix = name.removesuffix(".weight")
        as_is = name in written and prefix not in plan.quantized
        quantized = prefix in plan.quantized and f"{prefix}.weight_scale" in written
        if not (as_is or quantized):
            raise OutputError(f"tensor '{name}' of the source is missing in what was written", "this is a bug in fewbit: please report it")


def _write_companions(plan: _Plan, scheme: Scheme, result: QuantizeResult, partial: Path) -> None:
    """config.json, tokenizer, chat template, generation configuration, model card and recipe."""
    for pattern in _COMPANIONS:
        for path in plan.directory.glob(pattern):
            if path.is_file() and path.suffix != ".py":
                shutil.copyfile(path, partial / path.name)
    if (plan.directory / "additional_chat_templates").is_dir():
        shutil.copytree(plan.directory / "additional_chat_templates", partial / "additional_chat_templates")
    config = json.loads((plan.directory / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(scheme, plan.ignored)
    _write_json(partial / "config.json", config)
    if set(CompressedTensorsReader(partial).linears) != set(plan.quantized):
        raise OutputError(f"'{partial}' does not read back as it was written", "this is a bug in fewbit: please report it")
    machine = environment()
    versions = {"fewbit": machine.fewbit, **{name: machine.versions[name] for name in ("torch", "compressed-tensors")}}
    (partial / "README.md").write_text(model_card(result, versions=versions, licence=source_licence(plan.directory)), encoding="utf-8")
    recipe = {"schema_version": 1, "versions": versions, "scheme": asdict(scheme), "result": asdict(result)}
    _write_json(partial / "fewbit_recipe.json", recipe)


def _write_json(path: Path, fields: object) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
