"""What a quantization will take: memory, disk and time, before the work.

Memory and disk are arithmetic over shapes and need no measurement. Time is counted in operations and bytes, each multiplied by a rate that
`walk.rates` has measured on this machine. For a block with linears W [N, K], n calibration tokens in windows of T, P weights in all:

    forward pass       2 n (P + attention T/2 ...)     how often: gathering for a transform, rounding, the second path, the gate
    second moments     n K^2 (half: symmetric)         for each group of linears that share an input
    GPTQ               K^3 / 3 + N K^2                 factor, updates; and the loop over columns, as measured
    AWQ                41 candidates x N' K n'         N' <= 2,048 rows, n' <= 2,048 vectors; clipping 2 N K^2 a sweep
    learned rounding   steps x batch x T x 6 P         forward and backward, and the optimizer's passes over all weights
    checks             4 x 256 x 2 N K                 outputs on held-back tokens, before and after

    memory   process + block in the working precision + what a group's rounding holds (K^2 moments, factor, targets) + hidden states
    disk     finished blocks + the checkpoint, which exist side by side at the end + hidden states beyond the budget

The error bars are what was seen between estimates and runs (docs/log.md): memory within 20 %, time within a factor of 2 on a machine whose
load does not change. A run that cannot fit even at the lower end is refused before it begins, and the message says what to change.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig

from fewbit.errors import UsageError
from fewbit.formats.cost import storage_bytes
from fewbit.formats.spec import Scheme
from fewbit.kernels.environment import memory_bytes
from fewbit.methods.awq import AWQSettings
from fewbit.methods.clipping import ClipSettings
from fewbit.methods.smoothquant import SmoothQuantSettings
from fewbit.models.accounting import count_parameters
from fewbit.models.families import get_family
from fewbit.models.links import fused_groups
from fewbit.models.structure import block_list_name
from fewbit.results import Interval, QuantizeEstimate
from fewbit.walk.block import CHECK_TOKENS, WIDE_COLUMNS
from fewbit.walk.calibration import held_back_windows
from fewbit.walk.methods import ROUNDING_STEPS, TRANSFORM_STEPS
from fewbit.walk.paused import pending_bytes
from fewbit.walk.rates import Rates
from fewbit.walk.settings import WalkSettings

__all__ = ["Workload", "check_fits", "estimate_quantization", "workload_of"]

_MEMORY_BAR, _DISK_BAR, _TIME_BAR = 1.2, 1.05, 2.0
_TEXT_BYTES = 120 << 20  # the standard library's text, joined, and its encodings
_TEXT_S, _START_S = 2.0, 1.0  # reading and drawing text; building the model without weights
_OPS_OF_A_BLOCK = 400  # framework's share of running one block on one window, in smallest operations
_OPTIMIZER_PASSES = 60  # over all weights of a block, per step of learned rounding: latent to weight and back, Adam


@dataclass(frozen=True)
class Group:
    """Linears of one block that share their input.

    Attributes:
        rows: out features of each. columns: K.
        share: of all tokens that reach it (experts see a part).
    """

    rows: tuple[int, ...]
    columns: int
    share: float = 1.0

    @property
    def weights(self) -> int:
        """Of all linears."""
        return sum(self.rows) * self.columns


@dataclass(frozen=True)
class Workload:
    """What is to be quantized, as sizes.

    Attributes:
        blocks: the groups of each block's targets. outside: shapes of targets outside of the blocks.
        block_parameters: parameters of each block, all of them.
        kept_bytes: of the source's tensors that stay as they are. source_bytes: of all of them.
        vocabulary, width: of the head; hidden size.
        positions: tokens that the model takes at once, to which longer windows are cut; None where nothing says.
    """

    blocks: tuple[tuple[Group, ...], ...]
    outside: tuple[tuple[int, int], ...]
    block_parameters: tuple[int, ...]
    kept_bytes: int
    source_bytes: int
    vocabulary: int
    width: int
    positions: int | None = None


def workload_of(
    model: nn.Module, config: PretrainedConfig, targets: Mapping[str, tuple[int, int]], *, source_bytes: int | None = None
) -> Workload:
    """The sizes of a model.

    Args:
        model: with parameters on the meta device, as `models.structure.build_without_weights` makes it.
        targets: the linears to quantize, by dotted name, with their shapes [out, in].
        source_bytes: of the checkpoint's tensors; two bytes per parameter when None.

    Raises:
        UnsupportedModelError: the model has no list of blocks.
    """
    text = config.get_text_config(decoder=True)
    name = block_list_name(model, config.model_type)
    blocks = list(model.get_submodule(name).children())
    inside = [{t.removeprefix(f"{name}.{i}."): s for t, s in targets.items() if t.startswith(f"{name}.{i}.")} for i in range(len(blocks))]
    outside = tuple(shape for target, shape in targets.items() if not target.startswith(f"{name}."))
    parameters = count_parameters(model, getattr(model, "all_tied_weights_keys", ()))
    total = 2 * parameters if source_bytes is None else source_bytes
    quantized = sum(rows * columns for rows, columns in targets.values())
    return Workload(
        blocks=tuple(tuple(_groups(block, config, own)) for block, own in zip(blocks, inside, strict=True)),
        outside=outside,
        block_parameters=tuple(sum(p.numel() for p in block.parameters()) for block in blocks),
        kept_bytes=int(total * max(parameters - quantized, 0) / parameters),
        source_bytes=total,
        vocabulary=int(text.vocab_size),
        width=int(text.hidden_size),
        positions=getattr(text, "max_position_embeddings", None),
    )


def _groups(block: nn.Module, config: PretrainedConfig, targets: Mapping[str, tuple[int, int]]) -> list[Group]:
    """Groups as the family's row knows them; linears that it does not know stand alone."""
    family = get_family(config.model_type)
    fused = fused_groups(family, block) if family is not None else []
    found, left = [], dict(targets)
    for names in fused:
        if all(name in left for name in names):
            shapes = [left.pop(name) for name in names]
            found.append(Group(tuple(rows for rows, _ in shapes), shapes[0][1], _share(names[0], config)))
    return found + [Group((rows,), columns, _share(name, config)) for name, (rows, columns) in left.items()]


