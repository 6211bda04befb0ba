"""Predictions for this machine against this machine: one BF16 point at batch 1 predicts INT8 and INT4 over batches and contexts.

For each model `fewbit bench --machine`'s figures and the BF16 decode time at batch 1 and the shortest context calibrate. Then decode of
BF16, INT8 (W8A16) and INT4 (W4A16) is predicted on the grid batch x context, and measured: the three are resident together and take steps
in turns, so that a change of the machine's bandwidth hits all of them. Random weights in the published shapes; a slice of the layers runs
and each step is scaled to the whole stack (`bench.scaling`).

    python benchmarks/predict_here.py [--batches 1,2,4,8,16,32] [--contexts 128,1024,4096] [--compute exact] [--json FILE]

Bars: the median error over INT8 and INT4, and the number of pairs of variants that differ by more than 10 % and were ranked wrongly.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from statistics import median

import torch
from _bars import Bar, NotMeasuredError, add_arguments, run_bars

from fewbit.bench.machine import measure_machine
from fewbit.bench.scaling import LayerScale
from fewbit.checkpoints.sources import RandomSource
from fewbit.formats.spec import get_scheme
from fewbit.models.inventory_sources import read_inventory
from fewbit.models.shapes import shapes_config
from fewbit.predict.hardware import measured_hardware
from fewbit.predict.outline import outline_of
from fewbit.predict.prediction import MeasuredPoint, StepPoint
from fewbit.predict.predictor import Predictor
from fewbit.runtime.config import QuantizationConfig, compute_mode
from fewbit.runtime.load import load_model
from fewbit.runtime.runner import EngineRunner, make_runner

MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b")
SCHEMES = ("BF16", "W8A16", "W4A16")
_DIFFERENT = 1.1
_SETTLING = 2


@dataclass(frozen=True)
class Step:
    """One measured step of the grid with its prediction, milliseconds of the whole model."""

    model: str
    point: StepPoint
    measured: float
    predicted: float
    inside: bool

    @property
    def error(self) -> float:
        """Percent of the measured time."""
        return 100 * abs(self.predicted / self.measured - 1)


class Variant:
    """One scheme of a slice, resident, with a cache that grows along the contexts."""

    def __init__(self, model: str, scheme: str, layers: int, compute: str, seed: int) -> None:
        config = shapes_config(model)
        source = RandomSource(config, seed=seed, num_layers=layers)
        runner = make_runner(load_model(source, QuantizationConfig(get_scheme(scheme), compute=compute_mode(compute))), "auto")
        if not isinstance(runner, EngineRunner):
            raise NotMeasuredError(f"{scheme} does not run in the engine: {runner.reason}")
        self.runner = runner
        self.scale = LayerScale(layers, int(config.num_hidden_layers))
        self.vocabulary = int(config.vocab_size)

    def start(self, batch: int, capacity: int) -> None:
        self.cache = self.runner.new_cache(capacity, batch)
        self.batch = batch

    def fill(self, tokens: int) -> None:
        """Every sequence has so many tokens; without products, whose results no time depends on."""
        have = self.cache.get_seq_length()
        if have > tokens:
            self.cache.crop(tokens - have)
        elif have < tokens:
            with self.runner.emptied():
                self.runner.prefill(torch.randint(0, self.vocabulary, (self.batch, tokens - have)), self.cache)

    def step(self) -> float:
        """Milliseconds of one step, scaled."""
        tokens = torch.randint(0, self.vocabulary, (self.batch, 1))
        start = time.perf_counter()
        self.runner.decode(tokens, self.cache)
        return self.scale.scale((time.perf_counter() - start) * 1e3, self.runner.engine.times.layers)


def measure_grid(model: str, batches: Sequence[int], contexts: Sequence[int], options: argparse.Namespace) -> dict[StepPoint, float]:
    """Medians of interleaved steps."""
    variants = {scheme: Variant(model, scheme, options.layers, options.compute, seed=0) for scheme in SCHEMES}
    found: dict[StepPoint, float] = {}
    for batch in batches:
        for variant in variants.values():
            variant.start(batch, max(contexts) + options.steps + _SETTLING + 2)
        for context in sorted(contexts):
            times: dict[str, list[float]] = {scheme: [] for scheme in SCHEMES}
            for variant in variants.values():
                variant.fill(context)
            for _ in range(_SETTLING + options.steps):
                for scheme, variant in variants.items():
                    times[scheme].append(variant.step())
            for scheme, series in times.items():
                ms = found[StepPoint(scheme=scheme, batch=batch, context=context)] = median(series[_SETTLING:])
                print(f"{model} {scheme:6s} batch {batch:3d} context {context:5d}  {ms:9.2f} ms", flush=True)
    return found


def predict_grid(model: str, measured: dict[StepPoint, float]) -> list[Step]:
    """Every step of the grid from the first BF16 one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hardware = measured_hardware(measure_machine(), memory)
    base = min((point for point in measured if point.scheme == "BF16"), key=lambda point: (point.batch, point.context))
    predictor = Predictor(hardware, outline_of(read_inventory(model)), [MeasuredPoint(base, measured[base])])
    steps = []
    for point, ms in measured.items():
        interval = predictor.predict(point).milliseconds
        steps.append(Step(model, point, ms, interval.value, interval.low <= ms <= interval.high))
    return steps


