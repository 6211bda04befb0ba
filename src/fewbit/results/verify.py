"""What `fewbit verify` found out about a checkpoint."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN

__all__ = ["RuntimeCheck", "VerifyResult"]


@dataclass(frozen=True, config=FROZEN)
class RuntimeCheck:
    """Whether another runtime computes the same from a checkpoint as ours does (`fewbit verify`).

    Attributes:
        runtime: transformers, vllm, llama.cpp or openvino.
        status: passed, failed, skipped where it was not asked, or refused where it was expected not to load and did not.
        reason: why it failed, was not asked or did not load; None when it passed.
        dtype: of its activations.
        versions: of the packages that took part.
        difference_rms_nats, difference_max_nats: of the tokens' log-probabilities from ours.
        floor_rms_nats: what its arithmetic alone makes of the same model without quantization.
        control_rms_nats: the difference of a damaged copy; None when it does not load at all.
        control_layers: linears of the damaged copy that computed something else.
        tokens: whose log-probabilities were compared.
        layers_compared: linears whose answers were compared. layers_differing: those that differ, the worst first.
        duration_s: loading and reading.
    """

    runtime: str
    status: str
    reason: str | None = None
    dtype: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    difference_rms_nats: float | None = None
    difference_max_nats: float | None = None
    floor_rms_nats: float | None = None
    control_rms_nats: float | None = None
    control_layers: int = 0
    tokens: int = 0
    layers_compared: int = 0
    layers_differing: list[str] = Field(default_factory=list)
    duration_s: float = 0.0


@dataclass(frozen=True, config=FROZEN)
class VerifyResult:
    """What `fewbit verify` found.

    Attributes:
        checkpoint: as it was named.
        kind: its row in the matrix of runtimes.
        scheme: the number formats, empty when nothing is quantized.
        linears: quantized linears that were read.
        tensors: all tensors.
        compared_with: what the values were compared with: the recipe, a source, both, or empty.
        problems: what is wrong with the files, one sentence each.
        runtimes: one entry for each runtime.
        passed: no problem, and no runtime failed.
    """

    schema_version: int
    checkpoint: str
    kind: str
    scheme: str
    linears: int
    tensors: int
    compared_with: list[str]
    problems: list[str]
    runtimes: list[RuntimeCheck]
    passed: bool
    duration_s: float
