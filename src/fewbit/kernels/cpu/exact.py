"""Integer and E2M1 weights times inputs as they are: fewbit's CPU kernels of the compute mode `exact`.

    x[m, k]  = t * (q0 + 256 q1 + 65536 q2)                    three signed bytes; t a power of two per token and block of columns
    y[m, n]  = sum_g s[n, g] * sum_{k in g} (c[n, k] - z[n, g]) * x[m, k]

The inner sums are exact integers: three dot products of bytes (AVX-512 VNNI: 64 products an instruction) replace the conversion of each
weight to a float. An input keeps 22 bits below the largest of its block of at most 128 columns, so that a BF16 input is represented as it
is unless it is 2**14 times smaller than its neighbours; results are as exact as float32 sums (`tests/kernels/cpu/test_exact.py`). Nothing
else is rounded: weights are the format's integers, scales the stored ones.

MXFP4 and NVFP4 are integers, too: twice an E2M1 number is one of 0, 1, 2, 3, 4, 6, 8, 12.

Resident: `cpu.tiles64`, codes and scales in one stream. INT4 g128: 4.125 bits a weight; MXFP4 4.25; NVFP4 4.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fewbit.errors import FormatError
from fewbit.formats.scales import scale_as_float
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.cpu.extension import in_weight_memory, native, refuse_ragged_groups, refuse_request, run_linear
from fewbit.kernels.cpu.tiles64 import TILE, Columns, pack_tiles

if TYPE_CHECKING:
    from fewbit._native import Linear

__all__ = ["CpuExact"]

_LARGEST_BLOCK = 128
_E2M1 = "e2m1"


class CpuExact(Kernel):
    """INT2 to INT8 or E2M1 weights in groups or per channel; inputs in BF16 or float32 as they are; CPU.

    Args:
        number: `int8`, `int4`, `int3`, `int2` or `e2m1`.
        instruction_set: one of `_native.digit_instruction_sets()`, for tests; empty: the best that the CPU has.
    """

    fused = True
    needs_native = True
    priority = 60
    devices = ("cpu",)

    def __init__(self, number: str, instruction_set: str = "") -> None:
        self._number = number
        self._num_bits = 4 if number == _E2M1 else int(number[3:])
        self._instruction_set = instruction_set
        self._label = "FP4 (E2M1)" if number == _E2M1 else number.upper()
        self.name = f"cpu-{'fp4' if number == _E2M1 else number}-exact"
        self.description = f"{self._label} weights times exact inputs in 24-bit fixed point, integer sums, fewbit's own"

    def refuse_format(self, request: KernelRequest) -> str | None:
        spec = request.weights
        if spec is None or not self._holds(spec):
            return f"runs {self._label} weights; this one is {spec or 'in high precision'}"
        if request.input_activations is not None:
            return f"takes inputs in high precision; these are {request.input_activations}"
        if spec.strategy not in ("group", "channel", "tensor") or (spec.strategy == "channel" and spec.group_size is not None):
            return f"runs groups, channels and tensors that share a scale, not strategy '{spec.strategy}'"
        if spec.group_size is not None and spec.group_size % self._multiple:
            return f"runs group sizes that {self._multiple} divides, not {spec.group_size}"
        return "has no group index (activation order)" if request.has_g_idx else None

    def refuse_here(self, request: KernelRequest) -> str | None:
        return refuse_request(request) or refuse_ragged_groups(request)

    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """`tiles` uint8 [ceil(out / 64), bytes of a tile]; with a global scale `factor` float32 [1]."""
        if not isinstance(weight, QuantizedTensor):
            raise FormatError(f"{self.name} packs quantized weights", "quantize the tensor first (methods.rtn)")
        columns = self._columns(request)
        codes, zeros = weight.values, None
        if weight.spec.type == "int":
            offset = 1 << (self._num_bits - 1)
            codes = (codes + offset).view(torch.uint8) if offset < 128 else (codes ^ -128).view(torch.uint8)
            if weight.zero_point is not None:
                zeros = (weight.zero_point.to(torch.int16) + offset).to(torch.uint8).expand(weight.shape[0], -1)
        scale = _stored_scale(weight).expand(weight.shape[0], -1)
        packed = in_weight_memory({"tiles": pack_tiles(codes, self._num_bits, columns, scale, zeros)})
        if weight.global_scale is not None and scale.dtype != torch.float32:
            packed["factor"] = weight.global_scale.float().reshape(1).clone()
        return packed

    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        return run_linear(self.native(packed, request), x, bias)

    def native(self, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> Linear:
        spec = request.weights
        assert spec is not None
        columns = self._columns(request)
        factor = float(packed["factor"]) if "factor" in packed else 1.0
        return native.digit_linear(
            packed["tiles"],
            request.out_features,
            request.in_features,
            self._number,
            self._scale_type(packed["tiles"], spec, columns),
            not spec.symmetric,
            columns.block,
            columns.blocks,
            factor * (0.5 if self._number == _E2M1 else 1.0),
            self._instruction_set,
        )

    @property
    def _multiple(self) -> int:
        """What divides a block: each set of a block is a whole number of vectors of four columns."""
        return 32 if self._num_bits == 3 else 16

    def _holds(self, spec: QuantSpec) -> bool:
        if self._number == _E2M1:
            return spec.type == "float" and spec.num_bits == 4 and spec.exponent_bits == 2
        return spec.type == "int" and spec.num_bits == self._num_bits

    def _columns(self, request: KernelRequest) -> Columns:
        """The longest blocks that divide a group; per channel 128 columns, the row's end padded."""
        size = None if request.weights is None else request.weights.group_size
        if size is None:
            block = min(_LARGEST_BLOCK, -(-request.in_features // self._multiple) * self._multiple)
            return Columns(block, -(-request.in_features // block), 1)
        block = next(b for b in range(_LARGEST_BLOCK, 0, -self._multiple) if size % b == 0)
        return Columns(block, size // block, request.in_features // size)

    def _scale_type(self, tiles: torch.Tensor, spec: QuantSpec, columns: Columns) -> str:
        """Read off the size: the stored scales, or float32 where these did not do."""
        codes = columns.padded * TILE * self._num_bits // 8
        scale_bytes = (tiles.shape[1] - codes) // columns.groups // TILE - (0 if spec.symmetric else 1)
        return {4: "float32", 2: "bfloat16", 1: "e8m0" if spec.scale_dtype == "e8m0" else "e4m3"}[scale_bytes]


def _stored_scale(weight: QuantizedTensor) -> torch.Tensor:
    """Scales as they are stored where the native code reads them so, else in float32: FP16; of the 8-bit formats NaN, negative numbers and
    the power of two that is a subnormal float32."""
    scale, spec = weight.scale, weight.spec
    if spec.scale_dtype == "bfloat16":
        return scale
    if spec.scale_dtype in ("e8m0", "float8_e4m3fn"):
        codes = scale.view(torch.uint8)
        lowest, highest = (1, 254) if spec.scale_dtype == "e8m0" else (0, 126)
        if bool(((codes >= lowest) & (codes <= highest)).all()):
            return codes
    return scale_as_float(scale, spec, weight.global_scale)
