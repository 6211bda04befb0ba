"""Which kernel ran and which did not: rows of the comparison, and what `fewbit kernels` shows."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN

__all__ = ["KernelInfo", "KernelUse", "KernelsReport", "PassedOverKernel", "SchemeKernel"]


@dataclass(frozen=True, config=FROZEN)
class PassedOverKernel:
    """A faster kernel that did not run, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True, config=FROZEN)
class KernelUse:
    """The kernel that ran, on how many linears, and why no faster one did."""

    kernel: str
    description: str
    fused: bool
    linears: int
    passed_over: list[PassedOverKernel]


@dataclass(frozen=True, config=FROZEN)
class KernelInfo:
    """One kernel as it describes itself."""

    name: str
    description: str
    fused: bool


@dataclass(frozen=True, config=FROZEN)
class SchemeKernel:
    """The kernel that runs a scheme here.

    Attributes:
        fused_candidates: the fused kernels that are made for the format, whether or not they run here.
        refused: every other kernel with its reason; those made for the format first.
    """

    scheme: str
    weights: str
    input_activations: str
    kernel: str
    fused: bool
    fused_candidates: list[str]
    refused: list[PassedOverKernel]


@dataclass(frozen=True, config=FROZEN)
class KernelsReport:
    """What this machine runs, for weights of one shape."""

    cpu: str
    cpu_flags: list[str]
    torch: str
    device: str
    dtype: str
    out_features: int
    in_features: int
    kernels: list[KernelInfo]
    schemes: list[SchemeKernel]
