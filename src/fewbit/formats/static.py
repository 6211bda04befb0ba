"""Static activation formats: one scale per tensor, fixed at calibration, so that nothing about x is computed at run time.

    q = encode(x / scale)          x ~ decode(q) * scale            symmetric; what is larger than calibration saw, saturates

The scale is a number of the layer that reads x; `QuantizedTensor.input_scale` carries it beside the layer's weight.

A dynamic scale shows that something is wrong with a token, because it becomes NaN or infinite itself. A fixed one does not, and integers
have no code for NaN: so `spoiled` finds the tokens with NaN or infinite values, and their results are made NaN.
"""

from __future__ import annotations

import torch

from fewbit.errors import FormatError
from fewbit.formats.grids import decode_values, encode_values
from fewbit.formats.spec import QuantSpec

__all__ = ["check_static", "fake_quantize_static", "quantize_static", "spoiled"]


def check_static(spec: QuantSpec) -> None:
    """Refuse what is no static format.

    Raises:
        FormatError: dynamic, affine, or not per tensor.
    """
    if spec.dynamic or spec.strategy != "tensor" or not spec.symmetric or spec.type not in ("int", "float") or spec.global_scale:
        raise FormatError(f"{spec} has no static scale of inputs", "static formats are symmetric and per tensor")


def quantize_static(x: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The codes of x.

    Args:
        x: any shape, floating point.
        scale: float32 [1].
        spec: a static format (`check_static`).

    Returns:
        x's shape in `grids.value_dtype(spec)`.
    """
    return encode_values(x.float() / scale, spec)


def spoiled(x: torch.Tensor) -> torch.Tensor:
    """0 for each token of x [..., n] whose values are all finite, NaN for the others: float32 [..., 1], to be added to its results."""
    return x.abs().amax(-1, keepdim=True).float() * 0.0


def fake_quantize_static(x: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Quantized and dequantized, in x's shape and dtype; a token with NaN or infinite values becomes NaN.

    Args:
        x: [..., n], floating point.
        scale: float32 [1].
        spec: a static format.

    Raises:
        FormatError: `spec` is no static format.
    """
    check_static(spec)
    return decode_values(quantize_static(x, scale, spec), spec).mul_(scale).add_(spoiled(x)).to(x.dtype)
