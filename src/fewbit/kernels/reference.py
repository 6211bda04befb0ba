"""The kernel that defines the others: dequantize the weight, then one GEMM. It runs every format, everywhere, and is slow.

    W' = dequantize(values, scale, zero_point, global_scale)     [out, in], float32
    y  = x @ W'.to(x.dtype).T + bias                             [M, out], x.dtype

With quantized input activations the inputs are quantized and dequantized first, y = Q(x) @ W'.T, in float32: an integer or FP8 kernel
multiplies the codes exactly, adds them in 32 bits and scales the sum, so rounding W' or Q(x) to BF16 in between would add an error that no
such kernel has.

In memory the weight is as dense as its format allows: values in `num_bits` bits (formats.packing), zero points too, scales in
`scale_dtype`. What makes the path slow is not the storage but the copy: for each call all out x in weights are unpacked to bytes, expanded
to float32 a few rows at a time, rounded to the inputs' dtype, written to memory and read back by the GEMM. At M = 1 that is several times
the traffic of BF16: fewer bits, less memory, *more* time. bitsandbytes' NF4 has the same structure at M > 1; the comparison shows the row
because of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewbit.errors import FormatError
from fewbit.formats.packing import pack_values, unpack_values
from fewbit.formats.quantize import dequantize, fake_quantize
from fewbit.formats.static import fake_quantize_static
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.high_precision import linear

__all__ = ["ReferenceKernel"]


class ReferenceKernel(Kernel):
    """Dequantize the whole weight, then F.linear."""

    name = "reference"
    description = "dequantizes the whole weight to memory, then torch F.linear; on a CPU the only one for FP8 inputs"
    fused = False
    priority = 0

    def refuse_format(self, request: KernelRequest) -> str | None:
        return "quantized weights only; this one is in high precision" if request.weights is None else None

    def refuse_here(self, request: KernelRequest) -> str | None:
        return None if request.dtype.is_floating_point else f"needs a floating-point dtype, not {request.dtype}"

    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """`values` uint8 [out, ceil(in * num_bits / 8)], `scale`, and where the format has them `zero_point` uint8 [rows,
        ceil(columns * num_bits / 8)], `g_idx`, `global_scale`, `codebook`, `input_scale`.

        Raises:
            FormatError: `weight` is a plain tensor.
        """
        if not isinstance(weight, QuantizedTensor):
            raise FormatError("the reference kernel packs quantized weights", "quantize the tensor first (methods.rtn)")
        packed = {"values": pack_values(weight.values, weight.spec), "scale": weight.scale.clone()}
        if weight.zero_point is not None:
            packed["zero_point"] = pack_values(weight.zero_point, weight.spec)
        for name in ("g_idx", "global_scale", "codebook"):
            tensor = getattr(weight, name)
            if tensor is not None:
                packed[name] = tensor.clone()
        return {name: tensor.to(request.device) for name, tensor in packed.items()} | self.static_input_scale(weight, request)

    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        weight = self.unpack(packed, request)
        if request.input_activations is None:
            return linear(x, dequantize(weight, x.dtype), bias)
        inputs, static = request.input_activations, packed.get("input_scale")
        rounded = fake_quantize(x.float(), inputs) if static is None else fake_quantize_static(x.float(), static, inputs)
        y = torch.nn.functional.linear(rounded, dequantize(weight))
        return (y if bias is None else y + bias).to(x.dtype)

    def unpack(self, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> QuantizedTensor:
        """The QuantizedTensor that was packed, bit for bit."""
        spec = request.weights
        assert spec is not None
        zero_point = packed.get("zero_point")
        if zero_point is not None:
            zero_point = unpack_values(zero_point, spec, packed["scale"].shape[1])
        return QuantizedTensor(
            values=unpack_values(packed["values"], spec, request.in_features),
            scale=packed["scale"],
            spec=spec,
            zero_point=zero_point,
            g_idx=packed.get("g_idx"),
            global_scale=packed.get("global_scale"),
            codebook=packed.get("codebook"),
            input_scale=packed.get("input_scale"),
        )

    def weight_traffic_bytes(self, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> int:
        """The packed bytes, and written and read once each: the unpacked values (a byte each) and the copy in the GEMM's dtype. The float32
        temporaries in between are a few rows at a time and stay in the cache."""
        resident = sum(t.numel() * t.element_size() for t in packed.values())
        gemm_dtype = torch.float32 if request.input_activations is not None else request.dtype
        return resident + 2 * request.out_features * request.in_features * (1 + gemm_dtype.itemsize)
