"""Integer weights times activations that are quantized to INT8 on the fly: fewbit's fastest CPU kernels for low batch and prefill.

    s_x[m, g] = max_{k in g} |x[m, k]| / 127           q_x = round(x / s_x)             one scale per token and group of 32 to 128 columns
    y[m, n]   = sum_g s_x[m, g] * s_w[n, g] * sum_{k in g} q_x[m, k] * (q_w[n, k] - z[n, g])

The inner sums are exact integers (AVX-512 VNNI: 64 products an instruction); what the mode costs is the rounding of x, half a step of 1/127
of the largest value in its group. So it is a compute mode of its own, `int8-activations`, that a user asks for: W4A16 says the inputs
are 16 bits wide. `tests/kernels/cpu` bounds the extra error; a report names the kernel.

llama.cpp (Q8_0 blocks of 32), ONNX Runtime (accuracy level 4) and OpenVINO (dynamic quantization) compute this way, too.

Resident: codes as `cpu.tiles` lays them out, 2, 3, 4 or 8 bits a weight; scales BF16 in pairs of groups, or float32 where
BF16 would round them; zero points a byte each. INT4 g128 symmetric: 4.125 bits a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fewbit.errors import FormatError
from fewbit.formats.scales import scale_as_float
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.cpu.extension import in_weight_memory, native, refuse_ragged_groups, refuse_request, run_linear
from fewbit.kernels.cpu.tiles import tile_codes, tile_rows

if TYPE_CHECKING:
    from fewbit._native import Linear

__all__ = ["CpuIntActivations"]

_INPUT_GROUPS = (128, 64, 32)


class CpuIntActivations(Kernel):
    """Weights of 2, 3, 4 or 8 bits, symmetric and affine, in groups that 32 divides or per channel; inputs quantized to INT8 in groups.

    Args:
        num_bits: of the weights, 2, 3, 4 or 8.
        instruction_set: one of `_native.int_instruction_sets()`, for tests; empty: the best that the CPU has.
    """

    fused = True
    needs_native = True
    priority = 70

    def __init__(self, num_bits: int, instruction_set: str = "") -> None:
        self._num_bits = num_bits
        self._instruction_set = instruction_set
        self.name = f"cpu-int{num_bits}"
        self.description = f"INT{num_bits} x INT8 products with 32-bit sums, inputs quantized on the fly per token in groups, fewbit's own"

    def refuse_format(self, request: KernelRequest) -> str | None:
        spec = request.weights
        if spec is None or spec.type != "int" or spec.num_bits != self._num_bits:
            return f"runs INT{self._num_bits} weights; this one is {spec or 'in high precision'}"
        if request.input_activations is not None:
            return f"takes inputs in high precision; these are {request.input_activations}"
        if request.compute != "int8-activations":
            return "quantizes its inputs to INT8 on the fly; exact computation was asked for (--compute int8-activations allows it)"
        if spec.strategy not in ("group", "channel") or (spec.strategy == "channel" and spec.group_size is not None):
            return f"runs groups or channels that share a scale, not strategy '{spec.strategy}'"
        if spec.group_size is not None and spec.group_size % _INPUT_GROUPS[-1]:
            return f"runs group sizes that {_INPUT_GROUPS[-1]} divides, not {spec.group_size}"
        return "has no group index (activation order)" if request.has_g_idx else None

    def refuse_here(self, request: KernelRequest) -> str | None:
        return refuse_request(request) or refuse_ragged_groups(request)

    def pack(self, weight: QuantizedTensor | torch.Tensor, request: KernelRequest) -> dict[str, torch.Tensor]:
        """`codes` uint8 [tiles, lines, 64]; `scales` bfloat16 [tiles, pairs of groups, 16, 2] or float32 [tiles, groups, 16], per channel
        float32 [tiles, 16]; affine: `zeros` int8 [tiles, groups, 16]. All of a tile lies together."""
        if not isinstance(weight, QuantizedTensor):
            raise FormatError(f"{self.name} packs quantized weights", "quantize the tensor first (methods.rtn)")
        group = _input_group(request)
        columns = -(-request.in_features // group) * group
        packed = {}
        per_channel = weight.scale.shape[1] == 1
        repeats = 1 if per_channel else columns // group // weight.scale.shape[1]
        scale = scale_as_float(weight.scale, weight.spec, weight.global_scale).repeat_interleave(repeats, dim=1)
        if per_channel:
            packed["scales"] = tile_rows(scale).view(-1, 16)
        elif weight.scale.dtype == torch.bfloat16:
            pairs = torch.nn.functional.pad(scale, (0, scale.shape[1] % 2)).to(torch.bfloat16)
            packed["scales"] = tile_rows(pairs).view(-1, pairs.shape[1] // 2, 2, 16).transpose(2, 3).contiguous()
        else:
            packed["scales"] = tile_rows(scale)
        if weight.zero_point is not None:
            packed["zeros"] = tile_rows(weight.zero_point.repeat_interleave(repeats, dim=1))
        return in_weight_memory({**packed, "codes": tile_codes(weight.values, self._num_bits, columns)})

    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        return run_linear(self.native(packed, request), x, bias)

    def native(self, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> Linear:
        return native.int_linear(
            packed["codes"],
            packed["scales"],
            packed.get("zeros"),
            request.out_features,
            request.in_features,
            _input_group(request),
            self._num_bits,
            instruction_set=self._instruction_set,
        )


def _input_group(request: KernelRequest) -> int:
    """Columns of the input that share a scale: those of the weight's group, at most 128; per channel 128, the row's end padded."""
    spec = request.weights
    size = None if spec is None else spec.group_size
    return next(group for group in _INPUT_GROUPS if size is None or size % group == 0)
