"""Latency of a variant, in turns with BF16 in the same process.

A machine's speed drifts: clocks, neighbours, other processes. Two models measured one after the other differ by that drift as much as
by their kernels; so BF16 and the variant take turns in short blocks, ABBA, and the speed-up is the median over blocks of the ratio
between neighbours:

    BF16 | variant   variant | BF16   BF16 | variant   ...            ratio per pair of blocks: median(BF16) / median(variant)

A block after a switch begins with a step that is not counted while a step is short enough for the caches to matter. A slow variant
takes fewer steps, as many as its time budget allows; `decode_n` says how many, and p99 is given from 100 on. Against itself the
baseline's speed-up is 1 by definition, with the interval that two series of the very same model show: the noise that every other row's
speed-up has to be read against.

The memory bandwidth that a row's share refers to is probed right before and after its decode steps: on a virtual machine it can halve
between the beginning of a comparison and its end, and a share of what the memory gave minutes ago says nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from fewbit.bench.bound import name_bound
from fewbit.bench.counters import measure_counters
from fewbit.bench.machine import measure_read_bandwidth
from fewbit.bench.percentiles import MIN_SAMPLES_FOR_INTERVAL, MIN_SAMPLES_FOR_P99, median, median_interval, percentile
from fewbit.bench.scaling import LayerScale
from fewbit.bench.steps import StepRunner
from fewbit.bench.traffic import StepCost, step_cost
from fewbit.results import Bound, Interval, LatencyResult, MachineResult
from fewbit.runtime.load import LoadedModel
from fewbit.runtime.runner import EngineRunner, RuntimeChoice

__all__ = ["BlockPlan", "LatencySettings", "measure_latency", "plan_blocks", "symmetric_interval"]

_GENERATED_TOKENS = 32
_SETTLE_BELOW_MS = 50.0
_SLOW_MS = 250.0


@dataclass(frozen=True)
class LatencySettings:
    """How much is measured.

    Attributes:
        prompt_tokens: length of the prefill that is timed.
        context_tokens: tokens in the cache while decode is timed.
        decode_steps: most steps per variant.
        budget_s: seconds for the decode steps of one variant together with BF16's in between; slow rows take fewer steps.
        prefill_repetitions: most prefills per variant; at least one, and no more than fit in half the budget.
        generate_prompt_tokens: prompt of the 32-token generation.
        counters: also read hardware counters.
        seed: of the random token ids.
    """

    prompt_tokens: int = 512
    context_tokens: int = 128
    decode_steps: int = 120
    budget_s: float = 4.0
    prefill_repetitions: int = 3
    generate_prompt_tokens: int = 32
    counters: bool = False
    seed: int = 0


@dataclass(frozen=True)
class BlockPlan:
    """`pairs` pairs of blocks, each of `settling` uncounted and `steps` counted steps per model."""

    pairs: int
    steps: int
    settling: int


def plan_blocks(*, baseline_ms: float, variant_ms: float, settings: LatencySettings) -> BlockPlan:
    """How the steps are divided: at least six pairs (fewer give no interval), twelve where the budget allows, then longer blocks.

    Args:
        baseline_ms, variant_ms: one step of each, as the warm-up saw it.
    """
    pair_ms = baseline_ms + variant_ms
    settling = 1 if max(baseline_ms, variant_ms) < _SETTLE_BELOW_MS else 0
    affordable = int(settings.budget_s * 1e3 / pair_ms)  # steps of each model, settling ones included
    pairs = max(MIN_SAMPLES_FOR_INTERVAL, min(12, affordable // (1 + settling), settings.decode_steps))
    steps = max(1, min(affordable // pairs - settling, -(-settings.decode_steps // pairs)))
    return BlockPlan(pairs=pairs, steps=steps, settling=settling)


def symmetric_interval(ratios: list[float]) -> Interval:
    """The speed-up of a model over itself: 1, with the wider of the interval and its reciprocal."""
    measured = median_interval(ratios)
    return Interval(value=1.0, low=min(measured.low, 1 / measured.high, 1.0), high=max(measured.high, 1 / measured.low, 1.0))


@dataclass(frozen=True)
class _Series:
    """The variant's times in ms, and BF16's over the variant's per pair of neighbours."""

    times: list[float]
    ratios: list[float]


