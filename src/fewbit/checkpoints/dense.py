"""The layout of no quantization: `P.weight` in BF16 or FP32, as the model in high precision has it.

What a quantized checkpoint stands for, written out: for programs that know no quantized layout, and for comparing ("is this what it says it
is?"). FP32 holds every dequantized weight as our arithmetic gives it; BF16 rounds to eight bits, and `convert` says how much that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fewbit.checkpoints.layout import Layout
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["DenseLayout"]


class DenseLayout(Layout):
    """The writer.

    Args:
        dtype: torch.bfloat16 or torch.float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = "dense" if dtype == torch.bfloat16 else "dense-float32"

    def supports(self, scheme: Scheme) -> str | None:
        return "it is the layout of no quantization: copy the model instead"

    def nearest(self, spec: QuantSpec) -> QuantSpec | None:
        return spec

    def format_name(self, scheme: Scheme) -> str:
        return str(self.dtype).removeprefix("torch.")

    def write_linear(self, prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
        return {f"{prefix}.weight": dequantize(q, self.dtype)}

    def config_fields(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        return {}
