"""One block: scale its channels, round its linears group by group, check each, put what was rounded in its place.

    for each link that the transform scales       statistics of the readers' inputs -> a scale -> fold it (walk.fold)
    for each stage of groups, in execution order  statistics of the inputs, the stages before it already rounded
        for each group                            round all of its linears together; check; retry or fall back; put in place
    learned rounding of the whole block, when the recipe has it

The inputs come from the quantized path: what the block will be given when it runs. With a reference path, what it would be given had
nothing been quantized stands beside it, window by window, for methods that make up for the difference.

Activation formats are part of the quantized path: a rounded linear's input passes through the scheme's format on its way in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fewbit.errors import FormatError
from fewbit.formats.cost import effective_bits
from fewbit.formats.quantize import dequantize, fake_quantize
from fewbit.formats.spec import Scheme
from fewbit.formats.static import fake_quantize_static
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.dispatch import select
from fewbit.methods.rtn import rtn
from fewbit.methods.smoothquant import static_input_scale
from fewbit.methods.statistics import InputStatistics
from fewbit.models.experts import expert_lists, same_routing
from fewbit.models.links import Link
from fewbit.results import ExpertsReport, LayerReport
from fewbit.walk.activations import ActivationStore, MemoryBudget
from fewbit.walk.capture import Group, capture, find_groups, stages
from fewbit.walk.checks import check_layer, relative_error
from fewbit.walk.fold import channels_of, fold_scale, representable_scale
from fewbit.walk.methods import ROUNDING_STEPS, TRANSFORM_STEPS, Needs, Rounded, retries
from fewbit.walk.paused import PausedRuns, pending_bytes
from fewbit.walk.settings import WalkSettings
from fewbit.walk.tuning import tune

__all__ = ["CHECK_TOKENS", "WIDE_COLUMNS", "BlockResult", "BlockTask", "InputFormats", "quantize_block", "round_alone"]

CHECK_TOKENS = 256  # held-back tokens on which a layer's outputs are compared
_STAGE_BYTES = 2**30  # moments gathered in one run over a mixture; more experts take more runs, and the same numbers come out
WIDE_COLUMNS = 8192  # of a group that is rounded while the weights that are done wait in their packed form
HIGH_PRECISION = "high precision"


@dataclass
class BlockTask:
    """A block and what it is given.

    Attributes:
        block: its module, weights resident in the working precision.
        linears: what is to be rounded, by dotted name in the block.
        names: what the checkpoint calls them.
        stored: the dtype in which the checkpoint keeps each parameter of the block.
        links: where scales can be folded.
        call: the block's output for hidden states [1, T, width].
        inputs: hidden states of the calibration windows on the quantized path, those held back at the end; None without calibration.
        reference: of the same windows had nothing been quantized; None when no method asks for it.
        fitted: windows that methods may look at; those behind them are held back.
        new_store: makes room for the hidden states of so many windows. budget: for what a run holds on the way.
    """

    block: nn.Module
    linears: Mapping[str, nn.Linear]
    names: Mapping[str, str]
    stored: Mapping[str, torch.dtype]
    links: Sequence[Link]
    call: Callable[[torch.Tensor], torch.Tensor]
    inputs: ActivationStore | None = None
    reference: ActivationStore | None = None
    fitted: int = 0
    new_store: Callable[[int], ActivationStore] | None = None
    budget: MemoryBudget | None = None


@dataclass
class BlockResult:
    """What became of a block.

    Attributes:
        quantized: rounded weights, by dotted name in the block; linears that stayed in high precision are missing.
        changed: other parameters that are no longer what the source has (norms into which scales were folded), in their stored dtype.
        layers: reports in the order of the block's linears.
        notes: what was not possible.
        experts: how many tokens reached the experts of each mixture.
        propagated: the task's inputs have been replaced by the rounded block's outputs.
    """

    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    experts: list[ExpertsReport] = field(default_factory=list)
    propagated: bool = False


class InputFormats:
    """The scheme's format of activations, applied to the inputs of linears that are rounded; switched off for the reference path."""

    def __init__(self, scheme: Scheme) -> None:
        self._spec = scheme.input_activations
        self.enabled = True
        self._handles: dict[str, Any] = {}
        self._scales: dict[str, torch.Tensor | None] = {}  # of the linears whose inputs are quantized now

    def prepare(self, name: str, linear: nn.Linear) -> None:
        """Make it possible to `attach` while a run of the block waits in front of this very linear."""
        spec = self._spec
        if spec is None or name in self._handles:
            return

        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> Any:
            if not self.enabled or name not in self._scales:
                return None
            x, static = arguments[0], self._scales[name]
            with torch.no_grad():
                rounded = fake_quantize(x, spec) if static is None else fake_quantize_static(x, static, spec)
            # The gradient of a rounding that is learned passes as if the inputs were not rounded.
            return (x + (rounded - x).detach() if x.requires_grad else rounded, *arguments[1:])

        self._handles[name] = linear.register_forward_pre_hook(hook)

    def attach(self, name: str, linear: nn.Linear, static: torch.Tensor | None = None) -> None:
        """From now on the linear's inputs are quantized and dequantized on their way in; `static` is the scale of a static format."""
        self.prepare(name, linear)
        self._scales[name] = static

    def detach(self, name: str | None = None) -> None:
        """Leave the inputs of one linear, or of all, as they are again."""
        for key in [name] if name is not None else list(self._handles):
            self._scales.pop(key, None)
            handle = self._handles.pop(key, None)
            if handle is not None:
                handle.remove()


