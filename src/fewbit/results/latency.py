"""What a variant's steps take, and what bounds them."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN, Interval

__all__ = ["Bound", "Counters", "LatencyResult", "OperatorTimes"]

Bound = Literal["bandwidth", "compute", "overhead"]


@dataclass(frozen=True, config=FROZEN)
class OperatorTimes:
    """Mean decode time of one step by operator class, in milliseconds; measured in a pass of its own with timing hooks."""

    ffn_projections_ms: float
    attention_projections_ms: float
    attention_ms: float
    lm_head_ms: float
    rest_ms: float


@dataclass(frozen=True, config=FROZEN)
class Counters:
    """Hardware counters over the decode steps; `note` says why there are none."""

    tool: str
    values: dict[str, float]
    note: str = ""


@dataclass(frozen=True, config=FROZEN)
class LatencyResult:
    """Latency of one variant, measured in turns with BF16 in the same process.

    Attributes:
        scaled: True when a slice of the layers was measured and the figures were scaled to the whole stack.
        decode_ms_p99: only from 100 steps on, else None.
        generate_32_ms: prefill of `generate_prompt_tokens` and 32 decoded tokens.
        speedup_over_bf16: median of the paired ratios BF16 / variant of decode time, with its interval.
        achieved_weight_gb_s: resident weight bytes read per step over the median step, 1e9 bytes per second.
        traffic_gb_s: the same with the copies that an unfused kernel writes and reads.
        read_bandwidth_gb_s: DRAM reads measured beside this row's decode steps; None in older files, whose shares refer to the machine's.
        bandwidth_share: traffic_gb_s over that bandwidth.
        compute_share: operations of the step over the machine's measured GEMM rate.
        overhead_share: time of a decode step with all linears and the cache emptied, over the median step.
        prefill_compute_share, prefill_overhead_share: the same for the prefill.
        bound, prefill_bound: named from these shares.
        runtime: who ran the passes, `engine` or `transformers`.
        runtime_reason: why not the engine; empty when it did.
    """

    prefill_tokens: int
    prefill_ms: float
    prefill_n: int
    decode_n: int
    decode_context_tokens: int
    decode_ms_p50: float
    decode_ms_p95: float
    decode_ms_p99: float | None
    generate_32_ms: float
    generate_prompt_tokens: int
    speedup_over_bf16: Interval
    prefill_speedup_over_bf16: float
    weight_bytes_per_step: int
    traffic_bytes_per_step: int
    achieved_weight_gb_s: float
    traffic_gb_s: float
    bandwidth_share: float
    compute_share: float
    overhead_share: float
    bound: Bound
    prefill_compute_share: float
    prefill_overhead_share: float
    prefill_bound: Bound
    operators: OperatorTimes
    scaled: bool = False
    counters: Counters | None = None
    read_bandwidth_gb_s: float | None = None
    runtime: str = "transformers"
    runtime_reason: str = ""
