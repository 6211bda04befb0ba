"""INT8 weights per channel, BF16 activations, fused: torch's `_weight_int8pack_mm`.

    y[m, n] = scale[n] * sum_k x[m, k] * q[n, k]

The scale of a channel leaves the sum, so the inner loop only converts int8 to float32 in registers and accumulates there; the result is
rounded once. Resident: q int8 [out, in] as it is, scale [out]: 8 + 16 / in bits a weight, half of BF16.

That loop works in float32 and loses to a BF16 matrix product once M is above 16. There the weight is converted in tiles of 1,024 rows that
stay in the cache, each multiplied at once: never the whole matrix exists in BF16.

The operator's loops load 16 values at a time, aligned, and check nothing. Seen with torch 2.13 in BF16: in_features that 16 does not
divide give garbage or a crash, and so do inputs that do not begin on 32 bytes or weights that do not begin on 16 (views, mapped files).
Such shapes are refused here, such tensors copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewbit.errors import FormatError
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.high_precision import linear
from fewbit.kernels.torch_ops import aligned, missing_ops

__all__ = ["TorchInt8Pack"]

_IN_MULTIPLE = 16
_GEMV_ROWS = 16  # up to here the operator is the faster way
_TILE = 1024  # rows of the weight; 3 MB in BF16 at in_features 1536, so that a tile stays in the cache


class TorchInt8Pack(Kernel):
    """INT8 weights, symmetric, per channel; CPU."""

    name = "torch-int8pack"
    description = "INT8 weights converted in registers, torch _weight_int8pack_mm; in cached tiles from 17 tokens on"
    fused = True
    priority = 50

    def refuse_format(self, request: KernelRequest) -> str | None:
        spec = request.weights
        if spec is None or spec.type != "int" or spec.num_bits != 8:
            return f"runs INT8 weights; this one is {spec or 'in high precision'}"
        if request.input_activations is not None:
            return f"takes inputs in high precision; these are {request.input_activations}"
        if spec.strategy != "channel" or spec.group_size is not None or not spec.symmetric:
            return f"runs one scale per channel and no zero point, not {spec}"
        if spec.scale_dtype != "bfloat16":
            return f"keeps scales in bfloat16; these are {spec.scale_dtype} and would be rounded"
        return None

    def refuse_here(self, request: KernelRequest) -> str | None:
        if request.device != "cpu":
            return f"runs on the CPU, not on {request.device}"
        if request.dtype not in (torch.bfloat16, torch.float32):
            return f"computes in bfloat16 or float32, not {request.dtype}"
        if request.in_features % _IN_MULTIPLE:
            return f"needs in_features divisible by {_IN_MULTIPLE}, not {request.in_features}"
        return missing_ops(("_weight_int8pack_mm",))

    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """`values` int8 [out, in]; `scale` [out], request.dtype (the op wants it in the inputs' dtype)."""
        if not isinstance(weight, QuantizedTensor):
            raise FormatError(f"{self.name} packs quantized weights", "quantize the tensor first (methods.rtn)")
        return {"values": aligned(weight.values), "scale": weight.scale.view(-1).to(request.dtype)}

    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        rows = aligned(x.reshape(-1, request.in_features))  # [M, in]
        multiply = _multiply if rows.shape[0] <= _GEMV_ROWS else _multiply_tiles
        y = multiply(rows, packed["values"], packed["scale"])
        return (y if bias is None else y + bias).view(*x.shape[:-1], request.out_features)


def _multiply(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [M, in], values [out, in], scale [out] -> [M, out]."""
    y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x, values, scale)
    return y


def _multiply_tiles(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same by matrix products over tiles of the weight."""
    y = x.new_empty(x.shape[0], values.shape[0])
    for start in range(0, values.shape[0], _TILE):
        tile = slice(start, start + _TILE)
        y[:, tile] = linear(x, values[tile].to(x.dtype).mul_(scale[tile, None]))
    return y
