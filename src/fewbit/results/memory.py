"""What a variant takes: resident, on disk, at its peak, and per cached token."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN

__all__ = ["MemoryResult"]


@dataclass(frozen=True, config=FROZEN)
class MemoryResult:
    """Memory of one variant.

    Attributes:
        resident_weight_bytes: all parameters and packed weights that stay resident.
        quantized_linear_bytes: of those, the quantized linears' packed weights with scales and zero points.
        quantized_linear_bf16_bytes: what the same linears take in BF16.
        disk_bytes: the checkpoint's weight files; None when no layout can hold the variant (`disk_note` says why).
        effective_bits_per_weight: over the quantized linears, scales and zero points counted.
        effective_bits_per_parameter: over the whole model, what stays in high precision counted.
        peak_rss_bytes: VmHWM of a fresh process that loads the variant and runs a prefill and a few decode steps (device: peak allocated).
        baseline_rss_bytes: of that process before the model is loaded.
        kv_bytes_per_token: marginal bytes per cached token and sequence, measured on the cache, scales and zero points included.
        kv_constant_bytes: bytes per sequence that do not grow (the residual window in high precision).
        kv_sequences_that_fit: sequences of `kv_context_tokens` in `memory_budget_bytes` beside the weights.
    """

    resident_weight_bytes: int
    quantized_linear_bytes: int
    quantized_linear_bf16_bytes: int
    effective_bits_per_weight: float | None
    effective_bits_per_parameter: float
    kv_bytes_per_token: float
    kv_constant_bytes: int
    kv_sequences_that_fit: int
    kv_context_tokens: int
    memory_budget_bytes: int
    disk_bytes: int | None = None
    disk_note: str = ""
    peak_rss_bytes: int | None = None
    baseline_rss_bytes: int | None = None
    peak_note: str = ""
