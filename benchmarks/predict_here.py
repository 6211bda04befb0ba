"""Predictions for this machine against this machine: one BF16 point at batch 1 predicts INT8 and INT4 over batches and contexts.

Two things are known to the predictions: what `fewbit bench --machine` measured (rates of the kernels and of attention, from weights and
caches made for the purpose, none of them a model's), and the BF16 decode time at batch 1 and the shortest context. From these, decode of
BF16, INT8 (W8A16) and INT4 (W4A16) is predicted on the grid batch x context, and measured: the three are resident together and take steps
in turns. The grid is measured in pieces, one model and batch each. The memory bandwidth of a virtual machine drifts by tens of percent
within minutes, and its cores' speed by as much; so each piece measures the machine right before its steps and right after them (the
kernels that it runs; rates are the means of the two), and the BF16 step at batch 1 takes its turn beside the others. Random weights in the
published shapes; a slice of the layers runs and each step is scaled to the whole stack (`bench.scaling`).

    python benchmarks/predict_here.py                                  # everything, twenty minutes and more
    python benchmarks/predict_here.py --pieces                         # names of the pieces
    python benchmarks/predict_here.py --measure qwen2.5-0.5b/exact/8   # one piece, a minute, kept in --results
    python benchmarks/predict_here.py --kept                           # tables and bars from what is kept

Bars: the median error over INT8 and INT4, and the number of pairs of variants that differ by more than 10 % and were ranked wrongly.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from _bars import Bar, NotMeasuredError, add_arguments, run_bars
from pydantic import TypeAdapter

from fewbit import __version__
from fewbit.bench.scaling import LayerScale
from fewbit.bench.undisturbed import Passes
from fewbit.checkpoints.sources import RandomSource
from fewbit.formats.spec import get_scheme
from fewbit.models.inventory_sources import read_inventory
from fewbit.models.shapes import shapes_config
from fewbit.predict.hardware import measured_hardware
from fewbit.predict.outline import outline_of
from fewbit.predict.prediction import MeasuredPoint, StepPoint
from fewbit.predict.predictor import Predictor
from fewbit.results import MachineResult
from fewbit.runtime.config import QuantizationConfig, compute_mode
from fewbit.runtime.engine import EngineCache
from fewbit.runtime.load import load_model
from fewbit.runtime.runner import EngineRunner, make_runner
from fewbit.workflows.bench import bench_machine

MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b")
SCHEMES = ("BF16", "W8A16", "W4A16")
_RESULTS = Path(__file__).parent / "results" / "predict_here-2026-11-21.json"
_DIFFERENT = 1.1
_SETTLING = 2
_LEAST_STEPS = 5
_SECONDS_PER_PLACE = 12.0


@dataclass(frozen=True)
class Step:
    """One measured step of the grid with its prediction, milliseconds of the whole model."""

    model: str
    compute: str
    point: StepPoint
    measured: float
    predicted: float
    inside: bool

    @property
    def error(self) -> float:
        """Percent of the measured time."""
        return 100 * abs(self.predicted / self.measured - 1)


class Variant:
    """One scheme of a slice, resident. Random weights; the cache is filled with anything, since no step's time depends on it."""

    def __init__(self, model: str, scheme: str, layers: int, compute: str) -> None:
        config = shapes_config(model)
        source = RandomSource(config, seed=0, num_layers=layers)
        runner = make_runner(load_model(source, QuantizationConfig(get_scheme(scheme), compute=compute_mode(compute))), "auto")
        if not isinstance(runner, EngineRunner):
            raise NotMeasuredError(f"{scheme} does not run in the engine: {runner.reason}")
        self.runner = runner
        self.scale = LayerScale(layers, int(config.num_hidden_layers))
        self.vocabulary = int(config.vocab_size)

    def step(self, kv: EngineCache) -> float:
        """Milliseconds of one step of all of the cache's sequences, scaled; the cache is as before."""
        tokens = torch.randint(0, self.vocabulary, (kv.sequences, 1))
        start = time.perf_counter()
        self.runner.decode(tokens, kv)
        whole = (time.perf_counter() - start) * 1e3
        kv.crop(-1)
        return self.scale.scale(whole, self.runner.engine.times.layers)


class Anchor:
    """The BF16 step at batch 1 that the predictions know, in an engine of its own over the same weights."""

    def __init__(self, base: Variant, context: int) -> None:
        self._base = base
        self._runner = EngineRunner(base.runner.loaded)
        self._cache = self._runner.new_cache(context + 1, 1)
        self._cache.fill_for_timing(context)
        self.times = Passes()

    def step(self) -> float:
        token = torch.randint(0, self._base.vocabulary, (1, 1))
        start = time.perf_counter()
        self._runner.decode(token, self._cache)
        whole = (time.perf_counter() - start) * 1e3
        self._cache.crop(-1)
        return self._base.scale.scale(whole, self._runner.engine.times.layers)


