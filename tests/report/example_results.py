"""Results files as `fewbit compare` writes them, with values of the size that a small machine gives; built by hand, nothing is measured."""

from __future__ import annotations

from fewbit.results import (
    CompareResults,
    Counters,
    Environment,
    Interval,
    KernelUse,
    LatencyResult,
    MachineResult,
    MemoryResult,
    ModelInfo,
    NoiseFloor,
    OperatorTimes,
    PassedOverKernel,
    ProtocolInfo,
    QualityResult,
    ShapesResult,
    VariantInfo,
    VariantResult,
)

NOT_ASKED = PassedOverKernel("torch-int4pack", "not asked for: the variant pins unfused")
NO_NF4 = PassedOverKernel("torch-int4pack", "multiplies INT4 grids, the weight is NF4")
NO_VNNI = PassedOverKernel("torch-int-mm", "quantizes the inputs too; this scheme keeps them in BF16")

# name, label, scheme, weights, kv, kernel, fused, passed over, nominal bits, effective bits
Row = tuple[str, str, str, str, str, str, bool, list[PassedOverKernel], float, float]
ROWS: list[Row] = [
    ("bf16", "BF16", "BF16", "BF16", "BF16", "dense", True, [], 16.0, 16.0),
    ("int8-w8a16", "INT8 weights (W8A16)", "W8A16", "INT8 per channel, symmetric", "BF16", "torch-int8pack", True, [NO_VNNI], 8.0, 8.06),
    ("int4-w4a16", "INT4 g128 (W4A16)", "W4A16", "INT4 group 128, symmetric", "BF16", "torch-int4pack", True, [], 4.0, 4.125),
    ("int4-w4a16-unfused", "INT4 g128, unfused", "W4A16", "INT4 group 128, symmetric", "BF16", "reference", False, [NOT_ASKED], 4.0, 4.125),
    ("nf4-unfused", "NF4 g64, unfused", "NF4", "NF4 group 64", "BF16", "reference", False, [NO_NF4], 4.0, 4.25),
    ("fp8", "FP8 weights (E4M3)", "FP8A16", "FP8_E4M3 per channel", "BF16", "reference", False, [], 8.0, 8.06),
    ("w8a8", "INT8 W8A8, dynamic", "W8A8", "INT8 per channel, symmetric", "BF16", "torch-int-mm", True, [], 8.0, 8.06),
    ("kv-int8", "KV cache INT8", "KV-INT8", "BF16", "INT8 per token, symmetric, dynamic", "dense", True, [], 16.0, 16.0),
    ("kv-fp8", "KV cache FP8", "KV-FP8", "BF16", "FP8_E4M3 per token, dynamic", "dense", True, [], 16.0, 16.0),
    ("kv-int4", "KV cache INT4", "KV-INT4", "BF16", "INT4 group 32, affine, dynamic, newest 32 in BF16", "dense", True, [], 16.0, 16.0),
]
# name: (perplexity delta %, half width, KL, flips)
QUALITY = {
    "bf16": (0.0, 0.0, 0.0, 0.0),
    "int8-w8a16": (0.04, 0.06, 0.00041, 0.0091),
    "int4-w4a16": (6.9, 0.8, 0.0712, 0.1083),
    "int4-w4a16-unfused": (6.9, 0.8, 0.0712, 0.1083),
    "nf4-unfused": (3.8, 0.5, 0.0397, 0.0802),
    "fp8": (0.71, 0.21, 0.0068, 0.0345),
    "w8a8": (0.19, 0.1, 0.0017, 0.0181),
    "kv-int8": (0.02, 0.05, 0.000019, 0.0061),
    "kv-fp8": (0.33, 0.12, 0.0035, 0.0251),
    "kv-int4": (4.6, 0.6, 0.0481, 0.0911),
}
# name: decode ms of the model, of the shapes
DECODE = {
    "bf16": (2.31, 246.0),
    "int8-w8a16": (2.22, 139.0),
    "int4-w4a16": (2.02, 88.1),
    "int4-w4a16-unfused": (6.87, 1310.0),
    "nf4-unfused": (8.94, 1874.0),
    "fp8": (7.31, 1032.0),
    "w8a8": (3.12, 201.0),
    "kv-int8": (2.84, 251.0),
    "kv-fp8": (2.97, 253.0),
    "kv-int4": (3.61, 259.0),
}
KV_FACTOR = {"kv-int8": 0.516, "kv-fp8": 0.516, "kv-int4": 0.313}


