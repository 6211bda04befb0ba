"""INT4 weights, BF16 activations, fused: torch's `_weight_int4pack_mm_for_cpu`.

    y[m, n] = sum_k x[m, k] * ((code[n, k] - 8) * scale[k / g, n] + offset[k / g, n])

Codes are offset binary, 0..15. fewbit's integers are signed, code = q + 8, so that (q - zero_point) * scale becomes

    offset = 0                       symmetric
    offset = -zero_point * scale     affine, rounded to BF16 like the scale

The rounding of the offset is the one place where this kernel leaves the definition: |zero_point| <= 8 and half a BF16 unit is 2**-9 of the
value, so a weight is off by at most scale / 64, a thirtieth of the rounding error that INT4 makes anyway. Symmetric weights are exact.

Resident: codes uint8 [out, in / 2] in the order that the instruction set's inner loop wants, scales and offsets bfloat16 [in / g, out, 2]:
4 + 32 / g bits a weight, 4.25 at g = 128. The dequantized tile lives in registers or in L1 (large M), never in memory.

A row that shares one scale (strategy `channel`) runs as groups of the largest size that divides, with the scale repeated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewbit.errors import FormatError
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.torch_ops import missing_ops

__all__ = ["TorchInt4Pack"]

_GROUP_SIZES = (256, 128, 64, 32)
_OUT_MULTIPLE = 16
_OPS = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")


class TorchInt4Pack(Kernel):
    """INT4 in groups of 32, 64, 128 or 256, or per channel; symmetric and affine; CPU."""

    name = "torch-int4pack"
    description = "INT4 weights dequantized in registers, torch _weight_int4pack_mm_for_cpu"
    fused = True
    priority = 50

    def refuse_format(self, request: KernelRequest) -> str | None:
        spec = request.weights
        if spec is None or spec.type != "int" or spec.num_bits != 4:
            return f"runs INT4 weights; this one is {spec or 'in high precision'}"
        if request.input_activations is not None:
            return f"takes inputs in high precision; these are {request.input_activations}"
        if spec.strategy not in ("group", "channel"):
            return f"runs groups or channels that share a scale, not strategy '{spec.strategy}'"
        if spec.group_size is not None and spec.group_size not in _GROUP_SIZES:
            return f"runs group sizes 32, 64, 128 and 256, not {spec.group_size}"
        if spec.scale_dtype != "bfloat16":
            return f"keeps scales in bfloat16; these are {spec.scale_dtype} and would be rounded"
        return "has no group index (activation order)" if request.has_g_idx else None

    def refuse_here(self, request: KernelRequest) -> str | None:
        if request.device != "cpu":
            return f"runs on the CPU, not on {request.device}"
        if request.dtype not in (torch.bfloat16, torch.float32):
            return f"computes in bfloat16 or float32, not {request.dtype}"
        if request.out_features % _OUT_MULTIPLE:
            return f"needs out_features divisible by {_OUT_MULTIPLE}, not {request.out_features}"
        if _group_size(request) is None:
            size = request.weights.group_size if request.weights is not None else None
            return f"needs in_features divisible by the group size, {size or min(_GROUP_SIZES)}, not {request.in_features}"
        return missing_ops(_OPS)

    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """`codes` uint8 [out, in / 2], opaque order; `scale_and_offset` [in / g, out, 2] in request.dtype, as the op wants it."""
        if not isinstance(weight, QuantizedTensor):
            raise FormatError(f"{self.name} packs quantized weights", "quantize the tensor first (methods.rtn)")
        group_size = _group_size(request)
        assert group_size is not None
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.values.to(torch.int32) + 8, 1)
        offset = torch.zeros_like(weight.scale) if weight.zero_point is None else -weight.zero_point.float() * weight.scale.float()
        both = torch.stack([weight.scale.to(request.dtype), offset.to(request.dtype)], dim=-1)  # [out, groups, 2]
        repeats = request.in_features // group_size // both.shape[1]  # above 1 only per channel
        return {"codes": codes, "scale_and_offset": both.repeat_interleave(repeats, dim=1).transpose(0, 1).contiguous()}

    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        codes, scales = packed["codes"], packed["scale_and_offset"]
        rows = x.reshape(-1, request.in_features).contiguous()  # [M, in]
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, request.in_features // scales.shape[0], scales)
        return (y if bias is None else y + bias).view(*x.shape[:-1], request.out_features)


def _group_size(request: KernelRequest) -> int | None:
    """Neighbours in a row that share a scale in the packed form; None when no size that the op knows divides the row."""
    spec = request.weights
    sizes = (spec.group_size,) if spec is not None and spec.group_size is not None else _GROUP_SIZES
    return next((size for size in sizes if request.in_features % size == 0), None)