@torch.inference_mode()
def measure_piece(model: str, compute: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of interleaved steps at one batch, every context and scheme, and of the anchor beside them."""
    contexts = sorted(options.contexts, reverse=True)
    variants = {scheme: Variant(model, scheme, options.layers, compute) for scheme in SCHEMES}
    anchor = Anchor(variants["BF16"], contexts[-1])
    for _ in range(_SETTLING):
        anchor.step()
    kv = variants["BF16"].runner.new_cache(contexts[0] + 1, batch)
    kv.fill_for_timing(contexts[0])
    kernels = [("BF16", "exact"), *((scheme, compute_mode(compute)) for scheme in SCHEMES[1:])]
    machine = [bench_machine(kernels=kernels)]  # type: ignore[arg-type]
    steps: dict[str, dict[str, float]] = {}
    kept: dict[str, dict[str, list[int]]] = {}
    for context in contexts:
        kv.crop(context - kv.get_seq_length())
        times = {scheme: Passes() for scheme in SCHEMES}
        for _ in range(_SETTLING):
            for variant in variants.values():
                variant.step(kv)
        started = time.perf_counter()
        while (done := len(times["BF16"])) < _LEAST_STEPS or (done < options.steps and time.perf_counter() - started < _SECONDS_PER_PLACE):
            anchor.times.run(anchor.step)
            for scheme, variant in variants.items():
                times[scheme].run(partial(variant.step, kv))
        steps[str(context)] = {scheme: passes.median() for scheme, passes in times.items()}
        kept[str(context)] = {scheme: [len(passes.undisturbed()), len(passes)] for scheme, passes in times.items()}
        print(f"{model} {compute} batch {batch} context {context}: {steps[str(context)]}", flush=True)
    machine.append(bench_machine(kernels=kernels))  # type: ignore[arg-type]
    return {
        "anchor_context": contexts[-1], "anchor_ms": anchor.times.median(), "steps": steps, "counted_of_passes": kept,
        "layers": options.layers, "machine": [asdict(one) for one in machine],
    }  # fmt: skip


class Kept:
    """What was measured, in a file; each piece with when and on what."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.pieces: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def keep(self, name: str, piece: dict[str, Any]) -> None:
        about = {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "platform": platform.platform()}
        about |= {"fewbit": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
        self.pieces[name] = {**about, **piece}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.pieces, indent=1) + "\n", encoding="utf-8")


def piece_names(options: argparse.Namespace) -> list[str]:
    """model/compute/batch."""
    return [f"{model}/{compute}/{batch}" for compute in options.computes for model in options.models for batch in options.batches]


def measure(name: str, options: argparse.Namespace, kept: Kept) -> None:
    """Measure one piece and keep it."""
    model, compute, batch = name.split("/")
    kept.keep(name, measure_piece(model, compute, int(batch), options))


def mean_machine(machines: Sequence[MachineResult]) -> MachineResult:
    """Geometric means of the rates; the kernels and geometries are the same in all."""
    rates = [machine.rates for machine in machines]
    first = rates[0]
    if first is None or any(one is None for one in rates):
        raise NotMeasuredError("the machine's kernels have no rates: fewbit was installed without its native code")
    known = [one for one in rates if one is not None]
    return replace(
        machines[0],
        rates=replace(
            first,
            read_bandwidth_gb_s=geometric_mean(one.read_bandwidth_gb_s for one in known),
            kernels=[
                replace(same[0], ps_per_weight=[geometric_mean(ps) for ps in zip(*(rate.ps_per_weight for rate in same), strict=True)])
                for same in zip(*(one.kernels for one in known), strict=True)
            ],
            attention=[
                replace(same[0], ns=geometric_mean(max(rate.ns, 1e-3) for rate in same))
                for same in zip(*(one.attention for one in known), strict=True)
            ],
            operator_us=median(one.operator_us for one in known),
            ns_per_activation=median(one.ns_per_activation for one in known),
        ),
    )


def predict_piece(name: str, piece: dict[str, Any]) -> list[Step]:
    """Every step of a piece from the machine's rates and its BF16 step at batch 1."""
    model, compute, batch = name.split("/")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    anchor = MeasuredPoint(StepPoint(context=piece["anchor_context"]), piece["anchor_ms"])
    machine = mean_machine([TypeAdapter(MachineResult).validate_python(one) for one in piece["machine"]])
    hardware = measured_hardware(machine, memory, compute=compute)
    predictor = Predictor(hardware, outline_of(read_inventory(model)), [anchor])
    steps = []
    for context, times in piece["steps"].items():
        for scheme, ms in times.items():
            point = StepPoint(scheme=scheme, batch=int(batch), context=int(context))
            interval = predictor.predict(point).milliseconds
            steps.append(Step(model, compute, point, ms, interval.value, interval.low <= ms <= interval.high))
    return steps


