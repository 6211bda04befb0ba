"""Weight-only quantized linears on NVIDIA GPUs: codes are read packed and dequantized in registers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewbit.errors import FormatError
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.triton.environment import refuse_device
from fewbit.kernels.triton.layout import layout_of, pack
from fewbit.kernels.triton.tuning import tiles_for

__all__ = ["TritonWeightOnly"]

_INT_BITS = (2, 3, 4, 8)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonWeightOnly(Kernel):
    """INT8, INT4, INT3, INT2, NF4, MXFP4, NVFP4, FP8 E4M3 and 4-bit codebooks; groups and channels; symmetric and affine."""

    name = "triton-weight-only"
    description = "packed weights dequantized in registers: a split-K GEMV for few tokens, tensor cores for many (Triton)"
    fused = True
    priority = 60
    devices = ("cuda",)

    def refuse_format(self, request: KernelRequest) -> str | None:
        spec = request.weights
        if spec is None:
            return "runs quantized weights; this one is in high precision"
        if request.input_activations is not None:
            return f"takes inputs in high precision; these are {request.input_activations}"
        if spec.strategy not in ("group", "channel", "tensor"):
            return f"runs scales per tensor, channel or group, not strategy '{spec.strategy}'"
        if spec.type == "int" and spec.num_bits not in _INT_BITS:
            return f"runs integers of {', '.join(map(str, _INT_BITS))} bits, not {spec.num_bits}"
        if spec.type == "float" and (spec.num_bits, spec.exponent_bits) not in ((8, 4), (4, 2)):
            return f"runs FP8 E4M3 and FP4 E2M1, not {spec}"
        if spec.type == "codebook" and spec.num_bits not in (2, 4):
            return f"looks up codes of 2 or 4 bits, not {spec.num_bits}"
        try:
            layout_of(spec, spec.group_size or 128)
        except FormatError as error:
            return error.problem
        return "has no group index (activation order)" if request.has_g_idx else None

    def refuse_here(self, request: KernelRequest) -> str | None:
        if request.dtype not in _DTYPES:
            return f"computes in bfloat16, float16 or float32, not {request.dtype}"
        return refuse_device(request.device)

    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """See `layout.pack`."""
        if not isinstance(weight, QuantizedTensor):
            raise FormatError(f"{self.name} packs quantized weights", "quantize the tensor first (methods.rtn)")
        return {name: tensor.to(request.device) for name, tensor in pack(weight).items()}

    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        from fewbit.kernels.triton.weight_only import matmul  # imports Triton

        assert request.weights is not None
        rows = x.reshape(-1, request.in_features).contiguous()
        layout = layout_of(request.weights, request.in_features)
        y = matmul(rows, dict(packed), bias, layout, tiles_for(rows.shape[0], request.device))
        return y.view(*x.shape[:-1], request.out_features)