def _share(name: str, config: PretrainedConfig) -> float:
    if ".experts." not in f".{name}":
        return 1.0
    text = config.get_text_config(decoder=True)
    count = next((int(getattr(text, key)) for key in ("num_local_experts", "num_experts", "n_routed_experts") if hasattr(text, key)), 1)
    return min(1.0, int(getattr(text, "num_experts_per_tok", 1)) / count)


def estimate_quantization(
    work: Workload, scheme: Scheme, settings: WalkSettings, dtype: torch.dtype, rates: Rates | None = None
) -> QuantizeEstimate:
    """Estimate memory and disk, and time where rates are known.

    Args:
        work: from `workload_of`.
        scheme: its weights are what targets get.
        dtype: the working precision.
        rates: of `measure_rates`; None leaves the time out.
    """
    counts = _Counts(work, scheme, settings, dtype)
    memory, disk = counts.memory(), counts.disk()
    seconds = counts.seconds(rates) if rates is not None else None
    return QuantizeEstimate(
        peak_memory_bytes=_bar(memory["process"] + memory["work"] + memory["hidden states"], _MEMORY_BAR),
        disk_bytes=_bar(sum(disk.values()), _DISK_BAR),
        duration_s=None if seconds is None else _bar(sum(seconds.values()), _TIME_BAR),
        memory_parts=memory,
        disk_parts=disk,
        duration_parts=seconds or {},
    )


def _bar(value: float, factor: float) -> Interval:
    return Interval(value, value / factor, value * factor)


