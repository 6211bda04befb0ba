"""What is asked of a prediction and what it answers: frozen types that go to JSON.

A prediction never is a bare number. It is an estimate with its 90 % interval, the terms that it is the sum of, what bounds the step, and
notes on what it does not know. Times of two candidates share most of their error (the same memory, the same overhead), so two intervals
that overlap say little; `Comparison` is the ratio of two times with an interval of its own, in which the shared part cancels.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fewbit.results import SCHEMA_VERSION, Bound

__all__ = [
    "Comparison",
    "Estimate",
    "Estimator",
    "KernelPath",
    "MeasuredPoint",
    "MeasuredStep",
    "Phase",
    "PredictResults",
    "PredictedModel",
    "Prediction",
    "StepPoint",
    "Suggestion",
    "Term",
    "step_name",
]

Phase = Literal["prefill", "decode"]
Estimator = Literal["model", "bandwidth"]
KernelPath = Literal["dense", "fused", "unfused", "native"]
_FROZEN = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_FROZEN)
class Estimate:
    """A predicted figure with its 90 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, config=_FROZEN)
class StepPoint:
    """One step that can be measured or predicted.

    Attributes:
        phase: `decode`: one new token for each sequence; `prefill`: the prompts of all sequences at once.
        scheme: formats of weights and activations, a preset of `formats.spec.SCHEMES`.
        kv: format of the KV cache: `BF16`, or a preset that names one (`KV-INT8`, `KV-FP8`, `KV-INT4`).
        batch: sequences.
        context: decode: tokens cached per sequence; prefill: tokens of each prompt.
        path: how the products run: `dense` (16 bit), `fused` (dequantized inside the kernel, multiplied in 16 bit), `unfused` (dequantized
            into memory first), `native` (multiplied in the format itself). None: the best that the hardware has for the scheme.
    """

    phase: Phase = "decode"
    scheme: str = "BF16"
    kv: str = "BF16"
    batch: int = 1
    context: int = 0
    path: KernelPath | None = None


@dataclass(frozen=True, config=_FROZEN)
class MeasuredPoint:
    """A step that somebody measured.

    Attributes:
        milliseconds: of the whole step.
        weight_bytes: bytes of weights that it reads, when they are known better than from the scheme (a file's size).
        source: where the figure comes from; for messages.
    """

    point: StepPoint
    milliseconds: float
    weight_bytes: float | None = None
    source: str = ""


@dataclass(frozen=True, config=_FROZEN)
class Term:
    """One part of a step's time; the parts add up to it.

    Attributes:
        name: of the linears (`down_proj`), `lm_head`, `attention`, `overhead` for the launches that belong to none of them.
        milliseconds: what it adds to the step.
        bytes, operations: what it moves and computes.
        operators: launches that it counts.
        explanation: the equation with its numbers.
    """

    name: str
    milliseconds: float
    bytes: float
    operations: float
    operators: int
    explanation: str


@dataclass(frozen=True, config=_FROZEN)
class Prediction:
    """The time of one step.

    Attributes:
        format: of the stored weights, `INT4` for the scheme W4A16.
        path: the one that was assumed.
        milliseconds: of the whole step. speedup_over_bf16: time of the same step in BF16 with a BF16 cache over this one.
        tokens_per_s: decode: new tokens of all sequences per second; prefill: prompt tokens per second.
        bound: what the largest share of the time is. floor_milliseconds: bytes over the data sheet's bandwidth or operations over its peak.
        weight_bytes, kv_bytes: what the step reads.
        operations: multiplications and additions of the step, each counted as one.
        calibrated_from: number of measured points that the estimate rests on.
    """

    point: StepPoint
    format: str
    path: KernelPath
    milliseconds: Estimate
    speedup_over_bf16: Estimate
    tokens_per_s: Estimate
    bound: Bound
    floor_milliseconds: float
    weight_bytes: float
    kv_bytes: float
    operations: float
    calibrated_from: int
    terms: list[Term] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


@dataclass(frozen=True, config=_FROZEN)
class Comparison:
    """Time of step `first` over time of step `second`, what both have in common cancelled.

    Attributes:
        distinguishable: the interval lies on one side of 1.
    """

    first: StepPoint
    second: StepPoint
    ratio: Estimate
    distinguishable: bool


@dataclass(frozen=True, config=_FROZEN)
class Suggestion:
    """The measurement that narrows most.

    Attributes:
        point: measure this. reason: why, in one sentence. command: what measures it with fewbit on the machine in question.
        width_before, width_after: high over low of the 90 % interval that the decision hangs on, now and expected afterwards.
    """

    point: StepPoint
    reason: str
    width_before: float
    width_after: float
    command: str = ""


@dataclass(frozen=True, config=_FROZEN)
class PredictedModel:
    """The model that was predicted.

    Attributes:
        assumed: what a bare parameter count does not say and was assumed or left out.
    """

    name: str
    parameters: float
    active_parameters: float
    kv_bytes_per_token: float
    operators_per_step: int
    assumed: list[str] = Field(default_factory=list)


@dataclass(frozen=True, config=_FROZEN)
class MeasuredStep:
    """A measured point and what it says of the device.

    Attributes:
        operations, bytes: of the step: multiplications and additions; weights and cache that it reads.
        tflop_s, gb_s: the rates that follow, 1e12 operations and 1e9 bytes per second.
        compute_share, bandwidth_share: of the data sheet's peak and bandwidth.
        bound: what the largest share of the time is.
        used: whether it calibrates. problem: why not, or what is odd; empty when nothing is.
    """

    measured: MeasuredPoint
    operations: float
    bytes: float
    tflop_s: float
    gb_s: float
    compute_share: float
    bandwidth_share: float
    bound: Bound
    used: bool = True
    problem: str = ""


@dataclass(frozen=True, config=_FROZEN)
class PredictResults:
    """What `fewbit predict` answers.

    Attributes:
        hardware: name of the device; bandwidth_gb_s: the one that was used.
        calibration_scale: measured over predicted time before calibration, geometric mean over the measured points; None without any.
        dense_tflop_s: peaks of the device by number format; empty for the bandwidth estimator, which does not use them.
        factors: what calibration made of the efficiencies, with 90 % intervals (`efficiency.Factors` says what each is).
        bounds: where decode turns from one bound to another along the batch axis, in words.
        conclusions: what follows, in words.
        warnings: what makes the figures less trustworthy, impossible measurements above all.
    """

    model: PredictedModel
    hardware: str
    bandwidth_gb_s: float
    estimator: Estimator
    predictions: list[Prediction]
    measured: list[MeasuredStep]
    calibration_scale: float | None = None
    dense_tflop_s: dict[str, float] = Field(default_factory=dict)
    factors: dict[str, Estimate] = Field(default_factory=dict)
    bounds: list[str] = Field(default_factory=list)
    conclusions: list[str] = Field(default_factory=list)
    suggestion: Suggestion | None = None
    warnings: list[str] = Field(default_factory=list)
    schema_version: int = SCHEMA_VERSION


def step_name(point: StepPoint) -> str:
    """The step in the words that `predict.measured` reads."""
    cache = "" if point.kv.upper() == "BF16" else f" kv {point.kv}"
    size = f" {point.batch} x {point.context}" if point.context else (f" batch {point.batch}" if point.batch > 1 else "")
    return f"{point.scheme} {point.phase}{size}{cache}"
