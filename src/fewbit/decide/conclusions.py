"""What the measurements of one comparison support, in words.

Every sentence follows from figures in the same results file, and only where their intervals allow it: "faster" means that the whole 95 %
interval of the paired speed-up lies above 1, "near-lossless" that the whole interval of the perplexity difference is within half a percent,
and nothing is recommended whose interval crosses the quality threshold.
Speed is concluded from the section that has real shapes when there is one, because a model that fits in the cache says nothing about
memory bandwidth; quality always from the model itself, because random weights have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fewbit.results import CompareResults, Interval, LatencyResult, ModelInfo, VariantResult

__all__ = ["conclude"]

_BASELINE = "bf16"
# Prefill is repeated a few times only and its ratios carry no interval; on a shared machine they scatter by a tenth.
_CLEAR_PREFILL_RATIO = 1.2
_NEAR_LOSSLESS_PERCENT = 0.5


def conclude(results: CompareResults) -> list[str]:
    """The conclusions, most important first; an empty list when nothing but the baseline was measured.

    Args:
        results: a comparison; its own `conclusions` are ignored.
    """
    sections: list[tuple[ModelInfo, list[VariantResult]]] = [(results.model, results.variants)]
    if results.shapes is not None:
        sections.insert(0, (results.shapes.model, results.shapes.variants))
    sentences = _deployment(results, *sections[0])
    for model, variants in sections:
        sentences += _overhead(model, variants)
        sentences += _kernel_decides(model, variants)
    sentences += _slower(*sections[0])
    sentences += _prefill(*sections[0])
    sentences += _quality(results)
    sentences += _kv_cache(results.variants)
    return sentences


def _name(model: ModelInfo) -> str:
    if model.source.startswith("shapes:"):
        return model.source.removeprefix("shapes:") + " shapes"
    return model.source.rstrip("/").rsplit("/", 1)[-1]


def _latency(variants: Sequence[VariantResult], name: str) -> LatencyResult | None:
    return next((v.latency for v in variants if v.variant.name == name), None)


def _faster(latency: LatencyResult | None) -> bool:
    return latency is not None and latency.speedup_over_bf16.low > 1.0


def _slower_than_bf16(latency: LatencyResult | None) -> bool:
    return latency is not None and latency.speedup_over_bf16.high < 1.0


def _times(interval: Interval) -> str:
    return f"{interval.value:.2f}x"


def _join(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _deployment(results: CompareResults, fast_model: ModelInfo, fast_section: Sequence[VariantResult]) -> list[str]:
    """The one sentence a reader came for: what to deploy, among the variants that pass the quality threshold with their whole interval."""
    speed = {v.variant.name: v.latency for v in fast_section}
    judged = _select(results.variants, lambda v: v.memory.effective_bits_per_weight is not None)
    weights = [v for v in judged if _clearly_passes(v)]
    if not judged:
        return []
    if not weights:
        reason = "passes the quality threshold"
        if any(v.quality is not None and v.quality.passed for v in judged):
            reason = "passes the quality threshold with its whole interval"
        return [f"Keep BF16 weights: none of the measured weight formats {reason}."]
    faster = [(v, latency.speedup_over_bf16) for v in weights if (latency := speed.get(v.variant.name)) is not None and _faster(latency)]
    if not faster:
        smallest = min(weights, key=lambda v: v.memory.resident_weight_bytes)
        latency = speed.get(smallest.variant.name)
        price = "" if latency is None else f", at {_times(latency.speedup_over_bf16)} BF16's decode speed"
        return [
            "Do not quantize for speed here: no format that passes the quality threshold decodes faster than BF16. "
            f"For memory, {smallest.variant.label} is the smallest that passes{price}."
        ]
    best, gain = max(faster, key=lambda pair: pair[1].value)
    as_fast = [v.variant.label for v, other in faster if v is not best and other.high >= gain.low]
    tie = f" {_join(as_fast)}: as fast within the intervals." if as_fast else ""
    ratio = best.memory.quantized_linear_bytes / best.memory.quantized_linear_bf16_bytes
    assert best.quality is not None
    return [
        f"Deploy {best.variant.label} on this machine: of the formats that pass the quality threshold it decodes fastest, "
        f"{_times(gain)} BF16 on {_name(fast_model)}, with its linears at {ratio:.2f}x of their BF16 memory and perplexity "
        f"{best.quality.perplexity_delta_percent.value:+.2f} % on {_name(results.model)}.{tie}"
    ]


def _clearly_passes(variant: VariantResult) -> bool:
    quality = variant.quality
    return quality is not None and quality.passed and quality.perplexity_delta_percent.high <= quality.threshold_percent


def _overhead(model: ModelInfo, variants: Sequence[VariantResult]) -> list[str]:
    """The share of a step that no weight format changes bounds every speed-up from above (Amdahl's law)."""
    baseline = _latency(variants, _BASELINE)
    if baseline is None or baseline.bound != "overhead":
        return []
    step = f"{baseline.overhead_share:.0%} of a {baseline.decode_ms_p50:.2f} ms BF16 step remain when the linears compute nothing"
    if any(_faster(v.latency) for v in variants if v.variant.name != _BASELINE):
        return [f"Little to gain on {_name(model)}: its decode is overhead-bound. {step}, and no number format shortens that part."]
    return [f"Do not quantize {_name(model)} for speed: its decode is overhead-bound. {step}, and no variant is measurably faster."]


def _kernel_decides(model: ModelInfo, variants: Sequence[VariantResult]) -> list[str]:
    """Same integers, fused and unfused: the pairs of variants with equal scheme and different kernels."""
    sentences = []
    for fused in variants:
        for unfused in variants:
            if fused.variant.scheme != unfused.variant.scheme or fused.latency is None or unfused.latency is None:
                continue
            fast, slow = fused.latency, unfused.latency
            is_pair = fused.kernels and unfused.kernels and fused.kernels[0].fused and not unfused.kernels[0].fused
            if not is_pair or fast.speedup_over_bf16.low <= slow.speedup_over_bf16.high:
                continue
            opposite = _faster(fast) and _slower_than_bf16(slow)
            verdict = "Same bits, opposite speed" if opposite else "Same bits, different speed"
            fast_times, slow_times = _times(fast.speedup_over_bf16), _times(slow.speedup_over_bf16)
            sentences.append(
                f"{verdict} on {_name(model)}: {fused.variant.scheme} decodes at {fast_times} BF16 on the fused kernel "
                f"{fused.kernels[0].kernel} and at {slow_times} when the same integers are dequantized before each GEMM. Fused is "
                f"{slow.decode_ms_p50 / fast.decode_ms_p50:.1f}x faster than unfused: the kernel decides, not the bit width."
            )
    return sentences


def _slower(model: ModelInfo, variants: Sequence[VariantResult]) -> list[str]:
    slow = [v for v in variants if v.variant.name != _BASELINE and _slower_than_bf16(v.latency)]
    if not slow:
        return []
    rows = [f"{v.variant.label} ({_times(v.latency.speedup_over_bf16)}, {_why_slow(v)})" for v in slow if v.latency is not None]
    return [f"Slower than BF16 in decode on {_name(model)}: {_join(rows)}."]


def _why_slow(variant: VariantResult) -> str:
    unfused = [use for use in variant.kernels if not use.fused]
    if unfused:
        return "it dequantizes before each GEMM"
    if variant.variant.kv_cache != "BF16":
        return "attention dequantizes the cache in each step"
    return f"{variant.latency.bound}-bound" if variant.latency else ""


def _prefill(model: ModelInfo, variants: Sequence[VariantResult]) -> list[str]:
    baseline = _latency(variants, _BASELINE)
    measured = [v for v in variants if v.latency is not None and v.variant.name != _BASELINE and v.variant.kv_cache == "BF16"]
    if baseline is None or not measured:
        return []
    head = f"Prefill of {baseline.prefill_tokens} tokens on {_name(model)} is {baseline.prefill_bound}-bound in BF16"
    ratios = [(v.variant.label, v.latency.prefill_speedup_over_bf16) for v in measured if v.latency]
    faster = [f"{label} ({ratio:.2f}x)" for label, ratio in ratios if ratio >= _CLEAR_PREFILL_RATIO]
    slower = [f"{label} ({ratio:.2f}x)" for label, ratio in ratios if ratio <= 1 / _CLEAR_PREFILL_RATIO]
    gained = f"faster there: {_join(faster)}" if faster else "no quantized variant is clearly faster there"
    return [f"{head}; {gained}{f'; slower there: {_join(slower)}' if slower else ''}."]


def _select(variants: Sequence[VariantResult], test: Callable[[VariantResult], bool]) -> list[VariantResult]:
    return [v for v in variants if v.variant.name != _BASELINE and v.quality is not None and test(v)]


def _quality(results: CompareResults) -> list[str]:
    def delta(variant: VariantResult) -> Interval:
        assert variant.quality is not None
        return variant.quality.perplexity_delta_percent

    sentences = []
    lossless = _select(results.variants, lambda v: max(abs(delta(v).low), abs(delta(v).high)) <= _NEAR_LOSSLESS_PERCENT)
    if lossless:
        sentences.append(
            f"Near-lossless (the whole interval of the perplexity difference within {_NEAR_LOSSLESS_PERCENT} %): "
            f"{_join([v.variant.label for v in lossless])}."
        )
    failed = _select(results.variants, lambda v: v.quality is not None and not v.quality.passed)
    if failed:
        threshold = failed[0].quality.threshold_percent if failed[0].quality else 0.0
        rows = [f"{v.variant.label} ({delta(v).value:+.1f} %)" for v in failed]
        sentences.append(f"Fails the {threshold:g} % perplexity threshold: {_join(rows)}.")
    unclear = _select(results.variants, lambda v: v.quality is not None and delta(v).low <= v.quality.threshold_percent <= delta(v).high)
    if unclear:
        rows = [v.variant.label for v in unclear]
        sentences.append(f"Too close to the threshold to call on this much text: {_join(rows)}; evaluate more tokens before deciding.")
    return sentences


def _kv_cache(variants: Sequence[VariantResult]) -> list[str]:
    baseline = next((v for v in variants if v.variant.name == _BASELINE), None)
    if baseline is None or baseline.memory.kv_sequences_that_fit == 0:
        return []
    most = baseline.memory.kv_sequences_that_fit
    cached = [v for v in variants if v.variant.kv_cache != "BF16" and _clearly_passes(v) and v.memory.kv_sequences_that_fit > most]
    if not cached:
        return []
    rows = [
        f"{v.variant.label} {v.memory.kv_sequences_that_fit / most:.2f}x "
        f"({v.memory.kv_bytes_per_token / baseline.memory.kv_bytes_per_token:.2f} of the bytes per token)"
        for v in cached
    ]
    return [
        f"KV cache formats that pass the threshold hold more sequences of {baseline.memory.kv_context_tokens} tokens in the same memory: "
        f"{_join(rows)}."
    ]