def _memory(row: Row, linear_bf16: int, rest: int, kv_token: int) -> MemoryResult:
    name, effective = row[0], row[9]
    linears = int(linear_bf16 * effective / 16)
    kv = kv_token * KV_FACTOR.get(name, 1.0)
    constant = 32 * kv_token if name == "kv-int4" else 0
    disk = None if name == "nf4-unfused" else linears + rest + 61_440
    return MemoryResult(
        resident_weight_bytes=linears + rest,
        quantized_linear_bytes=linears,
        quantized_linear_bf16_bytes=linear_bf16,
        effective_bits_per_weight=effective if effective < 16 else None,
        effective_bits_per_parameter=16 * (linears + rest) / (linear_bf16 + rest),
        kv_bytes_per_token=kv,
        kv_constant_bytes=constant,
        kv_sequences_that_fit=int((8e9 - linears - rest) / (kv * 4096 + constant)),
        kv_context_tokens=4096,
        memory_budget_bytes=8_000_000_000,
        disk_bytes=disk,
        disk_note="" if disk else "compressed-tensors has no NF4",
        peak_rss_bytes=412_000_000 + linears + rest,
        baseline_rss_bytes=398_000_000,
    )


def _latency(row: Row, memory: MemoryResult, scaled: bool) -> LatencyResult:
    name, fused = row[0], row[6]
    ms, bf16 = DECODE[name][scaled], DECODE["bf16"][scaled]
    traffic = memory.resident_weight_bytes + (0 if fused else 2 * memory.quantized_linear_bf16_bytes)
    overhead = min(0.97, (1.6 if not scaled else 11.0) / ms)
    share = traffic / (ms * 1e6) / 18.4
    head = 0.2 * bf16 if scaled else 0.1 * bf16
    linears = ms * (1 - min(overhead, 0.6)) - head * 0.5
    return LatencyResult(
        prefill_tokens=128,
        prefill_ms=ms * (14.2 if scaled else 5.1),
        prefill_n=5,
        decode_n=24 if scaled else 200,
        decode_context_tokens=128,
        decode_ms_p50=ms,
        decode_ms_p95=ms * 1.09,
        decode_ms_p99=None if scaled else ms * 1.31,
        generate_32_ms=ms * 37.3,
        generate_prompt_tokens=128,
        speedup_over_bf16=Interval(bf16 / ms, bf16 / ms * 0.97, bf16 / ms * 1.03) if name != "bf16" else Interval(1.0, 1.0, 1.0),
        prefill_speedup_over_bf16=bf16 / ms * 0.8 if name != "bf16" else 1.0,
        weight_bytes_per_step=memory.resident_weight_bytes,
        traffic_bytes_per_step=traffic,
        achieved_weight_gb_s=memory.resident_weight_bytes / ms / 1e6,
        traffic_gb_s=traffic / ms / 1e6,
        bandwidth_share=share,
        compute_share=0.07,
        overhead_share=overhead,
        bound="overhead" if overhead >= 0.5 else ("bandwidth" if share >= 0.5 else "compute"),
        prefill_compute_share=0.71,
        prefill_overhead_share=0.06,
        prefill_bound="compute",
        operators=OperatorTimes(linears * 0.7, linears * 0.3, ms * 0.06, head, ms * 0.07),
        scaled=scaled,
        counters=Counters("perf stat", {}, "perf is not installed") if name == "bf16" else None,
    )


def _quality(name: str) -> QualityResult:
    delta, half, kl, flips = QUALITY[name]
    perplexity = 7.842 * (1 + delta / 100)
    return QualityResult(
        perplexity=Interval(perplexity, perplexity * 0.962, perplexity * 1.041),
        perplexity_delta_percent=Interval(delta, delta - half, delta + half),
        kl_divergence_nats=Interval(kl, kl * 0.92, kl * 1.08),
        flip_share=Interval(flips, flips * 0.94, flips * 1.06),
        threshold_percent=5.0,
        passed=delta <= 5.0,
    )


