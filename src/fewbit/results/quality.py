"""What a variant costs in quality, on which text, with error bars."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN, SCHEMA_VERSION, Interval
from fewbit.results.kernels import KernelUse

__all__ = ["EvaluateResults", "NoiseFloor", "ProtocolInfo", "QualityResult"]


@dataclass(frozen=True, config=FROZEN)
class ProtocolInfo:
    """How quality was measured; results with different hashes are never compared."""

    name: str
    corpus: str
    context_length: int
    stride: int
    windows: int
    scored_tokens: int
    text_sha256: str
    python: str
    seed: int
    note: str = ""


@dataclass(frozen=True, config=FROZEN)
class NoiseFloor:
    """BF16 against itself, evaluated in another batch shape: what differs without any quantization."""

    perplexity_delta_percent: float
    kl_divergence_nats: float
    flip_share: float


@dataclass(frozen=True, config=FROZEN)
class QualityResult:
    """Quality of one variant against BF16 on the same tokens.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token; interval over windows.
        perplexity_delta_percent: against BF16, from paired per-token differences.
        kl_divergence_nats: mean KL(BF16 || variant) per token.
        flip_share: share of positions whose most likely token differs from BF16's.
        passed: perplexity_delta_percent.value within `threshold_percent`.
    """

    perplexity: Interval
    perplexity_delta_percent: Interval
    kl_divergence_nats: Interval
    flip_share: Interval
    threshold_percent: float
    passed: bool


@dataclass(frozen=True, config=FROZEN)
class EvaluateResults:
    """The quality of one model in one scheme.

    Attributes:
        model: the directory or the hub id.
        scheme, method: number formats and how the numbers were chosen.
        bits_per_byte: the loss per UTF-8 byte of the scored text; unlike perplexity comparable between tokenizers.
        quality: against BF16; None when the scheme is BF16 or no comparison was asked for.
        noise_floor: BF16 against itself, with `quality`.
    """

    model: str
    scheme: str
    method: str
    kernels: list[KernelUse]
    protocol: ProtocolInfo
    perplexity: Interval
    bits_per_byte: Interval
    weights_sha256: str | None = None
    quality: QualityResult | None = None
    noise_floor: NoiseFloor | None = None
    schema_version: int = SCHEMA_VERSION
