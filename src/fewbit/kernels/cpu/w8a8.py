"""W8A8: INT8 weights per channel times INT8 activations with one scale per token or, calibrated, one per tensor. fewbit's own products.

    s_x[m] = max_k |x[m, k]| / 127.5, or the calibrated scale         q_x = round(x / s_x)
    y[m, n] = s_x[m] * s_w[n] * sum_k q_x[m, k] * q_w[n, k]                              exact integers, 32-bit sums

The same kernels as `cpu.int_activations` with a single group as wide as the row: 255 * 128 * in_features must fit 31 bits, up to 65,536
columns. Quantizing is part of the preparation in C++, one pass over x on all threads, where `onednn-w8a8` runs several torch operators; so
a decode step, whose products take tens of microseconds, gains most. No outlier columns (LLM.int8()): those stay with `onednn-w8a8`.

Resident: codes as `cpu.tiles` lays them out, 8 bits a weight; scales float32 [tiles, 16]; static inputs: their scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fewbit.errors import FormatError
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.cpu.extension import in_weight_memory, native, refuse_request, run_linear
from fewbit.kernels.cpu.tiles import tile_codes, tile_rows

if TYPE_CHECKING:
    from fewbit._native import Linear

__all__ = ["CpuW8A8"]

_COLUMNS = 32  # a group is a multiple of
_MOST_COLUMNS = 1 << 16
_RANGE = 127.5  # formats.scales: the largest magnitude of a token is mapped to it


class CpuW8A8(Kernel):
    """INT8 weights per channel, INT8 activations per token or static per tensor, all symmetric; CPU.

    Args:
        instruction_set: one of `_native.int_instruction_sets()`, for tests; empty: the best that the CPU has.
    """

    name = "cpu-w8a8"
    description = "INT8 x INT8 products with 32-bit sums, inputs quantized per token or per tensor, fewbit's own"
    fused = True
    needs_native = True
    priority = 60

    def __init__(self, instruction_set: str = "") -> None:
        self._instruction_set = instruction_set

    def refuse_format(self, request: KernelRequest) -> str | None:
        weights, inputs = request.weights, request.input_activations
        if weights is None or weights.type != "int" or weights.num_bits != 8:
            return f"runs INT8 weights; this one is {weights or 'in high precision'}"
        if inputs is None or inputs.type != "int" or inputs.num_bits != 8 or not inputs.symmetric:
            return f"takes INT8 inputs, symmetric; these are {inputs or 'in high precision'}"
        if (inputs.strategy, inputs.dynamic) not in (("token", True), ("tensor", False)) or inputs.scale_dtype != "float32":
            return f"takes inputs with a float32 scale, dynamic per token or static per tensor; these are {inputs}"
        if inputs.outlier_threshold is not None:
            return "has no outlier columns (LLM.int8())"
        if weights.strategy != "channel" or weights.group_size is not None or not weights.symmetric:
            return f"runs one scale per channel and no zero point, not {weights}"
        return "has no group index (activation order)" if request.has_g_idx else None

    def refuse_here(self, request: KernelRequest) -> str | None:
        if request.in_features > _MOST_COLUMNS:
            return f"adds up to {_MOST_COLUMNS} columns in 32 bits, not {request.in_features}"
        return refuse_request(request)

    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """`codes` uint8 [tiles, lines, 64]; `scales` float32 [tiles, 16]; static: `input_scale` float32 [1]."""
        if not isinstance(weight, QuantizedTensor):
            raise FormatError(f"{self.name} packs quantized weights", "quantize the tensor first (methods.rtn)")
        packed = {"scales": tile_rows(weight.scale.float()).view(-1, 16), "codes": tile_codes(weight.values, 8, _group(request))}
        return {**in_weight_memory(packed), **self.static_input_scale(weight, request)}

    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        return run_linear(self.native(packed, request), x, bias)

    def native(self, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> Linear:
        static = packed.get("input_scale")
        return native.int_linear(
            packed["codes"],
            packed["scales"],
            None,
            request.out_features,
            request.in_features,
            _group(request),
            8,
            range=_RANGE,
            static_scale=0.0 if static is None else float(static),
            instruction_set=self._instruction_set,
        )


def _group(request: KernelRequest) -> int:
    return -(-request.in_features // _COLUMNS) * _COLUMNS
