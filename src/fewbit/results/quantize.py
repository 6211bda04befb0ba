"""What `fewbit quantize` did to each layer, how it checked itself, and what it wrote."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN, Interval
from fewbit.results.verify import VerifyResult

__all__ = ["BlockReport", "CalibrationInfo", "ExpertsReport", "GateResult", "LayerReport", "QuantizeEstimate", "QuantizeResult"]


@dataclass(frozen=True, config=FROZEN)
class CalibrationInfo:
    """Which tokens a calibrated method saw.

    Attributes:
        source: `stdlib`, the file's name, or the data set's id.
        text_sha256: over the documents that were drawn from.
        ids_sha256: over the token ids, those held back included.
        samples, sequence_length: windows that methods are fitted to, and tokens of each.
        held_back: windows beside them, for the checks.
        chat_template_sha256: of the chat template the text was wrapped in; None for plain text.
        python: the interpreter's version, whose library the text may be.
    """

    source: str
    text_sha256: str
    ids_sha256: str
    samples: int
    held_back: int
    sequence_length: int
    seed: int
    chat_template_sha256: str | None
    python: str
    note: str = ""


@dataclass(frozen=True, config=FROZEN)
class LayerReport:
    """What became of one linear.

    Attributes:
        name: as the checkpoint calls it. rows, columns: its weight's shape.
        bits: effective bits per weight, scales and zero points counted; 16 or 32 when it stayed in high precision.
        method: what finally chose its numbers; `high precision` when nothing that was tried passed the checks.
        rtn_error, error: relative error of its outputs on held-back calibration tokens (norm of the difference over norm of the output),
            for rounding to nearest with min-max scales and for what was written; None without calibration data.
        dampening: share of the mean diagonal that was added to the Hessian; None for methods without one.
        saturated_share: codes at either end of the grid.
        tokens: calibration tokens that reached it.
        kernel: what fewbit runs it with on this machine's CPU.
        notes: retries and fallbacks with their reasons, and what else is out of the ordinary.
    """

    name: str
    rows: int
    columns: int
    bits: float
    method: str
    rtn_error: float | None
    error: float | None
    dampening: float | None
    saturated_share: float
    tokens: int
    kernel: str
    notes: list[str]


@dataclass(frozen=True, config=FROZEN)
class ExpertsReport:
    """How the calibration text covered the experts of one mixture (`models.experts`).

    Attributes:
        name: of the module in its block.
        tokens: calibration tokens that the router sent to each expert.
        starved: experts with fewer than `required_tokens`. lent_tokens: other tokens that each of them was calibrated on besides its own.
    """

    name: str
    tokens: list[int]
    starved: list[int]
    required_tokens: int
    lent_tokens: int


@dataclass(frozen=True, config=FROZEN)
class BlockReport:
    """One block of the walk; `resumed` when its result was found on disk, finished by an earlier run."""

    name: str
    linears: int
    duration_s: float
    resumed: bool
    notes: list[str]
    experts: list[ExpertsReport] = Field(default_factory=list)


@dataclass(frozen=True, config=FROZEN)
class GateResult:
    """Whether the quantized model still predicts what the model in high precision predicts, on held-out text.

    Attributes:
        outcome: `passed`, `forced` (failed, and written all the same because the user said so), `failed` or `skipped`.
        kl_nats: KL divergence to the model in high precision, mean per token; None when skipped.
        threshold_nats: what the mean may be at most.
        flip_share: tokens whose most likely next token is another one.
        perplexity, reference_perplexity: of the quantized model and of the one in high precision on the same windows.
        text: name of the text. text_sha256, ids_sha256: of the text and of the token ids.
    """

    outcome: Literal["passed", "forced", "failed", "skipped"]
    kl_nats: Interval | None = None
    threshold_nats: float | None = None
    flip_share: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    text: str = ""
    text_sha256: str = ""
    ids_sha256: str = ""
    windows: int = 0
    tokens: int = 0


@dataclass(frozen=True, config=FROZEN)
class QuantizeEstimate:
    """What a quantization will take, known before it begins; each with the range that runs have fallen into.

    Attributes:
        peak_memory_bytes: resident memory of the process. disk_bytes: on the output's disk, when most of it is taken.
        duration_s: None when the machine was not measured.
        memory_parts, disk_parts, duration_parts: what they are made of, in the same units.
    """

    peak_memory_bytes: Interval
    disk_bytes: Interval
    duration_s: Interval | None
    memory_parts: dict[str, float]
    disk_parts: dict[str, float]
    duration_parts: dict[str, float]


@dataclass(frozen=True, config=FROZEN)
class QuantizeResult:
    """What `fewbit quantize` wrote.

    Attributes:
        out: the checkpoint's directory.
        layout, layout_format: for example `compressed-tensors` and `pack-quantized`.
        ignored_linears: linears that stay in high precision.
        kept_tensors: source tensors that were copied as they are.
        source_bytes, checkpoint_bytes: bytes of all tensors before and after.
        effective_bits_per_weight: over the quantized linears, scales and zero points counted.
        effective_bits_per_parameter: over the whole model, what stays in high precision counted.
        settings: what the numbers depend on besides scheme and source: of the methods, versions, threads, processor.
        layers: one entry per linear, in the model's order; blocks: per block of the walk.
        calibration: None when no method needed any.
        gate: None for results older than the gate.
        estimate: what was said before the work; None for results older than it.
        peak_rss_bytes: largest resident memory of the process, mapped pages included; None where the system does not say.
        notes: what was not possible for this model.
        verify: what `--verify` found afterwards; None without it, and in the recipe on disk, which is written before.
    """

    model: str
    out: str
    scheme: str
    weights: str
    input_activations: str
    method: str
    observer: str
    layout: str
    layout_format: str
    quantized_linears: int
    ignored_linears: list[str]
    kept_tensors: int
    parameters: int
    quantized_parameters: int
    source_bytes: int
    checkpoint_bytes: int
    effective_bits_per_weight: float
    effective_bits_per_parameter: float
    duration_s: float
    source_sha256: str | None = None
    settings: dict[str, str] = Field(default_factory=dict)
    layers: list[LayerReport] = Field(default_factory=list)
    blocks: list[BlockReport] = Field(default_factory=list)
    calibration: CalibrationInfo | None = None
    gate: GateResult | None = None
    peak_rss_bytes: int | None = None
    notes: list[str] = Field(default_factory=list)
    estimate: QuantizeEstimate | None = None
    verify: VerifyResult | None = None