def wrong_rankings(steps: Sequence[Step]) -> int:
    """Pairs at one point of the grid that differ by more than a tenth and that the predictions order the other way, or not at all."""
    places: dict[tuple[str, int, int], list[Step]] = {}
    for step in steps:
        places.setdefault((step.model, step.point.batch, step.point.context), []).append(step)
    pairs = [pair for here in places.values() for pair in combinations(here, 2)]
    apart = [(a, b) for a, b in pairs if max(a.measured, b.measured) > _DIFFERENT * min(a.measured, b.measured)]
    return sum((a.measured - b.measured) * (a.predicted - b.predicted) <= 0 for a, b in apart)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--models", default=",".join(MODELS), metavar="NAMES")
    parser.add_argument("--batches", default="1,2,4,8,16,32", metavar="N,N")
    parser.add_argument("--contexts", default="128,1024,4096", metavar="N,N")
    parser.add_argument(
        "--layers", type=int, default=8, metavar="N", help="layers of the slice; its INT4 weights must not fit in the cache"
    )
    parser.add_argument("--steps", type=int, default=9, metavar="N", help="counted steps per variant and place")
    parser.add_argument("--compute", default="exact", metavar="MODE", help="exact or int8-activations")
    options = parser.parse_args()
    batches, contexts = ([int(word) for word in text.split(",")] for text in (options.batches, options.contexts))

    @cache
    def grid() -> list[Step]:
        steps = []
        for model in options.models.split(","):
            steps += predict_grid(model, measure_grid(model, batches, contexts, options))
        for step in steps:
            p = step.point
            print(
                f"{step.model} {p.scheme:6s} batch {p.batch:3d} context {p.context:5d}  measured {step.measured:9.2f}  predicted "
                f"{step.predicted:9.2f} ms  error {step.error:5.1f} %{'' if step.inside else '  outside'}"
            )
        return steps

    def error(scheme: str | None) -> float:
        return median(s.error for s in grid() if s.point.scheme == scheme or (scheme is None and s.point.scheme != "BF16"))

    bars = [
        Bar("here-median-error", partial(error, None), "<=", 8.0, "percent of the decode time, INT8 and INT4 over the grid"),
        Bar("here-wrong-rankings", lambda: float(wrong_rankings(grid())), "<=", 0.0, "pairs of variants more than 10 % apart"),
    ]
    return run_bars(bars, list_only=options.list, json_file=options.json)


if __name__ == "__main__":
    sys.exit(main())
