"""The walk: a whole model quantized block by block, with at most one block in memory, never losing what is finished.

    linears outside of the blocks (an untied head)         rounded by what needs no inputs
    hidden states of all windows                           embedded once
    for each block:
        load it, round it (walk.block), save it            one step of `checkpoints.unfinished`
        run the windows through what was rounded           the quantized path
        load it again as it was, run those windows that    the reference path: for the gate, and for methods that make up for
            have a second path                             the error of what is in front of them
    final norm and head on the gate's windows, both paths  KL sums

Whatever needs no inputs (RTN, HQQ) with the gate skipped never runs a block: its linears are read, rounded and saved one after the other.

A resumed walk takes finished blocks from disk and runs the windows through them; the hidden states in front of the first unfinished block
are then what they were, to the last bit, because the same operations give the same numbers on the same machine with the same threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fewbit.checkpoints.compressed_tensors import read_linear, write_linear
from fewbit.checkpoints.unfinished import Unfinished
from fewbit.errors import CheckpointError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import Scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.models.families import get_family
from fewbit.models.links import block_links
from fewbit.results import BlockReport, ExpertsReport, LayerReport
from fewbit.walk.activations import ActivationStore, MemoryBudget
from fewbit.walk.block import BlockTask, InputFormats, quantize_block, round_alone
from fewbit.walk.calibration import CalibrationData
from fewbit.walk.gate import GateSums, GateText, compare_logits
from fewbit.walk.heap import trim_heap
from fewbit.walk.methods import ROUNDING_STEPS
from fewbit.walk.settings import WalkSettings
from fewbit.walk.skeleton import Skeleton

__all__ = ["ProgressCallback", "Walk", "WalkOutcome"]

ProgressCallback = Callable[[int, int, str], None]
_OUTSIDE, _GATE = "outside", "gate"


@dataclass
class WalkOutcome:
    """What a walk has done.

    Attributes:
        layers: of all linears, in the model's order. blocks: one entry per block.
        steps: the names of the finished steps that hold tensors.
        gate: per window; empty when there is no gate.
        notes: what was not possible.
    """

    layers: list[LayerReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    gate: list[GateSums] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Path:
    """Windows on their way through the blocks."""

    length: int
    quantized: ActivationStore
    reference: ActivationStore | None
    new_store: Callable[[int], ActivationStore]


class Walk:
    """One walk through a model.

    Args:
        skeleton: the model.
        scheme: the number formats.
        settings: see WalkSettings.
        targets: the linears to round, dotted names from the root.
        work: where finished steps are kept.
        budget: for hidden states.
        calibration: None when the recipe needs none.
        gate: None when there is no gate.
        progress: called with (steps done, steps, what is being done).
    """

    def __init__(
        self,
        skeleton: Skeleton,
        scheme: Scheme,
        settings: WalkSettings,
        targets: frozenset[str],
        work: Unfinished,
        budget: MemoryBudget,
        *,
        calibration: CalibrationData | None = None,
        gate: GateText | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        self._skeleton, self._scheme, self._settings, self._work, self._budget = skeleton, scheme, settings, work, budget
        self._calibration, self._gate, self._progress = calibration, gate, progress
        self._outcome = WalkOutcome()
        self._durations: list[float] = []
        blocks = [f"{skeleton.block_name(index)}." for index in range(skeleton.num_blocks)]
        self._inside = [[name for name in targets_in_order(skeleton.model, targets) if name.startswith(prefix)] for prefix in blocks]
        known = {name for names in self._inside for name in names}
        self._outside = [name for name in targets_in_order(skeleton.model, targets) if name not in known]
        needs = ROUNDING_STEPS[settings.recipe.rounding].needs(settings)
        self._carry_reference = calibration is not None and (needs.cross or settings.recipe.tuning is not None)

    def run(self) -> WalkOutcome:
        """Finish every step that is not finished yet.

        Raises:
            CheckpointError: damaged tensors in the source.
            FormatError: a weight that does not fit the format.
            OSError: the system refuses a write.
        """
        records = {name: self._work.record(name) for name in self._step_names()}
        self._round_outside(records.get(_OUTSIDE))
        pending = any(records[self._block_step(index)] is None for index in range(self._skeleton.num_blocks))
        gate_pending = self._gate is not None and records.get(_GATE) is None
        paths = self._embed() if (pending and self._calibration is not None) or gate_pending else []
        for index in range(self._skeleton.num_blocks):
            self._tell(index)
            self._block(index, records[self._block_step(index)], paths)
        self._tell(self._skeleton.num_blocks)
        self._outcome.notes += _experts_notes(self._outcome.blocks)
        if gate_pending:
            self._finish_gate(paths[-1])
        elif self._gate is not None:
            record = records[_GATE]
            assert record is not None
            self._outcome.gate = [GateSums(**window) for window in record["windows"]]
        for path in paths:
            path.quantized.close()
            if path.reference is not None:
                path.reference.close()
        return self._outcome

    def _step_names(self) -> list[str]:
        blocks = [self._block_step(index) for index in range(self._skeleton.num_blocks)]
        return [*([_OUTSIDE] if self._outside else []), *blocks, *([_GATE] if self._gate is not None else [])]

    @staticmethod
    def _block_step(index: int) -> str:
        return f"block-{index:05d}"

    def _tell(self, index: int) -> None:
        """Progress, with the time left judged by the blocks that were rounded in this run."""
        if self._progress is None:
            return
        total = self._skeleton.num_blocks
        if index == total:
            self._progress(total, total, "the gate" if self._gate is not None else "done")
            return
        left = ""
        if self._durations:
            seconds = sum(self._durations) / len(self._durations) * (total - index)
            left = f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"
        self._progress(index, total, f"block {index + 1} of {total}{left}")

    # ------------------------------------------------------------------------------------------------- outside of the blocks

    def _round_outside(self, record: dict[str, Any] | None) -> None:
        """Linears outside of the blocks: their inputs are not gathered, so they are rounded as they are."""
        if not self._outside:
            return
        skeleton = self._skeleton
        tensors: dict[str, torch.Tensor] = {}
        layers = []
        if record is None:
            for name in self._outside:
                q, report = self._alone(name)
                layers.append(report)
                if q is not None:
                    tensors |= write_linear(skeleton.names.prefix(name), q, self._scheme)
            self._work.save(_OUTSIDE, tensors, {"layers": [asdict(layer) for layer in layers], "notes": []})
        else:
            layers = [LayerReport(**layer) for layer in record["layers"]]
        self._outcome.layers += layers
        self._outcome.steps.append(_OUTSIDE)
        if self._gate is not None or self._calibration is not None:
            files = self._work.tensors(_OUTSIDE)
            for name in self._outside:
                if f"{skeleton.names.prefix(name)}.weight_scale" in files:
                    q = read_linear(files, skeleton.names.prefix(name), self._scheme)
                    skeleton.overrides[f"{name}.weight"] = dequantize(q, skeleton.dtype)

    def _alone(self, name: str) -> tuple[QuantizedTensor | None, LayerReport]:
        """Round one linear of which no input is known, straight from disk."""
        linear = self._skeleton.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight = self._skeleton.stored(f"{name}.weight")
        expected = (linear.out_features, linear.in_features)
        if tuple(weight.shape) != expected:
            raise CheckpointError(
                f"tensor '{name}.weight' is {list(weight.shape)}, config.json says {list(expected)}", "they belong to different models"
            )
        return round_alone(self._skeleton.names.prefix(name), weight, self._scheme, self._settings)

    def _embed(self) -> list[_Path]:
        """The hidden states in front of the first block: calibration windows, then the gate's."""
        paths = []
        if self._calibration is not None:
            ids = torch.cat([self._calibration.ids, self._calibration.held_back])
            paths.append(self._embed_windows(ids, self._carry_reference))
        if self._gate is not None:
            paths.append(self._embed_windows(self._gate.ids, True))
        self._skeleton.use_overrides = False
        self._skeleton.release()
        return paths

    def _embed_windows(self, ids: torch.Tensor, with_reference: bool) -> _Path:
        skeleton = self._skeleton
        skeleton.use_overrides = True
        first = skeleton.embed(ids[:1])
        skeleton.check_calls(ids[-1:])
        count, length, width = len(ids), ids.shape[1], first.shape[-1]

        def new_store(windows: int) -> ActivationStore:
            return ActivationStore(windows, length, width, skeleton.dtype, self._budget)

        quantized, reference = new_store(count), new_store(count) if with_reference else None
        for window in range(count):
            quantized[window] = skeleton.embed(ids[window : window + 1])
        if reference is not None:
            if skeleton.overrides:  # what stands in front of the blocks may be rounded, too
                skeleton.release()
                skeleton.use_overrides = False
            for window in range(count):
                reference[window] = skeleton.embed(ids[window : window + 1])
            skeleton.release() if skeleton.overrides else None
        return _Path(length, quantized, reference, new_store)

    # ------------------------------------------------------------------------------------------------------------- the blocks

    def _block(self, index: int, record: dict[str, Any] | None, paths: list[_Path]) -> None:
        started = time.monotonic()
        step, resumed = self._block_step(index), record is not None
        if paths:
            record = self._run_block(index, record, paths)
        elif record is None:
            record = self._round_unseen(index)
        assert record is not None
        if not resumed:
            self._durations.append(time.monotonic() - started)
        layers = [LayerReport(**layer) for layer in record["layers"]]
        self._outcome.layers += layers
        self._outcome.steps.append(step)
        self._outcome.notes += [note for note in record["notes"] if note not in self._outcome.notes]
        experts = [ExpertsReport(**report) for report in record.get("experts", ())]
        self._outcome.blocks.append(
            BlockReport(self._skeleton.block_name(index), len(layers), time.monotonic() - started, resumed, record["notes"], experts)
        )

    def _round_unseen(self, index: int) -> dict[str, Any]:
        """A block that is never run: linear after linear from disk."""
        tensors: dict[str, torch.Tensor] = {}
        layers = []
        for name in self._inside[index]:
            q, report = self._alone(name)
            layers.append(report)
            if q is not None:
                tensors |= write_linear(self._skeleton.names.prefix(name), q, self._scheme)
        record = {"layers": [asdict(layer) for layer in layers], "notes": []}
        self._work.save(self._block_step(index), tensors, record)
        return record

    def _run_block(self, index: int, record: dict[str, Any] | None, paths: list[_Path]) -> dict[str, Any]:
        skeleton = self._skeleton
        block = skeleton.load_block(index)
        formats = InputFormats(self._scheme)
        propagated = False
        if record is None:
            record, propagated = self._round_block(index, block, formats, paths)
        else:
            self._restore(index, block, formats)
        for path in paths[1:] if propagated else paths:
            self._propagate(index, block, path.length, path.quantized)
        formats.detach()
        if any(path.reference is not None for path in paths):
            skeleton.load_block(index)
            for path in paths:
                if path.reference is not None:
                    self._propagate(index, block, path.length, path.reference)
        skeleton.unload_block(index)
        trim_heap()
        return record

    def _propagate(self, index: int, block: nn.Module, length: int, store: ActivationStore) -> None:
        call = self._skeleton.call(index, length)
        with torch.no_grad():
            for window in range(len(store)):
                store[window] = call(block, store[window])

    def _round_block(self, index: int, block: nn.Module, formats: InputFormats, paths: list[_Path]) -> tuple[dict[str, Any], bool]:
        """The block's record, and whether the calibration windows have gone through what was rounded already."""
        skeleton, prefix = self._skeleton, f"{self._skeleton.block_name(index)}."
        names = [name.removeprefix(prefix) for name in self._inside[index]]
        calibrated = self._calibration is not None
        path = paths[0] if calibrated else None
        call = skeleton.call(index, path.length) if path is not None else None
        family = get_family(skeleton.source.config.model_type)
        task = BlockTask(
            block=block,
            linears={name: _linear(block, name) for name in names},
            names={name: skeleton.names.prefix(prefix + name) for name in names},
            stored=skeleton.stored_dtypes(index),
            links=block_links(family, skeleton.source.config, block) if family is not None else (),
            call=(lambda hidden: call(block, hidden)) if call is not None else (lambda hidden: hidden),
            inputs=path.quantized if path is not None else None,
            reference=path.reference if path is not None else None,
            fitted=len(self._calibration.ids) if self._calibration is not None else 0,
            new_store=path.new_store if path is not None else None,
            budget=self._budget,
        )
        with torch.no_grad():
            result = quantize_block(task, self._scheme, self._settings, formats)
        notes = list(result.notes)
        if self._settings.recipe.transform is not None and family is None:
            notes.append(f"no scale was folded: '{skeleton.source.config.model_type}' is not in the table of families")
        tensors: dict[str, torch.Tensor] = {}
        for name, q in result.quantized.items():
            tensors |= write_linear(task.names[name], q, self._scheme)
        for name, tensor in result.changed.items():
            tensors[skeleton.names.single[prefix + name]] = tensor
        experts = [asdict(report) for report in result.experts]
        record = {"layers": [asdict(layer) for layer in result.layers], "notes": notes, "experts": experts}
        self._work.save(self._block_step(index), tensors, record)
        return record, result.propagated

    def _restore(self, index: int, block: nn.Module, formats: InputFormats) -> None:
        """Put a finished block's tensors into the module."""
        skeleton, files = self._skeleton, self._work.tensors(self._block_step(index))
        prefix = f"{skeleton.block_name(index)}."
        back: Mapping[str, str] = {disk: name for name, disk in skeleton.names.single.items() if name.startswith(prefix)}
        for name in self._inside[index]:
            disk = skeleton.names.prefix(name)
            if f"{disk}.weight_scale" not in files:
                continue
            linear = _linear(block, name.removeprefix(prefix))
            q = read_linear(files, disk, self._scheme)
            linear.weight.data = dequantize(q, skeleton.dtype)
            formats.attach(name.removeprefix(prefix), linear, q.input_scale)
        for disk in files.names():
            if disk in back and f"{disk.removesuffix('.weight')}.weight_scale" not in files:
                block.get_parameter(back[disk].removeprefix(prefix)).data = files.get(disk).to(skeleton.dtype)

    # --------------------------------------------------------------------------------------------------------------- the gate

    def _finish_gate(self, path: _Path) -> None:
        """Final norm and head on both paths."""
        assert self._gate is not None and path.reference is not None
        skeleton = self._skeleton
        for window in range(len(self._gate.ids)):
            ids = self._gate.ids[window : window + 1]
            if skeleton.overrides:
                skeleton.release()
            skeleton.use_overrides = False
            reference = skeleton.logits(ids, path.reference[window])
            if skeleton.overrides:
                skeleton.release()
            skeleton.use_overrides = True
            self._outcome.gate.append(compare_logits(reference, skeleton.logits(ids, path.quantized[window]), ids))
        skeleton.use_overrides = False
        skeleton.release()
        self._work.save(_GATE, {}, {"windows": [asdict(window) for window in self._outcome.gate]})


def _experts_notes(blocks: Sequence[BlockReport]) -> list[str]:
    """One line about all mixtures of the model; the counts of each expert are in the blocks' reports."""
    reports = [report for block in blocks for report in block.experts]
    if not reports:
        return []
    counts = [count for report in reports for count in report.tokens]
    text = f"experts: {min(counts):,} to {max(counts):,} calibration tokens per expert"
    starved = sum(len(report.starved) for report in reports)
    if starved:
        text += (
            f"; {starved:,} of {len(counts):,} had fewer than {max(report.required_tokens for report in reports):,} and were calibrated on "
            f"others' tokens, too ({sum(not count for count in counts):,} had none of their own)"
        )
    return [text]


def targets_in_order(model: nn.Module, targets: frozenset[str]) -> list[str]:
    """The linears to round, in the order in which the model lists its modules."""
    return [name for name, _ in model.named_modules() if name in targets]


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
