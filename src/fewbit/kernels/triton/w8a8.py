"""Linears with 8-bit weights and 8-bit inputs on NVIDIA GPUs, and LLM.int8() as a row of its own.

Inputs are quantized by `rows.process_rows`: on its own here, or in one pass with the norm before (the GPU engine). Products are torch's
where it has them for the format and the number of tokens, else those of `eight_bit`.

LLM.int8() (arXiv 2208.07339) takes the columns of x with outliers out of the INT8 product and multiplies them in 16 bit with the same
columns of the weight, dequantized. Which columns these are is known only when x is: the host waits for the GPU at every linear, and no
CUDA graph can hold it. That is how bitsandbytes works, too, and why the method saves memory and costs time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fewbit.errors import FormatError
from fewbit.formats.quantize import outlier_columns
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.triton.environment import preference, refuse_device
from fewbit.kernels.triton.gpu_kernel import GpuKernel, Rows

__all__ = ["TritonLlmInt8", "TritonW8A8"]

_INT8, _FP8 = (8, 0), (8, 9)  # compute capability of BF16 and INT8 tensor cores, and of FP8 ones
_FEW_TOKENS = 16  # up to which the weight's bytes bound the time; torch's `_int_mm` takes more only
_BLOCK_K = 128


class TritonW8A8(GpuKernel):
    """INT8 weights per channel with INT8 inputs; FP8 E4M3 weights per tensor, channel or block with FP8 inputs; all symmetric.

    Inputs per token, or static per tensor.
    """

    name = "triton-w8a8"
    description = (
        "INT8 x INT8 and FP8 x FP8 on tensor cores: torch's _int_mm and _scaled_mm, own kernels for few tokens and blocks (Triton)"
    )
    fused = True
    priority = 55 + preference()
    devices = ("cuda",)

    def refuse_format(self, request: KernelRequest) -> str | None:
        if request.input_activations is not None and request.input_activations.outlier_threshold is not None:
            return "has no columns in 16 bit for outliers"
        return _refuse_format(request)

    def refuse_here(self, request: KernelRequest) -> str | None:
        return _refuse_here(request)

    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """`values` int8 or float8_e4m3fn [out, in]; `scale` float32 [out], or [row blocks, column blocks]; static: `input_scale`."""
        if not isinstance(weight, QuantizedTensor):
            raise FormatError(f"{self.name} packs quantized weights", "quantize the tensor first (methods.rtn)")
        scale = weight.scale.to(request.device, torch.float32)
        if weight.spec.strategy != "block":
            scale = scale.view(-1).expand(weight.shape[0])
        values = weight.values.to(request.device).contiguous()
        return {"values": values, "scale": scale.contiguous(), **self.static_input_scale(weight, request)}

    def inputs(self, request: KernelRequest) -> QuantSpec | None:
        return request.input_activations

    def sums(self, x: Rows, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> torch.Tensor:
        from fewbit.kernels.triton.eight_bit import multiply, scaled_sums  # imports Triton

        assert x.scale is not None and request.weights is not None
        values, scale, tokens = packed["values"], packed["scale"], x.values.shape[0]
        blocks = request.weights.block_shape
        if blocks is not None or tokens <= _FEW_TOKENS or request.in_features % 16 or request.out_features % 16:
            parts = _parts(request) if tokens <= _FEW_TOKENS else 1
            return multiply(x, values, scale, request.dtype, block_shape=blocks, parts=parts)
        if values.dtype == torch.int8:
            return scaled_sums(torch._int_mm(x.values, values.t()), x.scale, scale, None, request.dtype)[None]
        y = torch._scaled_mm(x.values, values.t(), scale_a=x.scale[:, None], scale_b=scale[None], out_dtype=torch.bfloat16)
        return y.to(request.dtype)[None]

    def join(self, packed: list[Mapping[str, torch.Tensor]], request: KernelRequest) -> dict[str, torch.Tensor] | None:
        if any("input_scale" in one for one in packed) and len({float(one["input_scale"]) for one in packed}) > 1:
            return None  # static inputs with scales of their own
        spec = request.weights
        rows = None if spec is None or spec.block_shape is None else spec.block_shape[0]
        if rows is not None and any(one["values"].shape[0] % rows for one in packed[:-1]):
            return None  # a block would span two linears
        # torch has no kernel that concatenates float8 on every device: bytes it is
        values = torch.cat([one["values"].view(torch.uint8) for one in packed]).view(packed[0]["values"].dtype)
        joined = {"values": values, "scale": torch.cat([one["scale"] for one in packed])}
        return joined | {name: packed[0][name] for name in ("input_scale",) if name in packed[0]}


class TritonLlmInt8(TritonW8A8):
    """INT8 weights per channel; INT8 inputs per token but for outlier columns, which are multiplied in 16 bit."""

    name = "triton-llm-int8"
    description = "LLM.int8(): INT8 products, outlier columns gathered and multiplied in 16 bit; the host waits at every linear (Triton)"
    priority = 54 + preference()
    capturable = False

    def refuse_format(self, request: KernelRequest) -> str | None:
        if request.input_activations is None or request.input_activations.outlier_threshold is None:
            return "is made for inputs with outlier columns in 16 bit"
        return _refuse_format(request)

    def inputs(self, request: KernelRequest) -> QuantSpec | None:
        return None  # the outliers are looked for in x itself

    def sums(self, x: Rows, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> torch.Tensor:
        from fewbit.kernels.triton.rows import process_rows  # imports Triton

        spec = request.input_activations
        assert spec is not None and spec.outlier_threshold is not None
        outliers = outlier_columns(x.values, spec.outlier_threshold)
        rest = x.values.masked_fill(outliers, 0.0)
        codes = process_rows(rest, request.dtype, inputs=replace(spec, outlier_threshold=None))
        y = super().sums(codes, packed, request).float().sum(0)
        columns = outliers.nonzero().view(-1)  # the host waits here
        if columns.numel():
            weight = packed["values"].index_select(1, columns).float() * packed["scale"][:, None]
            y += (x.values.index_select(1, columns) @ weight.to(request.dtype).t()).float()
        return y.to(request.dtype)[None]


def _refuse_format(request: KernelRequest) -> str | None:
    weights, inputs = request.weights, request.input_activations
    if weights is None or weights.num_bits != 8 or weights.type not in ("int", "float"):
        return f"runs INT8 and FP8 weights; this one is {weights or 'in high precision'}"
    if inputs is None or (inputs.type, inputs.num_bits, inputs.exponent_bits) != (weights.type, 8, weights.exponent_bits):
        return f"takes inputs in the weight's format; these are {inputs or 'in high precision'}"
    if weights.exponent_bits not in (None, 4):
        return f"runs FP8 E4M3, not {weights}"
    if not (weights.symmetric and inputs.symmetric) or request.has_g_idx:
        return "runs symmetric formats without a group index"
    if (inputs.strategy, inputs.dynamic) not in (("token", True), ("tensor", False)):
        return f"takes inputs with a dynamic scale per token or a static one per tensor; these are {inputs}"
    if weights.strategy == "block" and weights.type == "float" and weights.block_shape is not None and weights.block_shape[1] == _BLOCK_K:
        return None
    if weights.strategy not in ("channel", "tensor") or weights.group_size is not None:
        return f"runs scales per channel, per tensor and FP8 in blocks of {_BLOCK_K} columns, not {weights}"
    return None


def _refuse_here(request: KernelRequest) -> str | None:
    if request.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"computes in bfloat16, float16 or float32, not {request.dtype}"
    assert request.weights is not None
    return refuse_device(request.device, _INT8 if request.weights.type == "int" else _FP8)


def _parts(request: KernelRequest) -> int:
    """Parts of K for few tokens: so many that there are some 500 programs, and each still has 512 columns."""
    programs = -(-request.out_features // 32)
    return max(1, min(8, 512 // programs, request.in_features // 512))
