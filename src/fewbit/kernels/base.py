"""What a kernel declares, what it is asked for, and what the dispatcher answers.

A kernel is a way to compute y = x @ W.T for one number format: how it stores the weight (`pack`) and how it multiplies (`apply`). It says
itself what it can do; one function (`dispatch.select`) chooses, and answers with the reason for each kernel it passed over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from fewbit.errors import FormatError
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor

if TYPE_CHECKING:
    from fewbit._native import Linear

__all__ = ["Compute", "Kernel", "KernelRequest", "PassedOver", "Selection"]

Compute = Literal["exact", "int8-activations"]


@dataclass(frozen=True)
class KernelRequest:
    """What a linear needs.

    Attributes:
        weights: format of the weight; None for a weight in high precision.
        input_activations: format its inputs are quantized to at run time; None for high precision.
        out_features, in_features: the weight's shape is [out_features, in_features].
        device: `cpu`, `cuda`, `mps`.
        dtype: dtype of the inputs and outputs, for example torch.bfloat16.
        has_g_idx: the columns are in a permuted group order.
        compute: what a kernel may do with inputs in high precision. `exact`: multiply them as they are. `int8-activations`: quantize them
            on the fly per token in groups of 32 to 128, where a kernel exists that does; never chosen unless asked for.
    """

    weights: QuantSpec | None
    input_activations: QuantSpec | None
    out_features: int
    in_features: int
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    has_g_idx: bool = False
    compute: Compute = "exact"


@dataclass(frozen=True)
class PassedOver:
    """A faster kernel that was not taken, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """The dispatcher's answer: the kernel that will run, and each faster one with the reason why it will not."""

    kernel: Kernel
    passed_over: tuple[PassedOver, ...] = field(default=())


class Kernel(ABC):
    """One way to run a linear layer.

    Class attributes:
        name: unique, shown in every report, for example `torch-int4pack`.
        description: one line for a person.
        fused: True when no dequantized copy of the weight is materialized.
        priority: higher is preferred; the reference kernel has 0.
        devices: kinds of device that it is made for. On any other it is no alternative, and reports do not list it as passed over.
        needs_native: True when it is part of fewbit's native extension, which an installation without a compiler lacks.
    """

    name: str
    description: str
    fused: bool
    priority: int
    devices: tuple[str, ...] = ("cpu", "cuda", "mps")
    needs_native: bool = False

    @abstractmethod
    def refuse_format(self, request: KernelRequest) -> str | None:
        """None when the kernel is made for the request's number formats, wherever it runs; else the reason. Reads only `request.weights`,
        `request.input_activations`, `request.has_g_idx` and `request.compute`: `select(strict=True)` asks it whether a fused kernel exists
        for a format."""

    @abstractmethod
    def refuse_here(self, request: KernelRequest) -> str | None:
        """None when this machine, this torch and the request's shape, device and dtype suit the kernel; else the reason, with the numbers.
        Asked only when `refuse_format` has no objection."""

    def refuse(self, request: KernelRequest) -> str | None:
        """None when the kernel can run the request here and now, else the reason in words a user understands."""
        return self.refuse_format(request) or self.refuse_here(request)

    @abstractmethod
    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """The tensors that stay resident, by name; called once at load. Must not keep `weight` alive.

        Args:
            weight: [out, in]; a plain tensor when `request.weights` is None.
        """

    @abstractmethod
    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        """x @ W.T + bias.

        Args:
            x: [..., in], `request.dtype`; any strides.
            packed: what `pack` returned.
            bias: [out] or None.

        Returns:
            [..., out], `request.dtype`.
        """

    def native(self, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> Linear | None:
        """The packed weight as the decode engine takes it, sharing `packed`'s memory; None when the kernel is not one of fewbit's own."""
        return None

    @staticmethod
    def static_input_scale(weight: QuantizedTensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """`input_scale` float32 [1] where the request's inputs are static, for `pack`; nothing where they are dynamic.

        Raises:
            FormatError: the inputs are static, and the weight has no scale for them.
        """
        inputs = request.input_activations
        if inputs is None or inputs.dynamic:
            return {}
        if weight.input_scale is None:
            raise FormatError(f"inputs in {inputs} are static, and the weight has no scale for them", "calibrate it: smoothquant or gptq")
        return {"input_scale": weight.input_scale.to(request.device, torch.float32, copy=True)}

    def weight_traffic_bytes(self, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> int:
        """Bytes of memory traffic that the weight causes in one `apply` at M = 1: the packed bytes when fused, plus what is written and
        read again when the kernel materializes a dequantized copy."""
        resident = sum(t.numel() * t.element_size() for t in packed.values())
        if self.fused:
            return resident
        return resident + 2 * request.out_features * request.in_features * torch.empty(0, dtype=request.dtype).element_size()