def measure_latency(
    baseline: LoadedModel,
    variant: LoadedModel,
    machine: MachineResult,
    *,
    settings: LatencySettings | None = None,
    scale: LayerScale | None = None,
    runtime: RuntimeChoice = "auto",
) -> LatencyResult:
    """The latency figures of one variant.

    Args:
        baseline: the same weights in BF16; stays resident while the variants come and go.
        variant: may be `baseline` itself, or share its model under another KV-cache scheme.
        machine: the machine's figures from the same run.
        settings: how much is measured.
        scale: to the whole stack, when the models are slices; times, bytes and operations are then scaled and the result says so.
        runtime: who runs the passes of both, see `runtime.runner.make_runner`.

    Raises:
        MeasurementError: the prompt or the context does not fit the model, or the times cannot be scaled.
    """
    settings = settings or LatencySettings()
    layers = variant.config.get_text_config(decoder=True).num_hidden_layers
    scale = scale or LayerScale(layers, layers)
    ours, theirs = (
        StepRunner.start(
            loaded,
            prompt_tokens=settings.prompt_tokens,
            context_tokens=settings.context_tokens,
            scale=scale,
            seed=settings.seed,
            runtime=runtime,
        )
        for loaded in (variant, baseline)
    )
    is_baseline = variant.model is baseline.model and variant.scheme == baseline.scheme
    before = measure_read_bandwidth(passes=1, device=ours.device)[0]
    decode = _measure_decode(theirs, ours, settings)
    bandwidth = (before + measure_read_bandwidth(passes=1, device=ours.device)[0]) / 2
    prefills = _measure_prefill(theirs, ours, settings)
    p50, prefill_ms = median(decode.times), median(prefills.times)
    raw_ms = ours.raw_step()  # what a step takes here and now; `p50` may be scaled to layers that are not there
    overhead = _overhead_share(ours, replace(variant, scheme=baseline.scheme), raw_ms, settings)
    copies = not isinstance(ours.runner, EngineRunner)
    step = step_cost(variant, scale, tokens=1, context=settings.context_tokens, cache_copies=copies)
    prompt = step_cost(variant, scale, tokens=settings.prompt_tokens, context=0, cache_copies=copies)
    shares = _Shares.of(step, p50, overhead, machine, bandwidth)
    prefill_shares = _Shares.of(prompt, prefill_ms, overhead * p50 / prefill_ms, machine, bandwidth)
    return LatencyResult(
        prefill_tokens=settings.prompt_tokens,
        prefill_ms=prefill_ms,
        prefill_n=len(prefills.times),
        decode_n=len(decode.times),
        decode_context_tokens=settings.context_tokens,
        decode_ms_p50=p50,
        decode_ms_p95=percentile(decode.times, 95),
        decode_ms_p99=percentile(decode.times, 99) if len(decode.times) >= MIN_SAMPLES_FOR_P99 else None,
        generate_32_ms=_generation_ms(variant, settings, scale, raw_ms, runtime),
        generate_prompt_tokens=settings.generate_prompt_tokens,
        speedup_over_bf16=symmetric_interval(decode.ratios) if is_baseline else median_interval(decode.ratios),
        prefill_speedup_over_bf16=1.0 if is_baseline else median(prefills.ratios),
        weight_bytes_per_step=step.weight_bytes,
        traffic_bytes_per_step=step.traffic_bytes,
        achieved_weight_gb_s=step.weight_bytes / p50 / 1e6,
        traffic_gb_s=step.traffic_bytes / p50 / 1e6,
        read_bandwidth_gb_s=bandwidth,
        bandwidth_share=shares.bandwidth,
        compute_share=shares.compute,
        overhead_share=shares.overhead,
        bound=shares.bound,
        prefill_compute_share=prefill_shares.compute,
        prefill_overhead_share=prefill_shares.overhead,
        prefill_bound=prefill_shares.bound,
        operators=ours.operators(_affordable(raw_ms, 10)),
        scaled=scale.is_scaled,
        counters=measure_counters(ours.raw_step, steps=_affordable(raw_ms, 20), device=ours.device) if settings.counters else None,
        runtime=ours.runner.path,
        runtime_reason=ours.runner.reason,
    )


