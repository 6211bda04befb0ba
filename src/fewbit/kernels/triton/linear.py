"""Weight-only quantized linears on NVIDIA GPUs: codes are read packed and unpacked in registers; and the unfused path beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewbit.errors import FormatError
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.triton.environment import preference, refuse_device
from fewbit.kernels.triton.gpu_kernel import GpuKernel, Rows
from fewbit.kernels.triton.layout import ROWS, layout_of, pack
from fewbit.kernels.triton.tuning import search

__all__ = ["TritonUnfused", "TritonWeightOnly"]

_INT_BITS = (2, 3, 4, 8)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonWeightOnly(GpuKernel):
    """INT8, INT4, INT3, INT2, NF4, MXFP4, NVFP4, FP8 E4M3 and 4-bit codebooks; groups and channels; symmetric and affine."""

    name = "triton-weight-only"
    description = "packed weights unpacked in registers and multiplied on tensor cores, K cut into parts for few tokens (Triton)"
    fused = True
    priority = 60 + preference()
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

    def sums(self, x: Rows, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> torch.Tensor:
        from fewbit.kernels.triton.weight_only import multiply  # imports Triton

        assert request.weights is not None
        layout, tensors, tokens = layout_of(request.weights, request.in_features), dict(packed), x.values.shape[0]
        outputs = packed["scale"].shape[0]
        tiles = search(
            (layout, x.values.dtype),
            tokens,
            (outputs, layout.chunks),
            str(x.values.device),
            lambda t: multiply(x.values, tensors, layout, t),
        )
        return multiply(x.values, tensors, layout, tiles)

    def join(self, packed: list[Mapping[str, torch.Tensor]], request: KernelRequest) -> dict[str, torch.Tensor] | None:
        if any(one["scale"].shape[0] % ROWS for one in packed[:-1]):
            return None  # a block of rows would span two linears
        tables = [one["table"] for one in packed if "table" in one]
        if any(not torch.equal(table, tables[0]) for table in tables):
            return None
        joined = {name: torch.cat([one[name] for one in packed]) for name in packed[0] if name != "table"}
        return joined | ({"table": tables[0]} if tables else {})


class TritonUnfused(TritonWeightOnly):
    """The same formats, dequantized to memory before every product: what bitsandbytes does for NF4. Slow, and shown because it is."""

    name = "triton-unfused"
    description = "dequantizes the whole weight to memory in one kernel, then torch F.linear (Triton)"
    fused = False
    priority = 1 + preference()

    def sums(self, x: Rows, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> torch.Tensor:
        from fewbit.kernels.triton.weight_only import dequantize  # imports Triton

        assert request.weights is not None
        weight = dequantize(dict(packed), layout_of(request.weights, request.in_features), request.dtype)
        return torch.nn.functional.linear(x.values, weight)[None]
