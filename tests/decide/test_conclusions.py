"""Each conclusion is claimed exactly when the figures support it."""

from dataclasses import replace

from fewbit.decide.conclusions import conclude
from fewbit.results import (
    Bound,
    CompareResults,
    Environment,
    Interval,
    KernelUse,
    LatencyResult,
    MachineResult,
    MemoryResult,
    ModelInfo,
    OperatorTimes,
    QualityResult,
    ShapesResult,
    VariantInfo,
    VariantResult,
)


def interval(value: float, half_width: float = 0.0) -> Interval:
    return Interval(value, value - half_width, value + half_width)


def latency(
    speedup: float, half_width: float = 0.02, bound: Bound = "bandwidth", prefill: float = 1.0, overhead: float = 0.1
) -> LatencyResult:
    return LatencyResult(
        prefill_tokens=512,
        prefill_ms=100.0,
        prefill_n=5,
        decode_n=100,
        decode_context_tokens=128,
        decode_ms_p50=20.0 / speedup,
        decode_ms_p95=22.0 / speedup,
        decode_ms_p99=None,
        generate_32_ms=700.0 / speedup,
        generate_prompt_tokens=32,
        speedup_over_bf16=interval(speedup, half_width),
        prefill_speedup_over_bf16=prefill,
        weight_bytes_per_step=10**9,
        traffic_bytes_per_step=10**9,
        achieved_weight_gb_s=30.0,
        traffic_gb_s=30.0,
        bandwidth_share=0.7,
        compute_share=0.1,
        overhead_share=overhead,
        bound=bound,
        prefill_compute_share=0.8,
        prefill_overhead_share=0.05,
        prefill_bound="compute",
        operators=OperatorTimes(1.0, 1.0, 1.0, 1.0, 1.0),
    )


def quality(delta: float, half_width: float = 0.1, threshold: float = 5.0) -> QualityResult:
    return QualityResult(
        perplexity=interval(10 * (1 + delta / 100)),
        perplexity_delta_percent=interval(delta, half_width),
        kl_divergence_nats=interval(0.01),
        flip_share=interval(0.02),
        threshold_percent=threshold,
        passed=delta <= threshold,
    )


def row(
    name: str,
    speed: LatencyResult | None,
    quality_result: QualityResult | None,
    *,
    scheme: str = "W4A16",
    bits: float = 4.0,
    fused: bool = True,
    linear_bytes: int = 25,
    kv: str = "BF16",
    sequences: int = 10,
    kv_bytes: float = 100.0,
) -> VariantResult:
    return VariantResult(
        variant=VariantInfo(name, name.upper(), scheme, "w", "BF16", kv, "rtn", bits),
        kernels=[KernelUse("fast" if fused else "reference", "", fused, 7, [])],
        memory=MemoryResult(
            resident_weight_bytes=linear_bytes + 10,
            quantized_linear_bytes=linear_bytes,
            quantized_linear_bf16_bytes=100,
            effective_bits_per_weight=bits,
            effective_bits_per_parameter=bits,
            kv_bytes_per_token=kv_bytes,
            kv_constant_bytes=0,
            kv_sequences_that_fit=sequences,
            kv_context_tokens=1024,
            memory_budget_bytes=2**30,
        ),
        latency=speed,
        quality=quality_result,
    )


def results(*variants: VariantResult, shapes: list[VariantResult] | None = None) -> CompareResults:
    model = ModelInfo("models/small", "Llama", 100, 80, 2, 2)
    return CompareResults(
        command="fewbit compare",
        run_id="0",
        started_at="2026-01-01T00:00:00+00:00",
        duration_s=1.0,
        environment=Environment("0", "3.11", "linux", "cpu", [], 2, 2**34, "cpu", 2, {}),
        machine=MachineResult(40.0, "test", 300.0, "bfloat16", 1.0),
        model=model,
        variants=list(variants),
        shapes=ShapesResult(replace(model, source="shapes:qwen2.5-1.5b"), shapes) if shapes else None,
    )


BF16 = row("bf16", latency(1.0), quality(0.0), scheme="BF16", bits=16.0, linear_bytes=100)


def said(found: list[str], text: str) -> bool:
    return any(text in sentence for sentence in found)


def test_the_fastest_variant_that_passes_is_deployed() -> None:
    found = conclude(
        results(BF16, row("int8", latency(1.5), quality(0.1), scheme="W8A16", bits=8.0), row("int4", latency(2.5), quality(8.0)))
    )
    assert found[0].startswith("Deploy INT8 on this machine")
    assert said(found, "Fails the 5 % perplexity threshold: INT4 (+8.0 %)")


def test_nothing_faster_means_do_not_quantize_for_speed() -> None:
    found = conclude(results(BF16, row("int4", latency(1.01, half_width=0.05), quality(1.0))))
    assert found[0].startswith("Do not quantize for speed here")
    assert "INT4 is the smallest that passes" in found[0]


def test_nothing_that_passes_keeps_bf16() -> None:
    assert conclude(results(BF16, row("int2", latency(3.0), quality(900.0), bits=2.0)))[0].startswith("Keep BF16 weights")


