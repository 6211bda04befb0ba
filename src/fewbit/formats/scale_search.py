"""The search for the scale of a symmetric integer format that leaves the least squared error.

With the codes q = round(x / s) fixed and d = x - s q, the weighted error is least at the scale s + <q, d> / <q, q>, where it is
<d, d> - <q, d>^2 / <q, q> (products weighted by importance). So each start is moved to the best scale for its own codes. The starts are
fixed shares of the min-max scale. Twenty of them leave as little error as eighty scales tried as they are.

Two ways to the same numbers (but for the order of summation): C++ (`src/native/scale_search.cpp`), which keeps a group in the cache for all
starts, and torch, about thirty times slower, where the extension is missing, for other devices and for scales shared by several rows.
"""

from __future__ import annotations

from typing import Protocol

import torch

from fewbit.formats.native import native_extension
from fewbit.formats.spec import QuantSpec

__all__ = ["ScaleSearch", "scale_search"]

# Least squares moves each of these to a minimum nearby. Not 1: there the largest value lies on a tie, half a step outside the last code.
_STARTS = (0.99, 0.93, 0.86, 0.79, 0.72, 0.65, 0.55, 0.45, 0.3, 0.15)
# At four bits and fewer a grid of -8 to 7 is so much longer on one side that turning it over pays.
_SIGNED_UP_TO_BITS = 4


class ScaleSearch(Protocol):
    """A weight whose scales are looked for; scales are float32 in the shape that `scale_search` was given."""

    def best(self, start: torch.Tensor) -> torch.Tensor:
        """The scale of each group, not yet rounded to what is stored, of least error that is reached from `start`; may be negative."""
        ...

    def error(self, scale: torch.Tensor) -> torch.Tensor:
        """The (weighted) squared error of each group at a scale."""
        ...


def scale_search(rows: torch.Tensor, shape: torch.Size, spec: QuantSpec, importance: torch.Tensor | None) -> ScaleSearch:
    """Prepare the search.

    Args:
        rows: [n, K], float32.
        shape: of the scales, [n, groups], or [1, 1] per tensor.
        spec: symmetric integers.
        importance: [K], float32, or None.
    """
    native = rows.device.type == "cpu" and shape[0] == rows.shape[0] and native_extension() is not None
    return (_Native if native else _Torch)(rows, shape, spec, importance)


def _factors(spec: QuantSpec) -> list[float]:
    signs = (1.0, -1.0) if spec.num_bits <= _SIGNED_UP_TO_BITS else (1.0,)
    return [start * sign for start in _STARTS for sign in signs]


def _ends(spec: QuantSpec) -> tuple[int, int]:
    return -(2 ** (spec.num_bits - 1)), 2 ** (spec.num_bits - 1) - 1


class _Torch:
    """The search in torch: groups [*scale shape, n]."""

    def __init__(self, rows: torch.Tensor, shape: torch.Size, spec: QuantSpec, importance: torch.Tensor | None) -> None:
        self._groups = rows.reshape(*shape, -1)
        self._importance = None if importance is None else importance.expand(rows.shape).reshape(self._groups.shape)
        self._factors = _factors(spec)
        self._low, self._high = _ends(spec)

    def _codes(self, scale: torch.Tensor) -> torch.Tensor:
        return (self._groups / scale.unsqueeze(-1)).round_().clamp_(self._low, self._high)

    def best(self, start: torch.Tensor) -> torch.Tensor:
        least, found = torch.full_like(start, torch.inf), start
        for factor in self._factors:
            tried = start * factor
            codes = self._codes(tried)
            difference = self._groups - codes * tried.unsqueeze(-1)
            weighted = difference if self._importance is None else difference * self._importance
            norm = (codes.square() if self._importance is None else codes.square() * self._importance).sum(-1)
            projection = (weighted * codes).sum(-1)
            shift = projection / norm
            error = (weighted * difference).sum(-1) - projection * shift
            better = (norm > 0) & (error < least)
            least, found = torch.where(better, error, least), torch.where(better, tried + shift, found)
        return found

    def error(self, scale: torch.Tensor) -> torch.Tensor:
        squares = self._codes(scale).mul_(scale.unsqueeze(-1)).sub_(self._groups).square_()
        return (squares if self._importance is None else squares.mul_(self._importance)).sum(-1)


class _Native:
    """The search in C++: every row has scales of its own."""

    def __init__(self, rows: torch.Tensor, shape: torch.Size, spec: QuantSpec, importance: torch.Tensor | None) -> None:
        self._given = (rows.contiguous(), None if importance is None else importance.contiguous())
        self._factors = torch.tensor(_factors(spec))
        self._rest = (*_ends(spec), torch.get_num_threads())

    def best(self, start: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(start)
        native_extension().least_squares_scales(*self._given, start.contiguous(), self._factors, out, *self._rest)
        return out

    def error(self, scale: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(scale)
        native_extension().squared_error(*self._given, scale.contiguous(), out, *self._rest)
        return out
