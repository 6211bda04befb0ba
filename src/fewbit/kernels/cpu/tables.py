"""NF4, other 4-bit codebooks and FP8 weights times inputs as they are: codes become floats in registers.

    y[m, n] = sum_g s[n, g] * sum_{k in g} table[c[n, k]] * x[m, k]

The inner sums are float32 multiply-adds, 16 an instruction with AVX-512; nothing is rounded on the way. A table of 16 numbers fits a
register, and one permutation looks up 16 codes. FP8 is widened by way of FP16, which has all of its numbers, E4M3's subnormals too.

What it costs: three instructions for 16 weights of a table and five for FP8, where BF16 takes two. So at one token these formats gain less
speed than bits, where integer formats gain nearly the full ratio; unfused (`kernels.reference`) they are several times slower than BF16.

Resident: the codes, and scales in BF16 or float32: NF4 g64 4.25 bits a weight, FP8 per channel 8 and a scale per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fewbit.errors import FormatError
from fewbit.formats.grids import NF4_VALUES
from fewbit.formats.scales import scale_as_float
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.cpu.extension import in_weight_memory, native, refuse_request, run_linear
from fewbit.kernels.cpu.tiles64 import TILE, Columns, pack_bytes, pack_tiles

if TYPE_CHECKING:
    from fewbit._native import Linear

__all__ = ["CpuTables"]

_NATIVE = {"nf4": "table16", "codebook4": "table16", "fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}
_LINE = 8  # columns of one line of 4-bit codes
_E4M3_NAN = 0x7F


class CpuTables(Kernel):
    """NF4, 4-bit codebook or FP8 weights with scales per group, block, channel or tensor; inputs in BF16 or float32 as they are; CPU.

    Args:
        grid: `nf4`, `codebook4`, `fp8_e4m3` or `fp8_e5m2`.
        instruction_set: one of `_native.float_instruction_sets()`, for tests; empty: the best that the CPU has.
    """

    fused = True
    needs_native = True
    priority = 60
    devices = ("cpu",)

    def __init__(self, grid: str, instruction_set: str = "") -> None:
        self._grid = grid
        self._format = _NATIVE[grid]
        self._multiple = _LINE if self._format == "table16" else 1
        self._instruction_set = instruction_set
        self.name = f"cpu-{grid.replace('_', '-')}"
        how = "looked up in a register" if self._format == "table16" else "widened through FP16"
        self.description = f"{grid.upper().replace('_', ' ')} weights {how}, float32 products with exact inputs, fewbit's own"

    def refuse_format(self, request: KernelRequest) -> str | None:
        spec = request.weights
        if spec is None or spec.grid_name != self._grid:
            return f"runs {self._grid.upper()} weights; this one is {spec or 'in high precision'}"
        if request.input_activations is not None:
            return f"takes inputs in high precision; these are {request.input_activations}"
        if spec.strategy == "token" or (spec.strategy == "channel" and spec.group_size is not None):
            return f"runs groups, blocks, channels and tensors that share a scale, not strategy '{spec.strategy}'"
        size = _group_size(spec)
        if size is not None and size % self._multiple:
            return f"runs group sizes that {self._multiple} divides, not {size}"
        return "has no group index (activation order)" if request.has_g_idx else None

    def refuse_here(self, request: KernelRequest) -> str | None:
        if request.in_features % self._multiple:
            return f"needs in_features divisible by {self._multiple}, not {request.in_features}"
        return refuse_request(request)

    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """`tiles` uint8 [ceil(out / 64), bytes of a tile]; of NF4 and codebooks `table` float32 [16]."""
        if not isinstance(weight, QuantizedTensor):
            raise FormatError(f"{self.name} packs quantized weights", "quantize the tensor first (methods.rtn)")
        group, groups = _groups(request)
        scale = _row_scales(weight)
        if self._format == "table16":
            entries = torch.tensor(NF4_VALUES) if weight.codebook is None else weight.codebook.detach().float().cpu()
            table = torch.nn.functional.pad(entries, (0, 16 - entries.numel()))
            columns = Columns(_LINE, group // _LINE, groups)
            return {**in_weight_memory({"tiles": pack_tiles(weight.values.to(torch.uint8), 4, columns, scale, None)}), "table": table}
        codes = weight.values.view(torch.uint8)
        if self._format == "e4m3":
            scale = _spoil(scale, (codes & 0x7F) == _E4M3_NAN, group)
        return in_weight_memory({"tiles": pack_bytes(codes, Columns(group, 1, groups), scale)})

    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        return run_linear(self.native(packed, request), x, bias)

    def native(self, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> Linear:
        group, groups = _groups(request)
        tiles, bits = packed["tiles"], 4 if self._format == "table16" else 8
        scale_bytes = tiles.shape[1] // groups // TILE - group * bits // 8
        return native.table_linear(
            tiles,
            request.out_features,
            request.in_features,
            self._format,
            scale_bytes == 2,
            group,
            packed.get("table"),
            self._instruction_set,
        )


def _group_size(spec: QuantSpec) -> int | None:
    return spec.group_size if spec.block_shape is None else spec.block_shape[1]


def _groups(request: KernelRequest) -> tuple[int, int]:
    """(columns of a group, groups of a row); per channel and tensor one group; the last of a block format may be short."""
    assert request.weights is not None
    size = _group_size(request.weights) or request.in_features
    return size, -(-request.in_features // size)


def _row_scales(weight: QuantizedTensor) -> torch.Tensor:
    """[out, groups] in BF16 where they are stored so, else in float32."""
    exact = weight.spec.scale_dtype == "bfloat16" and weight.global_scale is None
    scale = weight.scale if exact else scale_as_float(weight.scale, weight.spec, weight.global_scale)
    rows = weight.shape[0]
    if weight.spec.block_shape is not None:
        return scale.repeat_interleave(weight.spec.block_shape[0], dim=0)[:rows]
    return scale.expand(rows, -1)


def _spoil(scale: torch.Tensor, bad: torch.Tensor, group: int) -> torch.Tensor:
    """A NaN among the weights spoils its row whatever the input is: as a scale it costs the inner loop nothing."""
    if not bool(bad.any()):
        return scale
    in_groups = torch.nn.functional.pad(bad, (0, -bad.shape[1] % group)).view(bad.shape[0], -1, group)
    return scale.masked_fill(in_groups.any(-1), float("nan"))