def check_fits(estimate: QuantizeEstimate, out: Path) -> None:
    """Refuse what this machine cannot hold.

    Args:
        estimate: of the work.
        out: the checkpoint's directory; unfinished work of it on the disk counts as room.

    Raises:
        UsageError: memory or disk is too small even at the lower end of the estimate; it names what to change.
    """
    available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    needed = estimate.peak_memory_bytes
    if needed.low > available:
        remedy = "set --memory lower, so that hidden states go to the disk"
        if estimate.memory_parts["work"] > estimate.memory_parts["hidden states"]:
            remedy = "use --precision bfloat16 or a method that needs less (rtn or hqq with --no-gate read one linear at a time)"
        raise UsageError(f"quantizing takes about {_size(needed.value)} of memory, and {_size(available)} are available", remedy)
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    partial = out.with_name(f"{out.name}.partial")
    free = shutil.disk_usage(folder).free
    free += sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else 0
    if estimate.disk_bytes.low > free:
        hidden = estimate.disk_parts["hidden states"]
        remedy = f"free some space or write to another disk than that of '{folder}'"
        remedy += ", or set --memory higher, so that hidden states stay in memory" if hidden > estimate.disk_bytes.value / 4 else ""
        raise UsageError(f"quantizing takes about {_size(estimate.disk_bytes.value)} on the disk, and {_size(free)} are free", remedy)