def wrong_rankings(steps: Sequence[Step]) -> int:
    """Pairs at one point of the grid that differ by more than a tenth and that the predictions order the other way, or not at all."""
    places: dict[tuple[str, str, int, int], list[Step]] = {}
    for step in steps:
        places.setdefault((step.model, step.compute, step.point.batch, step.point.context), []).append(step)
    pairs = [pair for here in places.values() for pair in combinations(here, 2)]
    apart = [(a, b) for a, b in pairs if max(a.measured, b.measured) > _DIFFERENT * min(a.measured, b.measured)]
    return sum((a.measured - b.measured) * (a.predicted - b.predicted) <= 0 for a, b in apart)


def print_table(steps: Sequence[Step]) -> None:
    """Every step with its error."""
    for step in steps:
        p = step.point
        print(
            f"{step.model} {step.compute:16s} {p.scheme:6s} batch {p.batch:3d} context {p.context:5d}  measured {step.measured:9.2f}  "
            f"predicted {step.predicted:9.2f} ms  {100 * (step.predicted / step.measured - 1):+6.1f} %{'' if step.inside else '  outside'}"
        )


def print_summary(steps: Sequence[Step]) -> None:
    """Errors by model and batch, a table for BENCHMARKS.md."""
    print("\n| model | kernels | batch | error of INT8 and INT4 | largest | ms measured / predicted at 1,024 tokens: BF16, INT8, INT4 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model, compute, batch in dict.fromkeys((step.model, step.compute, step.point.batch) for step in steps):
        here = [step for step in steps if (step.model, step.compute, step.point.batch) == (model, compute, batch)]
        errors = [step.error for step in here if step.point.scheme != "BF16"]
        times = [f"{step.measured:.0f} / {step.predicted:.0f}" for step in here if step.point.context == 1024]
        print(f"| {model} | {compute} | {batch} | {median(errors):.1f} % | {max(errors):.1f} % | {', '.join(times)} |")
    print()


def _bars(options: argparse.Namespace, kept: Kept) -> list[Bar]:
    @cache
    def grid() -> list[Step]:
        missing = [name for name in piece_names(options) if name not in kept.pieces]
        if options.kept and missing:
            raise NotMeasuredError(f"not measured yet: {', '.join(missing)}")
        for name in missing:
            measure(name, options, kept)
        steps = [step for name in piece_names(options) for step in predict_piece(name, kept.pieces[name])]
        print_table(steps)
        print_summary(steps)
        inside = sum(step.inside for step in steps) / len(steps)
        print(f"{inside:.0%} of {len(steps)} times lie in their 90 % intervals")
        return steps

    def quantized(compute: str) -> list[Step]:
        return [step for step in grid() if step.compute == compute and step.point.scheme != "BF16"]

    def error(compute: str) -> float:
        return median(step.error for step in quantized(compute))

    def wrong(compute: str) -> float:
        return float(wrong_rankings([step for step in grid() if step.compute == compute]))

    bars = []
    for compute in options.computes:
        suffix = "" if compute == "exact" else f"-{compute}"
        what = "percent of the decode time, INT8 and INT4 over the grid"
        bars.append(Bar(f"here-median-error{suffix}", partial(error, compute), "<=", 8.0, what))
        bars.append(Bar(f"here-wrong-rankings{suffix}", partial(wrong, compute), "<=", 0.0, "pairs of variants more than 10 % apart"))
    return bars


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--models", type=_words, default=list(MODELS), metavar="NAMES")
    parser.add_argument("--batches", type=_numbers, default=[1, 2, 4, 8, 16, 32], metavar="N,N")
    parser.add_argument("--contexts", type=_numbers, default=[128, 1024, 4096], metavar="N,N")
    parser.add_argument("--computes", type=_words, default=["exact"], metavar="MODES", help="exact, int8-activations or both")
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="layers of the slice")
    parser.add_argument("--steps", type=int, default=15, metavar="N", help="counted steps per variant and place, fewer where they are long")
    parser.add_argument("--results", type=Path, default=_RESULTS, metavar="FILE", help="where pieces are kept")
    parser.add_argument("--pieces", action="store_true", help="only print the names of the pieces")
    parser.add_argument("--measure", metavar="PIECE", help="measure this piece, again if it is kept already, and nothing else")
    parser.add_argument("--kept", action="store_true", help="measure nothing")
    options = parser.parse_args()
    kept = Kept(options.results)
    if options.pieces:
        print("\n".join(piece_names(options)))
        return 0
    if options.measure:
        measure(options.measure, options, kept)
        return 0
    return run_bars(_bars(options, kept), list_only=options.list, json_file=options.json)


if __name__ == "__main__":
    sys.exit(main())
