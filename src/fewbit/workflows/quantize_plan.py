"""What `fewbit quantize` will do, decided and checked before the first weight is read.

Everything that can be known to fail - the scheme, group sizes, patterns that match nothing, a layout that lacks the format, tensors that
the source does not have - fails here, in a moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbit.checkpoints.compressed_tensors import CompressedTensorsLayout
from fewbit.checkpoints.layout import Layout, same_but_scales
from fewbit.checkpoints.served import checkpoint_scheme
from fewbit.checkpoints.sources import TensorSource
from fewbit.errors import FormatError, UnsupportedModelError, UsageError
from fewbit.formats.grouping import scale_shape
from fewbit.formats.spec import SCHEMES, QuantSpec, Scheme
from fewbit.models.experts import expert_lists, is_router
from fewbit.models.names import DiskNames, disk_names
from fewbit.models.structure import build_empty_model, is_ignored
from fewbit.walk.settings import WalkSettings
from fewbit.walk.skeleton import check_values

__all__ = ["QuantizePlan", "check_kept", "check_method", "plan_linears", "resolve_scheme", "scheme_of_method"]

_DEFAULT = CompressedTensorsLayout()


@dataclass(frozen=True)
class QuantizePlan:
    """What happens to which tensor.

    Attributes:
        directory: the source's.
        targets: dotted names of the linears to quantize, as the model calls them, with their shapes [out, in].
        names: how they are called on disk.
        ignored: linears that stay in high precision, as the model and, where that differs, as the disk calls them; those that transformers
            does not build (extra heads) and routers included.
        notes: what is known beforehand to be out of the ordinary.
    """

    directory: Path
    targets: Mapping[str, tuple[int, int]]
    names: DiskNames
    ignored: list[str]
    notes: list[str]


def resolve_scheme(scheme: str | Scheme, group_size: int | None, layout: Layout = _DEFAULT) -> Scheme:
    """The scheme as the layout stores it, with another group size put in.

    Raises:
        UsageError: an unknown scheme, one that the layout lacks, or one without a choice of group size.
        FormatError: an impossible group size.
    """
    resolved = checkpoint_scheme(scheme) if isinstance(scheme, str) else scheme
    if group_size is not None and (resolved.weights is None or group_size != resolved.weights.group_size):
        resolved = _regrouped(resolved, group_size)
    reason = layout.supports(resolved)
    if reason is not None:
        remedy = "choose another scheme or another --format, or run it without a checkpoint"
        raise UsageError(f"scheme {resolved.name} cannot be written: {reason}", remedy)
    # Scales are rounded to the dtype of the layout before the integers are computed with them, so they lose nothing when they are written.
    return layout.stored(resolved)


def _regrouped(scheme: Scheme, group_size: int) -> Scheme:
    spec = scheme.weights
    if spec is None or spec.type != "int" or scheme.input_activations is not None:
        raise UsageError(
            f"scheme {scheme.name} has no choice of group size", "leave the group size out, or take an integer weight-only scheme"
        )
    regrouped = replace(scheme, name="", weights=replace(spec, strategy="group", group_size=group_size))
    base = scheme.name.split("-G")[0].removesuffix("-CHANNEL")
    presets = (preset.name for preset in SCHEMES.values() if same_but_scales(preset, regrouped))
    return replace(regrouped, name=next(presets, f"{base}-G{group_size}"))


def scheme_of_method(settings: WalkSettings, scheme: Scheme, layout: Layout = _DEFAULT) -> Scheme:
    """LLM.int8() is a format of the inputs: named as a method, it turns INT8 schemes into the one that has it.

    Raises:
        UsageError: weights that are not INT8 per channel.
    """
    if settings.recipe.rounding != "llm_int8":
        return scheme
    wanted = resolve_scheme("LLM-INT8", None, layout)
    if scheme.weights != wanted.weights or settings.recipe.text != "llm_int8":
        raise UsageError(
            f"llm_int8 needs INT8 weights per channel and goes with no other method, not {scheme.name}", "choose W8A8 or LLM-INT8"
        )
    return wanted


def check_method(settings: WalkSettings, scheme: Scheme) -> None:
    """Whether the chain of methods can make this scheme.

    Raises:
        UsageError: it cannot be read, or does not go with the scheme or the layout.
    """
    recipe = settings.recipe
    if recipe.transform == "smoothquant" and scheme.input_activations is None:
        raise UsageError(
            f"smoothquant moves outliers out of quantized activations, and {scheme.name} leaves activations in high precision",
            "choose W8A8 or another scheme with input activations, or awq for weight-only schemes",
        )
    if scheme.input_activations is not None and not scheme.input_activations.dynamic and not recipe.calibrated:
        raise UsageError(
            f"{scheme.name} has static scales of activations, and {recipe.text} looks at none",
            "choose smoothquant, gptq or smoothquant+gptq, or a scheme with dynamic activations",
        )
    if recipe.rounding == "hqq" and (scheme.weights is None or scheme.weights.type != "int"):
        raise UsageError(
            f"hqq chooses scales and zero points of integers, and {scheme.name} has none", "choose rtn or gptq for this scheme"
        )
    if recipe.rounding in ("gptq", "gptaq") and settings.gptq.actorder == "dynamic":
        raise UsageError("the column order 'dynamic' needs a group index per column, which runtimes refuse", "choose static or none")


def plan_linears(source: TensorSource, scheme: Scheme, ignore: Sequence[str], layout: Layout = _DEFAULT) -> QuantizePlan:
    """Choose the linears to quantize.

    Args:
        ignore: shell patterns on the dotted name or its last part.

    Raises:
        UsageError: the source has no weights or is quantized, or a pattern that matches nothing or everything.
        UnsupportedModelError: layers that the layout does not hold, or tensors that the source does not have.
        FormatError: a group size that does not divide a layer.
    """
    if source.directory is None:
        raise UsageError(f"'{source.describe()}' has no weights to keep", "name a model directory or a hub id")
    if source.scheme is not None:
        raise UsageError(f"'{source.describe()}' is quantized already ({source.scheme.name})", "name the model in high precision")
    empty = build_empty_model(source.config)
    if any(isinstance(module, Conv1D) for module in empty.modules()):
        raise UnsupportedModelError(f"'{source.describe()}' has Conv1D layers, which no layout holds", "choose another model")
    linears = {name: (m.out_features, m.in_features) for name, m in empty.named_modules() if isinstance(m, nn.Linear)}
    for pattern in ignore:
        if pattern != "lm_head" and not any(is_ignored(name, (pattern,)) for name in linears):
            raise UsageError(f"'{pattern}' matches no linear to leave out", f"linears are named like {next(iter(linears), '')}")
    names = disk_names(empty, source.names())
    if names.merged:
        parameter = next(iter(names.merged))
        raise UnsupportedModelError(
            f"'{source.describe()}' stores '{parameter}' in pieces that the model joins ({names.merged[parameter][0]}, ...)",
            "such a checkpoint cannot be written yet; compare, evaluate, bench and generate read it",
        )
    assert scheme.weights is not None
    targets = {name: shape for name, shape in linears.items() if not is_ignored(name, ignore) and not is_router(name)}
    if not targets:
        raise UsageError("every linear is ignored, nothing would be quantized", "ignore fewer linears")
    for name, (rows, columns) in targets.items():
        if f"{name}.weight" not in names.single:
            raise UnsupportedModelError(
                f"'{source.describe()}' has no tensor '{name}.weight'",
                "it is tied or stored under another name: leave this linear out",
            )
        _check_fits(name, scheme.weights, rows, columns)
        layout.check_shape(name, rows, columns, scheme.weights)
    tied = {name for pair in empty.all_tied_weights_keys.items() for name in pair}
    missing = next((name for name, _ in empty.named_parameters() if name not in names.single and name not in tied), None)
    if missing is not None:
        raise UnsupportedModelError(
            f"'{source.describe()}' has no tensor '{missing}'", "a shard is missing, or the weights belong to another configuration"
        )
    left_out = [name for name in linears if name not in targets]
    left_out += [name for name, _ in empty.named_modules() if is_router(name) and name not in linears]
    left_out += [names.prefix(name) for name in left_out if names.prefix(name) != name]
    left_out += [name.removesuffix(".weight") for name in names.unknown if name.endswith(".weight")]
    return QuantizePlan(source.directory, targets, names, left_out, _notes(empty, scheme, layout))


def _notes(model: nn.Module, scheme: Scheme, layout: Layout) -> list[str]:
    """What a mixture of experts means for this scheme."""
    stacked = [(name, p.numel()) for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in f".{name}"]
    notes = []
    if stacked:
        notes.append(
            f"the experts stay in high precision: {sum(n for _, n in stacked):,} parameters in stacked tensors of a kind that is not known "
            f"({stacked[0][0]}, ...)"
        )
    known = any(expert_lists(model)) and layout.name == _DEFAULT.name
    reason = _unread_experts(scheme, layout.format_name(scheme)) if known else ""
    return [*notes, reason] if reason else notes


def _unread_experts(scheme: Scheme, layout: str) -> str:
    """Why transformers 5 does not read experts in this format, though it reads dense layers; empty when it does."""
    spec = scheme.weights
    assert spec is not None
    if layout == "nvfp4-pack-quantized":
        return (
            "transformers up to 5.23 loads NVFP4 experts without their global scale and without an error: do not use it for this checkpoint"
        )
    if layout == "int-quantized" or not spec.symmetric or spec.strategy == "block":
        return "transformers up to 5.23 cannot load experts in this format, only symmetric packed ones and plain FP8"
    if scheme.input_activations is not None:
        return (
            "transformers up to 5.23 loads the experts but does not quantize their inputs: its outputs are not those of a runtime that does"
        )
    return ""


def check_kept(source: TensorSource, plan: QuantizePlan) -> None:
    """Look for NaN and infinite values in what will be copied, before hours go into the rest; linears are looked at when they are read.

    Raises:
        CheckpointError: with the tensor's name.
    """
    read_later = {plan.names.single[f"{name}.weight"] for name in plan.targets}
    for name in source.names():
        if name not in read_later:
            check_values(name, source.get(name))


def _check_fits(name: str, spec: QuantSpec | None, rows: int, columns: int) -> None:
    assert spec is not None
    try:
        scale_shape(spec, rows, columns)
    except FormatError as error:
        raise FormatError(f"'{name}' [{rows}, {columns}]: {error.problem}", error.remedy) from error
