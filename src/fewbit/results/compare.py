"""Memory, latency and quality of the same weights in one row: `fewbit compare` and `fewbit bench`."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN, SCHEMA_VERSION
from fewbit.results.kernels import KernelUse
from fewbit.results.latency import LatencyResult
from fewbit.results.memory import MemoryResult
from fewbit.results.quality import NoiseFloor, ProtocolInfo, QualityResult
from fewbit.results.subject import Environment, MachineResult, ModelInfo, VariantInfo

__all__ = ["BenchResults", "CompareResults", "ShapesResult", "VariantResult"]


@dataclass(frozen=True, config=FROZEN)
class VariantResult:
    """One row: memory, latency and quality of the same weights in the same run. None: not measured in this run."""

    variant: VariantInfo
    kernels: list[KernelUse]
    memory: MemoryResult
    latency: LatencyResult | None = None
    quality: QualityResult | None = None


@dataclass(frozen=True, config=FROZEN)
class ShapesResult:
    """Latency and memory on a stack of layers with random weights in real shapes, scaled to the whole model."""

    model: ModelInfo
    variants: list[VariantResult]
    note: str = ""


@dataclass(frozen=True, config=FROZEN)
class CompareResults:
    """The results file of `fewbit compare`.

    Attributes:
        run_id: random; the same for everything measured in this process run.
        conclusions: what the measurements support, in words, most important first.
        warnings: what makes a figure less trustworthy (a busy machine, skipped rows).
    """

    command: str
    run_id: str
    started_at: str
    duration_s: float
    environment: Environment
    machine: MachineResult
    model: ModelInfo
    variants: list[VariantResult]
    protocol: ProtocolInfo | None = None
    noise_floor: NoiseFloor | None = None
    shapes: ShapesResult | None = None
    conclusions: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, config=FROZEN)
class BenchResults:
    """Latency and memory of one scheme beside BF16, measured in turns.

    Attributes:
        rows: BF16 first, then the scheme; only BF16 when that was the scheme.
    """

    environment: Environment
    machine: MachineResult
    model: ModelInfo
    rows: list[VariantResult]
    note: str = ""
    schema_version: int = SCHEMA_VERSION
