"""What `fewbit inspect` reads off a checkpoint by any tool."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN
from fewbit.results.formats import HardwareSupport
from fewbit.results.kernels import PassedOverKernel

__all__ = ["InspectResult", "RuntimeCell", "StoredFormat"]


@dataclass(frozen=True, config=FROZEN)
class StoredFormat:
    """One format that tensors of a checkpoint are stored in (`fewbit inspect`).

    Attributes:
        format: for a person: `INT4 group 128, symmetric`, `BF16`, GGUF's `Q6_K`.
        linears, others: linear layers and other tensors in it.
        parameters: their elements. stored_bytes: on disk, scales and zero points included.
        example: the first one's name.
        kernel: which of fewbit's kernels runs its largest linear on this machine; None when none of them is a linear.
        passed_over: faster kernels, and why they do not.
    """

    format: str
    linears: int
    others: int
    parameters: int
    stored_bytes: int
    example: str
    kernel: str | None = None
    passed_over: list[PassedOverKernel] = Field(default_factory=list)


@dataclass(frozen=True, config=FROZEN)
class RuntimeCell:
    """Whether another program loads the kind of a checkpoint on a machine without a GPU.

    Attributes:
        runtime: as people write it. loads: whether it does. reason: why not.
        proven_with: the versions with which that was tried.
    """

    runtime: str
    loads: bool
    reason: str | None
    proven_with: str


@dataclass(frozen=True, config=FROZEN)
class InspectResult:
    """What `fewbit inspect` found in a checkpoint, from headers, the configuration and one linear of each kind.

    Attributes:
        checkpoint: as it was named.
        architecture: the model's type.
        layout: `gptq`, `gguf`, ...; `none` in high precision. kind: its row in the matrix of runtimes; None when it has none.
        scheme: the number formats by name; empty when nothing is quantized. weights, input_activations, kv_cache: in words.
        parameters: all elements. quantized_parameters: those of quantized tensors.
        stored_bytes: of all tensors.
        effective_bits_per_weight: of quantized weights, scales counted; None when there are none.
        effective_bits_per_parameter: over the whole model.
        formats: most parameters first.
        runtimes: other programs. hardware: who multiplies the formats without widening them first; empty: nobody, it is a storage format.
        problems: what contradicts itself, one sentence each. notes: what else there is to know.
    """

    schema_version: int
    checkpoint: str
    architecture: str
    layout: str
    kind: str | None
    scheme: str
    weights: str
    input_activations: str
    kv_cache: str
    parameters: int
    quantized_parameters: int
    stored_bytes: int
    effective_bits_per_weight: float | None
    effective_bits_per_parameter: float
    formats: list[StoredFormat]
    runtimes: list[RuntimeCell]
    hardware: list[HardwareSupport]
    problems: list[str]
    notes: list[str]