def quantize_block(task: BlockTask, scheme: Scheme, settings: WalkSettings, formats: InputFormats) -> BlockResult:
    """Round the linears of one block; the block is left with the rounded weights and computes the quantized path.

    Raises:
        FormatError: a weight does not fit the format.
    """
    return _BlockWork(task, scheme, settings, formats).run()


def round_alone(name: str, weight: torch.Tensor, scheme: Scheme, settings: WalkSettings) -> tuple[QuantizedTensor | None, LayerReport]:
    """Round a linear of which no input is known.

    Args:
        name: what the checkpoint calls it.
        weight: [out, in], floating point.

    Returns:
        The rounded weight, None when none passed the check, and its report.
    """
    assert scheme.weights is not None
    notes: list[str] = []
    for what, rounding, chosen in retries(settings):
        step = ROUNDING_STEPS[rounding]
        static = scheme.input_activations is not None and not scheme.input_activations.dynamic
        if step.needs(chosen).hessian or static:
            notes.append(f"{what}: no input is known")
            continue
        rounded = step.apply([weight], scheme.weights, None, chosen)[0]
        check = check_layer(weight, rounded.quantized, None)
        if not check.failure:
            report = _report(name, weight, rounded.quantized, rounded.method, scheme)
            return rounded.quantized, replace(report, saturated_share=check.saturated, notes=[*notes, *rounded.notes])
        notes.append(f"{what}: {check.failure}")
    return None, replace(_report(name, weight, None, HIGH_PRECISION, scheme), notes=notes)


def _report(name: str, weight: torch.Tensor, q: QuantizedTensor | None, method: str, scheme: Scheme) -> LayerReport:
    rows, columns = weight.shape
    return LayerReport(
        name=name,
        rows=rows,
        columns=columns,
        bits=16.0 if q is None else effective_bits(q),
        method=method,
        rtn_error=None,
        error=None,
        dampening=None,
        saturated_share=0.0,
        tokens=0,
        kernel=_kernel(scheme, rows, columns, q),
        notes=[],
    )


def _kernel(scheme: Scheme, rows: int, columns: int, q: QuantizedTensor | None) -> str:
    spec, inputs = (None, None) if q is None else (scheme.weights, scheme.input_activations)
    request = KernelRequest(spec, inputs, rows, columns, has_g_idx=q is not None and q.g_idx is not None)
    return select(request).kernel.name


def _within(limit: int, stage: Sequence[Group]) -> Iterator[list[Group]]:
    """A stage in parts whose moments [K, K] fit the limit, at least one group each."""
    part: list[Group] = []
    for group in stage:
        if part and sum(4 * other.columns**2 for other in (*part, group)) > limit:
            yield part
            part = []
        part.append(group)
    yield part


