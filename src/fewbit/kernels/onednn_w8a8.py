"""INT8 weights and INT8 activations per token, fused: oneDNN through torch's `onednn::qlinear_pointwise`.

    s_x[m] = max_k |x[m, k]| / 127.5         q_x = round(x / s_x)                       on the fly, one scale per token
    y[m, n] = s_x[m] * scale[n] * sum_k q_x[m, k] * q_w[n, k]                           integer products, 32-bit sums

AVX-512 VNNI multiplies unsigned by signed bytes. So the activations go in as u = q_x + 128 with zero point 128, which is the same numbers
and oneDNN's fast path; signed activations take its reference loop here (torch 2.13), slower by orders of magnitude. `_int_mm` gives the
same sums but repacks the weight at every call.

**Outlier columns** (LLM.int8(), arXiv 2208.07339: columns in which any |x| exceeds a threshold stay in 16 bit). The paper multiplies them
with their columns of the weight in FP16. oneDNN's blocked weight has no columns to take, and a second copy would cost the memory that
INT8 saves. So the outlier columns go through the same integer product as two more rows per token, each zero elsewhere:

    x_o ~ s_1 q_1 + s_2 q_2        q_1 rounds x_o, q_2 the rest of it: steps of 1 / 65,000 of the token's largest outlier, 16 bits

The weight is read once for all of them; a prompt with outliers takes three times the products of W8A8, a prompt without takes one.

Resident: the weight in oneDNN's blocked order (an opaque tensor, int8 [in, out]; torch's `numel` times one byte, without oneDNN's padding
and 4 bytes a channel of compensation sums), scale float32 [out] and the int32 zero points [out] that the operator asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fewbit.errors import FormatError
from fewbit.formats.quantize import dequantize_dynamic, outlier_columns, quantize_dynamic
from fewbit.formats.spec import QuantSpec
from fewbit.formats.static import quantize_static, spoiled
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.torch_ops import missing_ops

__all__ = ["OneDnnW8A8"]

_ZERO_POINT = 128
_SATURATED = torch.finfo(torch.float32).max  # the scale of a token with an infinite input: its codes say nothing, the result is NaN


class OneDnnW8A8(Kernel):
    """INT8 weights per channel, INT8 activations per token or static per tensor, all symmetric; CPU."""

    name = "onednn-w8a8"
    description = "INT8 x INT8 products with 32-bit sums, inputs quantized per token or per tensor, torch onednn::qlinear_pointwise"
    fused = True
    priority = 50

    def refuse_format(self, request: KernelRequest) -> str | None:
        weights, inputs = request.weights, request.input_activations
        if weights is None or weights.type != "int" or weights.num_bits != 8:
            return f"runs INT8 weights; this one is {weights or 'in high precision'}"
        if inputs is None or inputs.type != "int" or inputs.num_bits != 8 or not inputs.symmetric:
            return f"takes INT8 inputs, symmetric; these are {inputs or 'in high precision'}"
        if (inputs.strategy, inputs.dynamic) not in (("token", True), ("tensor", False)):
            return f"takes inputs with a dynamic scale per token or a static one per tensor; these are {inputs}"
        if weights.strategy != "channel" or weights.group_size is not None or not weights.symmetric:
            return f"runs one scale per channel and no zero point, not {weights}"
        return None

    def refuse_here(self, request: KernelRequest) -> str | None:
        if request.device != "cpu":
            return f"runs on the CPU, not on {request.device}"
        if not torch._C._has_mkldnn:
            return "this torch was built without oneDNN"
        return missing_ops(("qlinear_prepack", "qlinear_pointwise"), "onednn")

    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """`values` int8 [in, out], opaque; `scale` float32 [out]; `zero_point` int32 [out], zeros; static: `input_scale` float32 [1]."""
        if not isinstance(weight, QuantizedTensor):
            raise FormatError(f"{self.name} packs quantized weights", "quantize the tensor first (methods.rtn)")
        scale = weight.scale.view(-1).float()
        return {
            "values": torch.ops.onednn.qlinear_prepack(weight.values.contiguous(), None),
            "scale": scale,
            "zero_point": torch.zeros(scale.shape, dtype=torch.int32),
            **self.static_input_scale(weight, request),
        }

    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        assert request.input_activations is not None
        rows = x.reshape(-1, request.in_features).float()  # [M, in]
        parts, spec = [rows], request.input_activations
        if spec.outlier_threshold is not None:
            parts, spec = _three_parts(rows, spec)
        tokens, rows = rows.shape[0], torch.cat(parts) if len(parts) > 1 else rows
        static = packed.get("input_scale")
        if static is None:
            values, scale, _ = quantize_dynamic(rows, spec)  # int8 [M, in], [M, 1]
        else:
            values, scale = quantize_static(rows, static, spec), static + spoiled(rows)
        unsigned = values.view(torch.uint8) ^ _ZERO_POINT  # int8 + 128: the top bit flipped
        sums: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
            unsigned, 1.0, _ZERO_POINT, packed["values"], packed["scale"], packed["zero_point"], None,
            1.0, 0, torch.float32, "none", [], "",
        )  # [M, out], the channel's scale applied  # fmt: skip
        y = sums.mul_(scale.masked_fill(scale == _SATURATED, float("nan")))
        y = y if len(parts) == 1 else y.view(len(parts), tokens, -1).sum(0)
        return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], request.out_features)


def _three_parts(x: torch.Tensor, spec: QuantSpec) -> tuple[list[torch.Tensor], QuantSpec]:
    """x without its outlier columns, those columns alone, and what INT8 leaves of them; x alone when there are none. And the plain format.

    Args:
        x: [M, in] float32.
    """
    assert spec.outlier_threshold is not None
    outliers, plain = outlier_columns(x, spec.outlier_threshold), replace(spec, outlier_threshold=None)
    if not bool(outliers.any()):
        return [x], plain
    alone = x.masked_fill(~outliers, 0.0)
    values, scale, _ = quantize_dynamic(alone, plain)
    return [x.masked_fill(outliers, 0.0), alone, alone - dequantize_dynamic(values, scale, None, plain)], plain