def test_overhead_bound_model_is_named_and_real_shapes_decide_speed() -> None:
    small = replace(BF16, latency=latency(1.0, bound="overhead", overhead=0.8))
    shapes = [replace(BF16, quality=None), row("int4", latency(2.4), None)]
    found = conclude(results(small, row("int4", latency(1.0), quality(2.0)), shapes=shapes))
    assert found[0].startswith("Deploy INT4")
    assert said(found, "Do not quantize small for speed: its decode is overhead-bound. 80%")
    assert not said(found, "Do not quantize qwen2.5-1.5b")


def test_same_bits_opposite_speed_needs_disjoint_intervals() -> None:
    fused = row("int4", latency(2.4), quality(2.0))
    unfused = row("int4-unfused", latency(0.3), quality(2.0), fused=False)
    found = conclude(results(BF16, fused, unfused))
    assert said(found, "Same bits, opposite speed")
    assert said(found, "8.0x faster than unfused")
    assert said(found, "Slower than BF16 in decode on small: INT4-UNFUSED (0.30x, it dequantizes before each GEMM)")
    overlapping = row("int4-unfused", latency(2.3, half_width=0.5), quality(2.0), fused=False)
    assert not said(conclude(results(BF16, fused, overlapping)), "Same bits")


def test_near_lossless_needs_the_whole_interval() -> None:
    narrow = row("int8", latency(1.0), quality(0.1, half_width=0.1))
    wide = row("int8", latency(1.0), quality(0.1, half_width=2.0))
    assert said(conclude(results(BF16, narrow)), "Near-lossless")
    assert not said(conclude(results(BF16, wide)), "Near-lossless")


def test_an_interval_across_the_threshold_is_called_unclear() -> None:
    assert said(conclude(results(BF16, row("int4", latency(1.0), quality(4.9, half_width=0.5)))), "Too close to the threshold")
    assert not said(conclude(results(BF16, row("int4", latency(1.0), quality(1.0, half_width=0.5)))), "Too close")


def test_kv_cache_gain_is_in_sequences() -> None:
    cached = row("kv-int8", latency(0.9), quality(0.1), scheme="KV-INT8", bits=16.0, kv="INT8", sequences=19, kv_bytes=52.0)
    assert said(conclude(results(BF16, cached)), "KV-INT8 1.90x (0.52 of the bytes per token)")


def test_prefill_gain_is_named_only_when_measured() -> None:
    slower = conclude(results(BF16, row("int4", latency(2.0, prefill=0.8), quality(1.0))))
    assert said(slower, "no quantized variant is clearly faster there; slower there: INT4 (0.80x)")
    alike = conclude(results(BF16, row("int4", latency(2.0, prefill=1.1), quality(1.0))))
    assert said(alike, "no quantized variant is clearly faster there.")
    assert said(conclude(results(BF16, row("w8a8", latency(2.0, prefill=1.6), quality(1.0)))), "faster there: W8A8 (1.60x)")


def test_only_the_baseline_concludes_nothing_about_variants() -> None:
    assert not said(conclude(results(BF16)), "Deploy")


def test_nothing_is_deployed_whose_quality_interval_crosses_the_threshold() -> None:
    unclear = row("int4", latency(2.5), quality(4.9, half_width=0.5))
    assert conclude(results(BF16, unclear))[0].endswith("passes the quality threshold with its whole interval.")
    found = conclude(results(BF16, unclear, row("int8", latency(1.5), quality(0.1), scheme="W8A16", bits=8.0)))
    assert found[0].startswith("Deploy INT8")


def test_a_tie_in_speed_is_said() -> None:
    int8 = row("int8", latency(2.0, half_width=0.2), quality(0.1), scheme="W8A16", bits=8.0)
    found = conclude(results(BF16, int8, row("int4", latency(2.1, half_width=0.2), quality(1.0))))
    assert found[0].startswith("Deploy INT4") and found[0].endswith("INT8: as fast within the intervals.")
    clear = row("int4", latency(3.0, half_width=0.2), quality(1.0))
    assert "as fast" not in conclude(results(BF16, int8, clear))[0]


def test_speed_and_quality_name_the_model_they_were_measured_on() -> None:
    shapes = [replace(BF16, quality=None), row("int4", latency(2.4), None)]
    sentence = conclude(results(BF16, row("int4", latency(1.0), quality(2.0)), shapes=shapes))[0]
    assert "2.40x BF16 on qwen2.5-1.5b shapes" in sentence and "+2.00 % on small" in sentence


def test_an_overhead_bound_model_that_still_gains_is_not_told_otherwise() -> None:
    small = replace(BF16, latency=latency(1.0, bound="overhead", overhead=0.6))
    found = conclude(results(small, row("int4", latency(1.4), quality(2.0))))
    assert found[0].startswith("Deploy INT4")
    assert said(found, "Little to gain on small") and not said(found, "Do not quantize")


def test_only_kv_variants_say_nothing_about_weights() -> None:
    cached = row("kv-int8", latency(0.9), quality(0.1), scheme="KV-INT8", bits=16.0, kv="INT8", sequences=19, kv_bytes=52.0)
    no_weights = replace(cached, memory=replace(cached.memory, effective_bits_per_weight=None))
    found = conclude(results(replace(BF16, memory=replace(BF16.memory, effective_bits_per_weight=None)), no_weights))
    assert not said(found, "Deploy") and not said(found, "Keep BF16")
    same = replace(no_weights, memory=replace(no_weights.memory, kv_sequences_that_fit=10))
    assert not said(conclude(results(BF16, same)), "hold more sequences")
