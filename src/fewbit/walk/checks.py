"""The sanity check on every layer: does what was rounded still compute nearly the same?

On tokens that the method has not seen (held-back calibration windows) the outputs of the rounded weight are compared with those of the
weight itself. A layer fails when

    its weight or outputs are not finite
    outputs have collapsed: more than one in a hundred channels is constant over the tokens though it was not before
    more codes than is sane stand at the ends of the grid
    the relative error is above the limit for its bits, or above twice that of rounding to nearest

The limits are rows of `checks.toml`. Without calibration data only the weight itself is looked at.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from fewbit.formats.grids import decode_values, grid_maximum
from fewbit.formats.quantize import dequantize
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["LayerCheck", "Limits", "check_layer", "limits", "relative_error", "saturated_share"]

_COLLAPSED_SHARE = 0.01
_WORSE_THAN_RTN = 2.0
_NEGLIGIBLE = 1e-3  # errors below this are not compared with RTN's: both are rounding noise


@dataclass(frozen=True)
class Limits:
    """A row of `checks.toml`."""

    relative_error: float
    saturated_share: float


@dataclass(frozen=True)
class LayerCheck:
    """What was found.

    Attributes:
        failure: why the layer must not be written so; empty when it may.
        error: relative error of the outputs; None without tokens.
        saturated: share of codes at the ends of the grid.
    """

    failure: str
    error: float | None
    saturated: float


def _read() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("fewbit.walk").joinpath("checks.toml").read_text(encoding="utf-8"))


_LIMITS: Mapping[str, Limits] = {name: Limits(**row) for name, row in _read().items()}


def limits(num_bits: int) -> Limits:
    """The limits for weights of so many bits; those of the next smaller width in the table when it has no row of its own."""
    known = sorted(int(name.removeprefix("bits-")) for name in _LIMITS)
    return _LIMITS[f"bits-{max(bits for bits in known if bits <= num_bits)}"]


def check_layer(
    weight: torch.Tensor,
    q: QuantizedTensor,
    tokens: torch.Tensor | None,
    rtn_error: float | None = None,
    exact: torch.Tensor | None = None,
) -> LayerCheck:
    """Check one rounded weight.

    Args:
        weight: [out, K], what was rounded.
        q: the result.
        tokens: [n, K], held-back inputs, float32; None or empty when there are none.
        rtn_error: the relative error of rounding to nearest on the same tokens.
        exact: [n, out], tokens @ weight.T, where it is known.
    """
    bounds = limits(q.spec.num_bits)
    saturated = saturated_share(q)
    if not _finite(q):
        return LayerCheck("the weight is not finite", None, saturated)
    if saturated > bounds.saturated_share:
        failure = f"{saturated:.0%} of the codes stand at the ends of the grid (limit {bounds.saturated_share:.0%})"
        return LayerCheck(failure, None, saturated)
    if tokens is None or not len(tokens):
        return LayerCheck("", None, saturated)
    approximation = dequantize(q)
    exact = tokens @ weight.float().T if exact is None else exact
    difference = tokens @ approximation.sub_(weight.float()).T
    error = _ratio(difference, exact)
    failure = _failure(exact, difference, error, bounds, rtn_error)
    return LayerCheck(failure, error, saturated)


def _finite(q: QuantizedTensor) -> bool:
    """Whether the weight that `q` stands for is finite, as far as its scales and codes tell: without dequantizing it."""
    parts = [part for part in (q.scale, q.global_scale, q.codebook) if part is not None and part.is_floating_point()]
    parts += [q.values] if q.values.is_floating_point() else []
    return all(bool(part.float().isfinite().all()) for part in parts)


def _failure(exact: torch.Tensor, difference: torch.Tensor, error: float, bounds: Limits, rtn_error: float | None) -> str:
    if not error < float("inf"):
        return "outputs are not finite"
    alive = exact.std(dim=0, correction=0) > 0
    constant = (exact + difference).std(dim=0, correction=0) == 0
    collapsed = float((alive & constant).sum()) / max(int(alive.sum()), 1)
    if collapsed > _COLLAPSED_SHARE:
        return f"{collapsed:.0%} of the outputs have become constant"
    if error > bounds.relative_error:
        return f"relative output error {error:.3g} (limit {bounds.relative_error:g})"
    if rtn_error is not None and error > max(_WORSE_THAN_RTN * rtn_error, _NEGLIGIBLE):
        return f"relative output error {error:.3g}, more than {_WORSE_THAN_RTN:g} times that of rounding to nearest ({rtn_error:.3g})"
    return ""


def relative_error(weight: torch.Tensor, q: QuantizedTensor, tokens: torch.Tensor, exact: torch.Tensor | None = None) -> float:
    """Norm of the outputs' error over the norm of the outputs.

    Args:
        weight: [out, K]. q: its approximation. tokens: [n, K], float32. exact: [n, out], tokens @ weight.T, where it is known.
    """
    exact = tokens @ weight.float().T if exact is None else exact
    return _ratio(tokens @ dequantize(q).sub_(weight.float()).T, exact)


def _ratio(difference: torch.Tensor, exact: torch.Tensor) -> float:
    """0 when both are zero: a layer of zeros is represented exactly."""
    error, size = float(difference.norm()), float(exact.norm())
    return error / size if size > 0 else (0.0 if error == 0 else float("inf"))


def saturated_share(q: QuantizedTensor) -> float:
    """Share of the codes at either end of the grid."""
    if q.spec.type == "int":
        low, high = -(2 ** (q.spec.num_bits - 1)), 2 ** (q.spec.num_bits - 1) - 1
        codes = q.values.cpu().numpy()  # numpy counts bytes ten times as fast as torch
        return float(np.count_nonzero(codes == low) + np.count_nonzero(codes == high)) / max(codes.size, 1)
    largest = grid_maximum(q.spec, q.codebook)
    return float((decode_values(q.values, q.spec, q.codebook).abs() >= largest).sum()) / max(q.values.numel(), 1)