class _BlockWork:
    """The state of one block's rounding."""

    def __init__(self, task: BlockTask, scheme: Scheme, settings: WalkSettings, formats: InputFormats) -> None:
        assert scheme.weights is not None
        self.task, self.scheme, self.settings, self.formats = task, scheme, settings, formats
        self.spec, self.recipe = scheme.weights, settings.recipe
        self.result = BlockResult()
        self._reports: dict[str, LayerReport] = {}
        self._originals: dict[str, torch.Tensor] = {}
        self._baseline: dict[str, float | None] = {}
        self._touched: set[str] = set()

    def run(self) -> BlockResult:
        task = self.task
        if task.inputs is None:
            for name, linear in task.linears.items():
                q, report = round_alone(task.names[name], linear.weight, self.scheme, self.settings)
                self._settle(name, q, report)
        else:
            self._count_experts()
            mixture = any(True for _ in expert_lists(task.block))
            groups = find_groups(task.linears, self._run_quantized, len(task.inputs), products=mixture)
            if self.recipe.transform is not None:
                self._transform(groups)
            if not self._round_paused(groups):
                for stage in stages(groups) if self.settings.true_sequential else [list(groups)]:
                    self._round_stage(stage)
            if self.recipe.tuning is not None:
                self._tune(groups)
            for _, experts in expert_lists(task.block):
                experts.stop_calibration()
        self.result.layers = [self._reports[name] for name in task.linears]
        self._collect_changed()
        return self.result

    def _count_experts(self) -> None:
        """Let a mixture count how many tokens reach each expert; those with too few are lent others from then on (`models.experts`)."""
        assert self.task.inputs is not None
        lists = list(expert_lists(self.task.block))
        for _, experts in lists:
            experts.start_calibration()
        if lists:
            for window in range(self.task.fitted):
                self._run_quantized(window)
        for name, experts in lists:
            coverage = experts.cover()
            report = ExpertsReport(name, list(coverage.tokens), list(coverage.starved), coverage.required, coverage.sampled)
            self.result.experts.append(report)

    # -------------------------------------------------------------------------------------------------------- running the block

    def _run_quantized(self, window: int) -> torch.Tensor:
        assert self.task.inputs is not None
        return self.task.call(self.task.inputs[window])

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The block with the weights that it had before rounding, its inputs in high precision."""
        rounded = {name: self.task.linears[name].weight.data for name in self._originals}
        self.formats.enabled = False
        for name, weight in self._originals.items():
            self.task.linears[name].weight.data = weight
        try:
            yield
        finally:
            self.formats.enabled = True
            for name, weight in rounded.items():
                self.task.linears[name].weight.data = weight

    def _gather(
        self, groups: Sequence[Group], needs: Mapping[Group, Needs], *, fit: bool = True
    ) -> tuple[dict[Group, InputStatistics], dict[Group, torch.Tensor]]:
        """Statistics of the groups' inputs over the fitted windows (unless `fit` is False), and held-back inputs [n, K] of each."""
        task = self.task
        assert task.inputs is not None
        first = {group.names[0]: group for group in groups}
        watched = {name: task.linears[name] for name in first}
        statistics = {group: needs[group].statistics(group.columns) for group in groups}
        held = {group: InputStatistics(group.columns, sample_tokens=CHECK_TOKENS) for group in groups}
        with_reference = task.reference is not None and any(need.cross for need in needs.values())
        for window in range(0 if fit else task.fitted, len(task.inputs)):
            into = statistics if window < task.fitted else held
            if window < task.fitted and with_reference:
                found = self._inputs(watched, task.inputs[window])
                beside = self._reference_inputs(watched, window)
                for name, x in found.items():
                    into[first[name]].update(x, beside[name])
                continue
            with capture(watched, lambda name, x, into=into: into[first[name]].update(x, x), stop=True):  # type: ignore[misc]
                self._run_quantized(window)
        return statistics, {group: held[group].sample for group in groups}

    def _inputs(self, watched: Mapping[str, nn.Linear], hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the linears are given when the block is given `hidden`."""
        found: dict[str, torch.Tensor] = {}
        with capture(watched, found.__setitem__, stop=True):
            self.task.call(hidden)
        return found

    def _run_reference(self, window: int) -> torch.Tensor:
        assert self.task.reference is not None
        return self.task.call(self.task.reference[window])

    def _reference_inputs(self, watched: Mapping[str, nn.Linear], window: int) -> dict[str, torch.Tensor]:
        """What they would be given had nothing been rounded, for the same tokens as in the run before."""
        assert self.task.reference is not None
        with self._as_it_was(), same_routing(self.task.block):
            return self._inputs(watched, self.task.reference[window])

    # --------------------------------------------------------------------------------------------------------------- transforms

    def _transform(self, groups: Sequence[Group]) -> None:
        assert self.recipe.transform is not None
        step = TRANSFORM_STEPS[self.recipe.transform]
        links = [link for link in self.task.links if self._can_fold(link, groups)]
        read = {link: [group for group in groups if set(group.names) <= set(link.readers)] for link in links}
        wanted = [group for group in groups if any(group in found for found in read.values())]
        statistics, held = self._gather(wanted, {group: step.needs(group.columns) for group in wanted})
        for group in wanted:  # the measure is rounding to nearest of the weights as they were, not of the scaled ones
            self._baseline |= {name: self._rtn_error(name, held[group]) for name in group.names}
        for link in links:
            weights = [self.task.linears[name].weight.detach() for group in read[link] for name in group.names]
            parts = [statistics[group] for group in read[link]]
            # A mixture's experts read different tokens of the same norm, which has one scale for all.
            known = parts[0] if len(parts) == 1 else InputStatistics.pooled(parts)
            if known.tokens == 0:
                self.result.notes.append(f"{link.producer}: not scaled, no calibration token reached its readers")
                continue
            found = step.apply(weights, self.scheme, known, self.settings, channels_of(self.task.block, link))
            producer = f"{link.producer}.weight"
            dtype = self.task.stored.get(producer, torch.float32)
            fold_scale(self.task.block, link, representable_scale(self.task.block, link, found.scale, dtype))
            self._after_fold(link)

    def _can_fold(self, link: Link, groups: Sequence[Group]) -> bool:
        """Whether everything that reads the producer's output is known: a reader's group must lie within the link's readers."""
        reading = [group for group in groups if set(group.names) & set(link.readers)]
        strangers = [name for group in reading for name in group.names if name not in link.readers]
        if strangers:
            self.result.notes.append(f"{link.producer}: not scaled, {strangers[0]} reads the same input and is not known to")
        return bool(reading) and not strangers

    def _after_fold(self, link: Link) -> None:
        """What is written as it is, is rounded to the dtype in which it is stored; weights to be rounded stay exact."""
        for name in (link.producer, *link.readers):
            module = self.task.block.get_submodule(name)
            for leaf, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{leaf}"
                if leaf == "weight" and name in self.task.linears:
                    continue
                self._touched.add(full)
                parameter.data = parameter.data.to(self.task.stored.get(full, parameter.dtype)).to(parameter.dtype)

    def _collect_changed(self) -> None:
        parameters = dict(self.task.block.named_parameters())
        for name in sorted(self._touched):
            self.result.changed[name] = parameters[name].detach().to(self.task.stored.get(name, parameters[name].dtype))

    # ----------------------------------------------------------------------------------------------------------------- rounding

    def _round_paused(self, groups: Sequence[Group]) -> bool:
        """Round group after group while one run of the block per window waits for it (`walk.paused`).

        The same numbers as by `_round_stage`, with a third of the work; False, and nothing done, where it does not fit the memory or
        groups are not called one after the other (a mixture's experts).
        """
        task, inputs = self.task, self.task.inputs
        assert inputs is not None and task.budget is not None
        one_by_one = self.settings.true_sequential and all(len(stage) == 1 for stage in stages(groups))
        needs = ROUNDING_STEPS[self.recipe.rounding].needs(self.settings)
        nbytes = pending_bytes(len(inputs), inputs.length, inputs.width, max(group.columns for group in groups), inputs.dtype)
        nbytes *= 2 if needs.cross else 1
        if not one_by_one or any(True for _ in expert_lists(task.block)) or not task.budget.take(nbytes):
            return False
        for name, linear in task.linears.items():
            self.formats.prepare(name, linear)
        first = {group.names[0]: task.linears[group.names[0]] for group in groups}
        with PausedRuns(first, self._run_quantized, len(inputs)) as runs, PausedRuns(first, self._run_reference, task.fitted) as beside:
            for group in groups:
                reference: dict[int, torch.Tensor] = {}
                if needs.cross:
                    with self._as_it_was():
                        reference = dict(beside.inputs(group.names[0]))
                statistics, held = needs.statistics(group.columns), InputStatistics(group.columns, sample_tokens=CHECK_TOKENS)
                for window, x in runs.inputs(group.names[0]):
                    (statistics if window < task.fitted else held).update(x, reference.pop(window, None))
                self._round_group(group, statistics, held.sample)
            if self.recipe.tuning is None:
                for window, output in runs.outputs():
                    inputs[window] = output
                self.result.propagated = True
        task.budget.give_back(nbytes)
        return True

    def _round_stage(self, stage: Sequence[Group]) -> None:
        needs = ROUNDING_STEPS[self.recipe.rounding].needs(self.settings)
        for together in _within(_STAGE_BYTES, stage) if self.settings.true_sequential else [stage]:
            statistics, held = self._gather(together, dict.fromkeys(together, needs))
            for group in together:
                self._round_group(group, statistics.pop(group), held.pop(group))

    def _round_group(self, group: Group, statistics: InputStatistics, tokens: torch.Tensor) -> None:
        """Round the linears of a group, retrying those that fail; when one must stay in high precision, all do.

        Runtimes join linears that share an input (q, k, v) into one, which has one format.
        """
        task, waiting = self.task, list(group.names)
        notes: dict[str, list[str]] = {name: [] for name in group.names}
        settled: dict[str, tuple[QuantizedTensor, LayerReport]] = {}
        exact = {name: tokens @ task.linears[name].weight.detach().float().T for name in group.names} if len(tokens) else {}
        baseline = {name: self._baseline.get(name) or self._rtn_error(name, tokens, exact.get(name)) for name in group.names}
        for what, rounding, settings in retries(self.settings):
            if not waiting:
                break
            try:
                with self._parked(group):
                    rounded = self._attempt(rounding, waiting, statistics, settings)
            except FormatError as error:
                for name in waiting:
                    notes[name].append(f"{what}: {error.problem}")
                continue
            for name, one in zip(list(waiting), rounded, strict=True):
                weight = task.linears[name].weight.detach()
                check = check_layer(weight, one.quantized, tokens, baseline[name], exact.get(name))
                if check.failure:
                    notes[name].append(f"{what}: {check.failure}")
                    continue
                report = replace(
                    _report(task.names[name], weight, one.quantized, self._method_name(one.method), self.scheme),
                    rtn_error=baseline[name],
                    error=check.error,
                    dampening=one.dampening,
                    saturated_share=check.saturated,
                    tokens=statistics.tokens,
                    notes=[*notes[name], *one.notes],
                )
                settled[name] = (one.quantized, report)
                waiting.remove(name)
        for name in group.names:
            if waiting:
                why = notes[name] if name in waiting else [f"{waiting[0]} shares its input and stays in high precision"]
                weight = task.linears[name].weight
                report = _report(task.names[name], weight, None, HIGH_PRECISION, self.scheme)
                self._settle(name, None, replace(report, tokens=statistics.tokens, rtn_error=baseline[name], notes=why))
            else:
                self._settle(name, *settled[name])

    @contextmanager
    def _parked(self, group: Group) -> Iterator[None]:
        """While a wide group is rounded, the linears that are done wait in their packed form: moments of 11,008 columns take as much
        memory as they do, and a block must not need both at once."""
        done = {name: q for name, q in self.result.quantized.items() if name not in group.names and group.columns >= WIDE_COLUMNS}
        for name in done:
            weight = self.task.linears[name].weight
            weight.data = torch.empty(0, dtype=weight.dtype)
        try:
            yield
        finally:
            for name, q in done.items():
                weight = self.task.linears[name].weight
                weight.data = dequantize(q, weight.dtype)

    def _tune(self, groups: Sequence[Group]) -> None:
        """Learn the rounding of the whole block; layers that fail their check afterwards take the whole block back."""
        rounded = dict(self.result.quantized)
        if not rounded:
            return
        learned = tune(self.task, self._originals, rounded, self._as_it_was, self.settings)
        self.result.notes.append(
            f"learned rounding: squared error of the block {learned.loss_before:.4g} -> {learned.loss_after:.4g}, "
            f"{learned.changed:.1%} of the codes changed"
        )
        for name, q in learned.quantized.items():
            self.task.linears[name].weight.data = dequantize(q, self.task.linears[name].weight.dtype)
        _, held = self._gather(groups, dict.fromkeys(groups, Needs()), fit=False)
        checks = {
            name: check_layer(self._originals[name], learned.quantized[name], held[group], self._reports[name].rtn_error)
            for group in groups
            for name in group.names
            if name in rounded
        }
        failed = {name: check.failure for name, check in checks.items() if check.failure}
        if failed:
            name = min(failed)
            self.result.notes.append(f"learned rounding was taken back: {name}: {failed[name]}")
            for name, q in rounded.items():
                self.task.linears[name].weight.data = dequantize(q, self.task.linears[name].weight.dtype)
            return
        for name, check in checks.items():
            self.result.quantized[name] = learned.quantized[name]
            report = self._reports[name]
            method = f"{report.method}+{self.recipe.tuning}"
            self._reports[name] = replace(report, method=method, error=check.error, saturated_share=check.saturated)

    def _attempt(self, rounding: str, names: Sequence[str], statistics: InputStatistics, settings: WalkSettings) -> list[Rounded]:
        step = ROUNDING_STEPS[rounding]
        if step.needs(settings).inputs and statistics.tokens == 0 and rounding != "rtn":
            raise FormatError("no calibration token reached it")
        rounded = step.apply([self.task.linears[name].weight.detach() for name in names], self.spec, statistics, settings)
        inputs = self.scheme.input_activations
        if inputs is None or inputs.dynamic:
            return rounded
        if statistics.tokens == 0:
            raise FormatError("no calibration token reached it, and its inputs have a static format")
        scale = static_input_scale(statistics, inputs)
        return [replace(one, quantized=replace(one.quantized, input_scale=scale)) for one in rounded]

    def _method_name(self, rounding: str) -> str:
        return rounding if self.recipe.transform is None else f"{self.recipe.transform}+{rounding}"

    def _rtn_error(self, name: str, tokens: torch.Tensor, exact: torch.Tensor | None = None) -> float | None:
        """The error of the plainest rounding; the measure of what a method is worth. `exact`: the outputs, where they are known."""
        if not len(tokens):
            return None
        weight = self.task.linears[name].weight.detach()
        return relative_error(weight, rtn(weight, self.spec), tokens, exact)

    def _settle(self, name: str, q: QuantizedTensor | None, report: LayerReport) -> None:
        """Put the rounded weight in its place; one that stays in high precision is stored as the source had it, or as it was scaled."""
        linear = self.task.linears[name]
        self._reports[name] = report
        if self.task.reference is not None or self.recipe.tuning is not None:
            self._originals[name] = linear.weight.data
        if q is None:
            stored = self.task.stored.get(f"{name}.weight", linear.weight.dtype)
            if self.recipe.transform is not None:
                self._touched.add(f"{name}.weight")
            linear.weight.data = linear.weight.data.to(stored).to(linear.weight.dtype)
            return
        self.result.quantized[name] = q
        linear.weight.data = dequantize(q, linear.weight.dtype)
        self.formats.attach(name, linear, q.input_scale)
