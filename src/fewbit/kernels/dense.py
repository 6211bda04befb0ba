"""The matmul of an unquantized weight: torch's own.

It is the baseline that every quantized kernel is compared with, so it has to be a good one and takes the fastest of torch's paths
(`kernels.high_precision`). Resident: the weight itself, [out, in], 2 bytes each in BF16. At M = 1 it reads all of them once and does two
operations per weight: bandwidth-bound.

The decode engine cannot call torch from its threads; it gets fewbit's own product over the same memory (src/native/cpu/dense.hpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fewbit.errors import FormatError
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.cpu.extension import native
from fewbit.kernels.high_precision import linear

if TYPE_CHECKING:
    from fewbit._native import Linear

__all__ = ["DenseKernel"]


class DenseKernel(Kernel):
    """torch's product with the weight in high precision."""

    name = "dense"
    description = (
        "high-precision weight, torch F.linear; on CPUs one token by its GEMV (AVX-512), 32 and more in FP32 where BF16 is emulated"
    )
    fused = True
    priority = 0  # what an unquantized weight gets when nothing better is there

    def refuse_format(self, request: KernelRequest) -> str | None:
        if request.weights is not None:
            return f"holds unquantized weights; this one is {request.weights}"
        if request.input_activations is not None:
            return f"takes inputs in high precision; these are {request.input_activations}"
        return None

    def refuse_here(self, request: KernelRequest) -> str | None:
        return None if request.dtype.is_floating_point else f"needs a floating-point dtype, not {request.dtype}"

    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """{"weight": [out, in], request.dtype}: the tensor that came in when it has that dtype already, so that tied weights stay tied."""
        if isinstance(weight, QuantizedTensor):
            raise FormatError(f"the dense kernel was given a weight in {weight.spec}", "dequantize it first")
        return {"weight": weight.detach().to(device=request.device, dtype=request.dtype)}

    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        return linear(x, packed["weight"], bias)

    def native(self, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> Linear | None:
        weight = packed["weight"]
        if native is None or weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float32) or not weight.numel():
            return None
        return native.dense_linear(weight if weight.stride(1) == 1 else weight.contiguous())
