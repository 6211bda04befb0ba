"""What calibrated methods know of a linear's inputs: sums over the calibration tokens, gathered batch by batch.

For the inputs x_t (rows, [tokens, K]) of one linear, or of all linears that read the same tensor:

    hessian       H = mean_t x_t x_t^T         [K, K]   the layer's squared output error is tr(D H D^T) for a weight error D
    cross         C = mean_t (x'_t - x_t) x_t^T         x' is what the input would be had nothing before it been quantized (GPTAQ)
    mean_square   diag(H)                      [K]      llama.cpp's importance matrix
    mean_abs, max_abs                          [K]      AWQ's and SmoothQuant's measures of a channel
    sample        some rows x_t                         for errors that no quadratic form describes (quantized activations)

Sums, not averages, are kept in float32 (vectors in float64), so that the order of batches is the only thing that rounding depends on.
A layer costs K^2 * 4 bytes for H: 67 MB at K = 4,096, 485 MB at K = 11,008; it is accumulated in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewbit.errors import FormatError

__all__ = ["InputStatistics"]

_BLOCK_COLUMNS = 1024


class InputStatistics:
    """Statistics of the inputs of one linear, or of several that share their input.

    Args:
        columns: K, the input width.
        hessian: keep the second moments [K, K].
        cross: keep the cross moments with the reference path [K, K].
        sample_tokens: most rows that `sample` keeps; drawn evenly over everything that is seen, without randomness.
        device: where the sums live.

    Attributes:
        tokens: rows seen.
    """

    def __init__(self, columns: int, *, hessian: bool = False, cross: bool = False, sample_tokens: int = 0, device: str = "cpu") -> None:
        self.columns = columns
        self.tokens = 0
        self._hessian = torch.zeros(columns, columns, device=device) if hessian else None
        self._cross = torch.zeros(columns, columns, device=device) if cross else None
        self._square_sum = torch.zeros(columns, dtype=torch.float64, device=device)
        self._abs_sum = torch.zeros(columns, dtype=torch.float64, device=device)
        self._max_abs = torch.zeros(columns, device=device)
        self._sample_tokens = sample_tokens
        self._upper_is_old = False
        self._stride = 1
        self._rows: list[torch.Tensor] = []

    def update(self, x: torch.Tensor, reference: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: [..., K], floating point.
            reference: the same tokens on the reference path, x's shape; needed when cross moments are kept.

        Raises:
            FormatError: another width, NaN or infinite values, or no reference for the cross moments.
        """
        rows = x.reshape(-1, x.shape[-1]).float()
        if rows.shape[1] != self.columns:
            raise FormatError(f"an input of width {rows.shape[1]} was given to statistics of width {self.columns}")
        if rows.shape[0] == 0:
            return
        absolute = rows.abs()
        largest = absolute.amax(dim=0)
        if not bool(torch.isfinite(largest).all()):
            raise FormatError(
                "a calibration input has NaN or infinite values", "the model overflows on this text: use a wider working precision"
            )
        if self._hessian is not None:
            self._add_lower(rows)
        if self._cross is not None:
            if reference is None:
                raise FormatError("cross moments need the inputs of the reference path, too")
            self._cross.addmm_((reference.reshape(rows.shape).float() - rows).T, rows)
        self._square_sum += rows.square().sum(dim=0, dtype=torch.float64)
        self._abs_sum += absolute.sum(dim=0, dtype=torch.float64)
        torch.maximum(self._max_abs, largest, out=self._max_abs)
        self._keep(rows)
        self.tokens += rows.shape[0]

    def _add_lower(self, rows: torch.Tensor) -> None:
        """x x^T is symmetric: only blocks on and below the diagonal are added up, which is nearly half the work where K is large."""
        assert self._hessian is not None
        for start in range(0, self.columns, _BLOCK_COLUMNS):
            stop = min(start + _BLOCK_COLUMNS, self.columns)
            self._hessian[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])
        self._upper_is_old = self.columns > _BLOCK_COLUMNS

    def _whole(self) -> torch.Tensor | None:
        """The sums of x x^T with the blocks above the diagonal brought up to date."""
        if self._hessian is not None and self._upper_is_old:
            for start in range(0, self.columns, _BLOCK_COLUMNS):
                stop = min(start + _BLOCK_COLUMNS, self.columns)
                self._hessian[:start, start:stop] = self._hessian[start:stop, :start].T
            self._upper_is_old = False
        return self._hessian

    def _keep(self, rows: torch.Tensor) -> None:
        """Every `_stride`-th token of the whole stream; when there are too many, every second one of them."""
        if self._sample_tokens == 0:
            return
        first = -self.tokens % self._stride
        self._rows.extend(row.clone() for row in rows[first :: self._stride])
        while len(self._rows) > self._sample_tokens:
            self._rows = self._rows[::2]
            self._stride *= 2

    @property
    def hessian(self) -> torch.Tensor | None:
        """H [K, K], float32, a new tensor; None when it is not kept."""
        whole = self._whole()
        return None if whole is None else whole / max(self.tokens, 1)

    @property
    def moments(self) -> torch.Tensor | None:
        """Sum over tokens of x x^T, [K, K], float32: the statistics' own tensor, not to be changed; None when it is not kept."""
        return self._whole()

    @property
    def cross_moments(self) -> torch.Tensor | None:
        """Sum over tokens of (x' - x) x^T, [K, K], float32: the statistics' own tensor, not to be changed; None when it is not kept."""
        return self._cross

    @property
    def cross(self) -> torch.Tensor | None:
        """C [K, K], float32; None when it is not kept."""
        return None if self._cross is None else self._cross / max(self.tokens, 1)

    @property
    def mean_square(self) -> torch.Tensor:
        """[K], float32."""
        return (self._square_sum / max(self.tokens, 1)).float()

    @property
    def mean_abs(self) -> torch.Tensor:
        """[K], float32."""
        return (self._abs_sum / max(self.tokens, 1)).float()

    @property
    def max_abs(self) -> torch.Tensor:
        """[K], float32."""
        return self._max_abs

    @property
    def sample(self) -> torch.Tensor:
        """[rows, K], float32; empty when no sample is kept."""
        return torch.stack(self._rows) if self._rows else torch.empty(0, self.columns, device=self._max_abs.device)

    @classmethod
    def pooled(cls, parts: Sequence[InputStatistics]) -> InputStatistics:
        """The statistics of all tokens together that several have seen, of one width; the parts are not changed.

        The sample is made of theirs, whatever share of the tokens each has seen.

        Raises:
            FormatError: other widths, or moments that only some of them keep.
        """
        first = parts[0]
        kept = {(part.columns, part._hessian is None, part._cross is None) for part in parts}
        if len(kept) > 1:
            raise FormatError("statistics of different kinds cannot be put together")
        result = cls(
            first.columns,
            hessian=first._hessian is not None,
            cross=first._cross is not None,
            sample_tokens=first._sample_tokens,
            device=str(first._max_abs.device),
        )
        for part in parts:
            for whole, added in ((result._hessian, part._whole()), (result._cross, part._cross)):
                if whole is not None and added is not None:
                    whole += added
            result.tokens += part.tokens
            result._square_sum += part._square_sum
            result._abs_sum += part._abs_sum
            torch.maximum(result._max_abs, part._max_abs, out=result._max_abs)
            result._rows += part._rows
        while len(result._rows) > result._sample_tokens:
            result._rows = result._rows[::2]
        return result

    def scaled(self, scale: torch.Tensor) -> InputStatistics:
        """The statistics of x / scale, exact but for rounding: what follows after a per-channel scale has been folded in front.

        Args:
            scale: [K], positive.
        """
        result = InputStatistics(self.columns, sample_tokens=self._sample_tokens, device=str(self._max_abs.device))
        inverse = 1.0 / scale.float()
        outer = torch.outer(inverse, inverse)
        result.tokens, result._stride = self.tokens, self._stride
        whole = self._whole()
        result._hessian = None if whole is None else whole * outer
        result._cross = None if self._cross is None else self._cross * outer
        result._square_sum = self._square_sum * inverse.double().square()
        result._abs_sum = self._abs_sum * inverse.double()
        result._max_abs = self._max_abs * inverse
        result._rows = [row * inverse for row in self._rows]
        return result