@dataclass(frozen=True)
class _Shares:
    """What a phase used of the machine, as fractions."""

    bandwidth: float
    compute: float
    overhead: float
    bound: Bound

    @classmethod
    def of(cls, cost: StepCost, milliseconds: float, overhead: float, machine: MachineResult, bandwidth_gb_s: float) -> _Shares:
        bandwidth = cost.traffic_bytes / milliseconds / 1e6 / bandwidth_gb_s
        compute = cost.operations / milliseconds / 1e6 / machine.gemm_gflop_s
        return cls(bandwidth, compute, overhead, name_bound(overhead_share=overhead, bandwidth_share=bandwidth, compute_share=compute))


def _measure_decode(theirs: StepRunner, ours: StepRunner, settings: LatencySettings) -> _Series:
    warm_ms = []
    for runner in (theirs, ours):
        first_ms = runner.raw_step()
        # A step that takes so long has nothing left to warm up.
        warm_ms.append(first_ms if first_ms > _SLOW_MS else min(runner.raw_step() for _ in range(2)))
    plan = plan_blocks(baseline_ms=warm_ms[0], variant_ms=warm_ms[1], settings=settings)
    times: list[float] = []
    ratios: list[float] = []
    for pair in range(plan.pairs):
        turns = (theirs, ours) if pair % 2 == 0 else (ours, theirs)
        block = {id(runner): runner.decode_block(plan.steps, settling=plan.settling) for runner in turns}
        times += block[id(ours)]
        ratios.append(median(block[id(theirs)]) / median(block[id(ours)]))
    return _Series(times, ratios)


def _measure_prefill(theirs: StepRunner, ours: StepRunner, settings: LatencySettings) -> _Series:
    """Prefills in turns. The first pair allocates and plans; it counts only when it took so long that no other fits in the budget."""
    tokens = settings.prompt_tokens
    started = time.perf_counter()
    pairs = [(theirs.prefill(tokens), ours.prefill(tokens))]
    affordable = min(settings.prefill_repetitions, int(settings.budget_s / 2 / (time.perf_counter() - started)))
    if affordable:
        pairs = [(theirs.prefill(tokens), ours.prefill(tokens)) for _ in range(affordable)]
    return _Series([after for _, after in pairs], [before / after for before, after in pairs])


def _overhead_share(ours: StepRunner, uncached: LoadedModel, raw_ms: float, settings: LatencySettings) -> float:
    """The framework's time per step over the whole step's, the median of three pairs of blocks (one, when steps are slow).

    Args:
        ours: the variant. uncached: the same model with a BF16 cache. raw_ms: about one step of `ours`.
    """
    steps, settling = _affordable(6 * raw_ms, 10), 1 if raw_ms < _SETTLE_BELOW_MS else 0
    bare = StepRunner.start(uncached, prompt_tokens=1, context_tokens=1, scale=ours.scale, seed=settings.seed, runtime=_path(ours))
    shares = []
    for _ in range(1 if raw_ms > _SLOW_MS else 3):  # beside such a step the framework's time is below a hundredth
        whole = median(ours.decode_block(steps, settling=settling))
        shares.append(median(bare.emptied_decode(steps)) / whole)
    return median(shares)


def _path(runner: StepRunner) -> RuntimeChoice:
    return "engine" if isinstance(runner.runner, EngineRunner) else "transformers"


def _generation_ms(loaded: LoadedModel, settings: LatencySettings, scale: LayerScale, step_ms: float, runtime: RuntimeChoice) -> float:
    """Prefill of the short prompt and the 32 tokens after it.

    The first token comes out of the prefill, so 31 steps follow. They are run while they fit in a quarter of the budget; those that do
    not are counted with the mean of those that were run.
    """
    tokens = settings.generate_prompt_tokens
    runner = StepRunner.start(loaded, prompt_tokens=tokens, context_tokens=tokens, scale=scale, seed=settings.seed, runtime=runtime)
    prefill_ms = runner.prefill(tokens)
    steps = _GENERATED_TOKENS - 1
    run = max(1, min(steps, int(settings.budget_s * 250 / step_ms)))
    return prefill_ms + sum(runner.decode_block(run)) / run * steps


def _affordable(step_ms: float, most: int) -> int:
    """Steps that take about a second, at least one."""
    return max(1, min(most, int(1000 / max(step_ms, 1e-6))))