def _variants(linear_bf16: int, rest: int, kv_token: int, linears: int, *, shapes: bool) -> list[VariantResult]:
    found = []
    for row in ROWS:
        name, label, scheme, weights, kv, kernel, fused, passed_over, nominal, _ = row
        memory = _memory(row, linear_bf16, rest, kv_token)
        found.append(
            VariantResult(
                variant=VariantInfo(
                    name=name,
                    label=label,
                    scheme=scheme,
                    weights=weights,
                    input_activations="INT8 per token, symmetric, dynamic" if name == "w8a8" else "BF16",
                    kv_cache=kv,
                    method="none" if weights == "BF16" else "rtn",
                    bits_nominal=nominal,
                ),
                kernels=[KernelUse(kernel, f"{kernel}, in words", fused, linears, passed_over)],
                memory=memory,
                latency=_latency(row, memory, shapes),
                quality=None if shapes else _quality(name),
            )
        )
    return found


def _environment() -> Environment:
    return Environment(
        fewbit="0.1.0",
        python="3.11.9",
        platform="Linux-6.1-x86_64",
        cpu="AMD EPYC 7B13",
        cpu_flags=["avx2", "fma", "f16c"],
        cpu_cores=2,
        memory_bytes=33_421_000_000,
        device="cpu",
        threads=2,
        versions={"torch": "2.13.0+cpu", "transformers": "5.23.0"},
    )


def example_results() -> CompareResults:
    """A whole run: ten variants of the bundled model, and of a stack in the shapes of a 1.5 B model."""
    return CompareResults(
        command="fewbit compare --shapes qwen2.5-1.5b --out results",
        run_id="5f0c6a1e9d3b",
        started_at="2026-11-21T09:14:03+00:00",
        duration_s=287.4,
        environment=_environment(),
        machine=MachineResult(18.4, "best of 5 passes of summing 1 GB with 2 threads", 96.3, "bfloat16", 1.37),
        model=ModelInfo("fewbit-reference-6m", "LlamaForCausalLM", 6_294_784, 5_242_880, 6, 6, "9c1f" * 16),
        variants=_variants(10_485_760, 2_103_808, 3072, 42, shapes=False),
        protocol=ProtocolInfo("stdlib", "held-out modules of the standard library", 512, 512, 64, 32_704, "ab12" * 16, "3.11.9", 0),
        noise_floor=NoiseFloor(0.003, 0.0000021, 0.0007),
        shapes=ShapesResult(
            ModelInfo("shapes:qwen2.5-1.5b", "Qwen2ForCausalLM", 1_543_714_304, 1_310_195_712, 4, 28, None, True),
            _variants(2_620_391_424, 467_037_184, 28_672, 196, shapes=True),
            "random weights; time per layer from a stack of 4 layers and the lm_head, measured in turns",
        ),
        conclusions=[
            "Deploy INT8 W8A16: perplexity rises by 0.04 %, and in the shapes of qwen2.5-1.5b it decodes 1.77\u00d7 as fast as BF16.",
            "Do not quantize this model for speed: its decode is overhead-bound, 69 % of a BF16 step is not spent in linears.",
            "The kernel decides, not the bits: INT4 is 2.79\u00d7 as fast as BF16 on the fused kernel and "
            "5.3\u00d7 slower unfused, with the same integers.",
            "INT4 g128 by rounding to nearest fails the 5 % threshold on this model (+6.90 %).",
        ],
        warnings=["A process used 31 % of a core while latency was measured: the tails (p95, p99) are wider than on an idle machine."],
    )


def minimal_results() -> CompareResults:
    """The least that a results file may hold: two variants, memory only."""
    full = example_results()
    variants = [VariantResult(row.variant, row.kernels, row.memory) for row in (full.variants[0], full.variants[2])]
    return CompareResults("fewbit compare", "0000", "2026-11-21T09:14:03+00:00", 3.0, full.environment, full.machine, full.model, variants)
