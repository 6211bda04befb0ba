"""What `fewbit decide` answers: frozen types that go to JSON. A cell is one model on one device, with every candidate and its reason."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fewbit.decide.quality import Quality
from fewbit.decide.workload import Workload
from fewbit.predict.prediction import Estimate, KernelPath
from fewbit.results import SCHEMA_VERSION, Bound

__all__ = ["Candidate", "CandidateMemory", "CandidateTime", "Cell", "DecideResults", "NextMeasurement", "Status", "Verdict"]

_FROZEN = ConfigDict(extra="forbid")
Verdict = Literal["quantize", "do not quantize", "abstain", "not feasible"]
Status = Literal["chosen", "undecided", "rejected"]


@dataclass(frozen=True, config=_FROZEN)
class CandidateMemory:
    """Bytes on the device at the workload's concurrency; workspace and reserved are rules of thumb.

    Attributes:
        largest_batch: sequences of the workload's length that would fit; None where the cache is unknown.
    """

    weights_bytes: float
    cache_bytes: float
    workspace_bytes: float
    reserved_bytes: float
    total_bytes: float
    capacity_bytes: float
    fits: bool
    largest_batch: int | None


@dataclass(frozen=True, config=_FROZEN)
class CandidateTime:
    """Predicted times, each with its 90 % interval.

    Attributes:
        ttft_ms: prefill of one prompt on an idle device. ms_per_token: decode step at the workload's batch.
        request_ms: of one request. tokens_per_s: output tokens of the whole batch per second, prefill counted.
        objective_ms: what the workload's goal makes small: of one request, or of the whole batch.
        speedup_over_bf16: BF16's objective over this one's.
        bound: of the largest share of the objective.
        device_s_per_million_tokens: of output. cost_per_million_tokens: that times the device's price; None without a price.
    """

    ttft_ms: Estimate
    ms_per_token: Estimate
    request_ms: Estimate
    tokens_per_s: Estimate
    objective_ms: Estimate
    speedup_over_bf16: Estimate
    bound: Bound
    device_s_per_million_tokens: float
    cost_per_million_tokens: float | None = None


@dataclass(frozen=True, config=_FROZEN)
class Candidate:
    """Weights in one scheme with a cache in another.

    Attributes:
        name: for people. runtime, kernel, path: what runs it; empty where nothing is known to. fallback: what runs where that cannot.
        cache_option: switches the cache format on. command: produces the checkpoint.
        acceptable: it fits, runs, keeps the limits and passes in quality.
        pareto: no other one that fits and runs is at least as good in time, memory and expected quality and better in one.
        reason: why it was chosen, or what was in its way.
    """

    name: str
    weights: str
    kv_cache: str
    runtime: str
    kernel: str
    path: KernelPath
    cache_option: str
    command: str
    memory: CandidateMemory
    quality: Quality
    time: CandidateTime | None
    status: Status
    acceptable: bool
    pareto: bool
    reason: str
    fallback: str = ""


@dataclass(frozen=True, config=_FROZEN)
class NextMeasurement:
    """What to measure next, why, and with which command."""

    kind: Literal["quality", "time"]
    what: str
    reason: str
    command: str


@dataclass(frozen=True, config=_FROZEN)
class Cell:
    """One model on one device.

    Attributes:
        verdict: what to do. choice: name of the candidate, when abstaining of the best guess; None when nothing is feasible.
        between: names that cannot be told apart yet.
        binding: the constraint that decided: memory, quality, latency, or what bounds the workload on this device.
        reason: in one sentence.
        pareto: names of the candidates on the front.
        calibrated_from: measured points.
        price_per_hour: of the device.
        notes: what was assumed.
    """

    model: str
    parameters: int
    hardware: str
    label: str
    verdict: Verdict
    choice: str | None
    between: list[str]
    binding: str
    reason: str
    pareto: list[str]
    candidates: list[Candidate]
    next_measurement: NextMeasurement | None
    calibrated_from: int
    price_per_hour: float | None = None
    notes: list[str] = Field(default_factory=list)

    @property
    def chosen(self) -> Candidate | None:
        """The candidate of `choice`."""
        return next((one for one in self.candidates if one.name == self.choice), None)


@dataclass(frozen=True, config=_FROZEN)
class DecideResults:
    """What `fewbit decide` answers.

    Attributes:
        workload: what has to be served, within which limits. cells: models x devices.
        warnings: what makes the answer less trustworthy.
    """

    workload: Workload
    cells: list[Cell]
    warnings: list[str] = Field(default_factory=list)
    command: str = ""
    schema_version: int = SCHEMA_VERSION