def _size(value: float) -> str:
    unit, name = next((unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if value >= unit or unit == 2**10)
    return f"{value / unit:,.1f} {name}"


class _Counts:
    """Operations and bytes of one piece of work."""

    def __init__(self, work: Workload, scheme: Scheme, settings: WalkSettings, dtype: torch.dtype) -> None:
        assert scheme.weights is not None
        self.work, self.spec, self.settings, self.recipe, self.dtype = work, scheme.weights, settings, settings.recipe, dtype
        choice, gate = settings.calibration, settings.gate
        calibrated = self.recipe.calibrated
        self.needs = ROUNDING_STEPS[self.recipe.rounding].needs(settings)
        self.fitted, self.length = (choice.samples if calibrated else 0), self._cut(choice.sequence_length)
        self.windows = self.fitted + held_back_windows(choice.samples) if calibrated else 0
        self.gate_windows = gate.windows if gate.enabled else 0
        self.gate_length = self._cut(gate.sequence_length)
        self.gate_tokens = self.gate_windows * self.gate_length
        self.reference = calibrated and (self.needs.cross or self.recipe.tuning is not None)
        self.runs = calibrated or gate.enabled
        self.clips = self.recipe.transform == "awq" and self.recipe.rounding == "rtn" and settings.observer is None

    def _cut(self, tokens: int) -> int:
        """The length of a window that asks for so many tokens."""
        return min(tokens, self.work.positions or tokens)

    # ------------------------------------------------------------------------------------------------------------------- bytes

    def packed_bytes(self) -> int:
        """Of all targets once they are quantized."""
        shapes = [(sum(group.rows), group.columns) for block in self.work.blocks for group in block] + list(self.work.outside)
        return sum(storage_bytes(self.spec, rows, columns) for rows, columns in shapes)

    def hidden_bytes(self) -> int:
        """Of all stores of hidden states."""
        states = self.windows * self.length * (1 + self.reference) + 2 * self.gate_tokens
        states += self.fitted * self.length if self.recipe.tuning is not None else 0
        return states * self.work.width * self.dtype.itemsize

    def budget(self) -> int:
        """That hidden states may take in memory."""
        return memory_bytes() // 4 if self.settings.memory_bytes is None else self.settings.memory_bytes

    def pending(self) -> int:
        """Of runs that wait while groups are rounded, when the budget has room for them; else they are not begun."""
        widest = max((group.columns for block in self.work.blocks for group in block), default=0)
        if not self.windows or not widest or not self.settings.true_sequential:
            return 0
        nbytes = pending_bytes(self.windows, self.length, self.work.width, widest, self.dtype) * (2 if self.needs.cross else 1)
        return nbytes if self.hidden_bytes() + nbytes <= self.budget() else 0

    def memory(self) -> dict[str, float]:
        """Bytes by what they are for; `work` is the largest of the phases, which follow one another."""
        process = psutil.Process().memory_info().rss + (_TEXT_BYTES if self.runs else 0)
        head = self.work.vocabulary * self.work.width * self.dtype.itemsize
        phases = [max((self._alone(rows * columns) for rows, columns in self._shapes()), default=0.0)]
        if self.runs:
            logits = 4 * 4 * self.gate_length * self.work.vocabulary if self.gate_windows else 0
            phases += [head * 2.5, head + logits]
            parameters = max(self.work.block_parameters, default=0)
            resident = parameters * self.dtype.itemsize * (2 if self.reference else 1)
            resident += 16 * parameters if self.recipe.tuning is not None else 0
            phases += [resident + self._of_block(block) for block in self.work.blocks] + [resident + self._largest_packed()]
        else:
            phases[0] += self._largest_packed()
        return {"process": process, "work": max(phases), "hidden states": min(self.hidden_bytes(), self.budget()) + self.pending()}

    def _shapes(self) -> list[tuple[int, int]]:
        return [(rows, group.columns) for block in self.work.blocks for group in block for rows in group.rows] + list(self.work.outside)

    def _largest_packed(self) -> float:
        """A block's quantized tensors wait in memory until all of them are written; values once packed, once not."""
        return max((sum(group.weights for group in block) * (1 + self.spec.num_bits / 8) for block in self.work.blocks), default=0.0)

    def _alone(self, weights: int) -> float:
        """Rounding one linear without inputs: as stored, the check for NaN, codes."""
        return weights * 4.0

    def _of_block(self, groups: Sequence[Group]) -> float:
        """The most that rounding one of its groups holds beside the block; while a wide one is rounded, the others wait as codes."""
        codes, largest = sum(group.weights for group in groups), 0.0
        for group in groups:
            parked = (codes - group.weights) * self.dtype.itemsize if group.columns >= WIDE_COLUMNS else 0
            gathering = 4.0 * group.columns**2 * (1 + self.needs.cross) if self.needs.hessian else 0.0
            largest = max(largest, gathering, self._of_group(group) - parked)
        return largest + codes

    def _of_group(self, group: Group) -> float:
        """What rounding a group holds beside the block."""
        square, weights = 4.0 * group.columns**2, 4.0 * group.weights
        held = 4.0 * CHECK_TOKENS * group.columns
        if not self.windows:
            return 2 * 4.0 * max(group.rows) * group.columns
        if self.recipe.rounding in ("gptq", "gptaq"):
            return square * (2 + self.needs.cross) + 2 * weights + held
        if self.clips:
            return square * 2 + 3 * 4.0 * max(group.rows) * group.columns + held
        return 2 * 4.0 * max(group.rows) * group.columns + held

    def disk(self) -> dict[str, float]:
        """Bytes on the output's disk when most of it is taken."""
        packed, hidden = self.packed_bytes(), self.hidden_bytes()
        return {
            "finished blocks": packed,
            "checkpoint": packed + self.work.kept_bytes,
            "hidden states": 0 if hidden <= self.budget() else hidden,
        }

    # -------------------------------------------------------------------------------------------------------------------- time

    def seconds(self, rates: Rates) -> dict[str, float]:
        """By what they go into."""
        parts = {
            "start": _START_S + _TEXT_S * (bool(self.windows) + bool(self.gate_windows)),
            "reading": self._reading(rates),
            "forward passes": self._forward(rates),
            "transform": 0.0,
            "moments": 0.0,
            "rounding": sum(rows * columns for rows, columns in self.work.outside) * rates.rounding_s,
            "checks": 0.0,
            "tuning": 0.0,
            "writing": (2 * self.packed_bytes() + self.work.kept_bytes) / rates.write_bytes_s + self.packed_bytes() / rates.hash_bytes_s,
        }
        for groups, parameters in zip(self.work.blocks, self.work.block_parameters, strict=True):
            for group in groups:
                parts["transform"] += self._transform(group, rates)
                parts["moments"] += self._moments(group, rates)
                parts["rounding"] += self._rounding(group, rates)
                parts["checks"] += self._checks(group, rates)
            parts["tuning"] += self._tuning(groups, parameters, rates)
        return parts

    def _reading(self, rates: Rates) -> float:
        """Hashed once; read, looked at for NaN and converted once, and once more where a second path is run."""
        times = 1 + (self.reference or bool(self.gate_windows))
        return self.work.source_bytes / rates.hash_bytes_s + 4 * times * self.work.source_bytes / 2 * rates.pass_s

    def _pass(self, groups: Sequence[Group], tokens: int, length: int) -> float:
        """Operations of running tokens through a block: its linears, and attention over windows of `length`."""
        return tokens * (2 * sum(group.weights * group.share for group in groups) + 4 * length * self.work.width / 2)

    def _forward(self, rates: Rates) -> float:
        if not self.runs:
            return 0.0
        rounding = 1.0 if self.pending() else 2.4  # one run that waits, or one for each stage
        passes = rounding + (self.recipe.transform is not None) + 2 * self.reference
        passes += 1 if self.recipe.tuning is not None or not self.pending() else 0  # through what was rounded
        gate_length, operations, runs = self.gate_length, 0.0, 0.0
        for groups in self.work.blocks:
            if self.windows:
                operations += passes * self._pass(groups, self.windows * self.length, self.length)
                runs += passes * self.windows
            operations += 2 * self._pass(groups, self.gate_tokens, gate_length)
            runs += 2 * self.gate_windows
        operations += 2 * 2 * self.gate_tokens * self.work.vocabulary * self.work.width
        softmax = 12 * self.gate_tokens * self.work.vocabulary * rates.pass_s
        return operations / rates.flops + runs * _OPS_OF_A_BLOCK * rates.op_s + softmax

    def _tokens(self, group: Group) -> float:
        return self.fitted * self.length * group.share

    def _moments(self, group: Group, rates: Rates) -> float:
        if not self.windows or not self.needs.hessian:
            return 0.0
        products = 1.2 + 2 * self.needs.cross  # the symmetric half, with what blocks of columns add
        return (
            products * self._tokens(group) * group.columns**2 / rates.float32_flops + 4 * self._tokens(group) * group.columns * rates.pass_s
        )

    def _rounding(self, group: Group, rates: Rates) -> float:
        seconds = group.columns * (rates.rounding_column_s + sum(group.rows) * rates.rounding_s)
        rows, columns = sum(group.rows), group.columns
        if self.recipe.rounding in ("gptq", "gptaq"):
            operations = 2 * columns**3 / 3 + rows * columns**2 * (1 + 4 * self.needs.cross)
            return seconds + operations / rates.float32_flops + 6 * columns**2 * rates.pass_s
        if self.clips:
            return seconds + 2 * ClipSettings().sweeps * rows * columns**2 / rates.float32_flops
        return seconds

    def _transform(self, group: Group, rates: Rates) -> float:
        """Candidates rounded to nearest, each with its output error."""
        if self.recipe.transform is None:
            return 0.0
        needs = TRANSFORM_STEPS[self.recipe.transform].needs(group.columns)
        if self.recipe.transform == "awq":
            chosen = AWQSettings()
            candidates, vectors = chosen.grid_points * (1 + chosen.duo) + 1, group.columns if needs.hessian else chosen.sketch
            most_rows = chosen.most_rows
        else:
            candidates = len(SmoothQuantSettings().strengths) + 1 if self.settings.migration_strength is None else 1
            vectors, most_rows = needs.sample_tokens, SmoothQuantSettings().most_rows
        weights = min(sum(group.rows), most_rows) * group.columns
        gathering = (1.2 * self._tokens(group) * group.columns**2 + group.columns**3) / rates.float32_flops if needs.hessian else 0.0
        each = weights * (rates.rtn_s + 4 * rates.pass_s) + 2 * weights * vectors / rates.float32_flops
        return gathering + candidates * each

    def _checks(self, group: Group, rates: Rates) -> float:
        if not self.windows:
            return 4 * group.weights * rates.pass_s
        tokens = min(CHECK_TOKENS, (self.windows - self.fitted) * self.length * group.share)
        return 4 * 2 * tokens * group.weights / rates.float32_flops + group.weights * (rates.rtn_s + 12 * rates.pass_s)

    def _tuning(self, groups: Sequence[Group], parameters: int, rates: Rates) -> float:
        if self.recipe.tuning is None:
            return 0.0
        chosen, weights = self.settings.learned, sum(group.weights for group in groups)
        step = 3 * self._pass(groups, chosen.batch * self.length, self.length) / rates.flops
        step += _OPTIMIZER_PASSES * weights * rates.pass_s + 4 * chosen.batch * _OPS_OF_A_BLOCK * rates.op_s
        looks = 7 * self._pass(groups, self.fitted * self.length, self.length) / rates.flops
        return chosen.steps * step + looks
