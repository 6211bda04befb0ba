"""Clipping: the scale of each group of a weight, chosen for the least error of the layer's output.

AWQ (arXiv 2306.00978, section 3.2 and its code) shrinks the range of each group of weights and keeps the range whose rounded group gives
the outputs nearest to the exact ones. The search here is the same, in closed form and over the whole row. With the second moments H of
the inputs, the squared output error of a row with weight error d is d H d^T; as a function of the error in one group g, the others given,

    d_g H_gg d_g^T + 2 c_g d_g^T + const,      c_g = sum over the other groups h of d_h H_hg                           (1)

What matters are the entries of H off its diagonal. Activations have a few strong common directions (their mean is one), and of some dozens
of ranges, each of which rounds the group in its own way, one leaves an error that is nearly orthogonal to them. A measure that only weighs
columns by their mean square cannot see that; on the reference model this one halves the KL divergence of INT4 again.

For each range the codes q are computed (zero point taken off), and the scale is then moved to the best one for these very codes: (1) is a
parabola in the scale,

    error(s) = s^2 (q H_gg q^T) - 2 s (q H_gg w_g^T - c_g q^T) + const                                                 (2)

which is evaluated at the scale as it is stored. Codes are kept as they are: with correlated inputs the nearest grid point is not the best
one. Groups are visited from left to right, c_g holding the errors of those that are done; a second sweep knows all others, and tries the
ranges that lie between those of the first against what the first has found.

Cost: rows * K * (2 * group * candidates + 2 K * sweeps) multiplications. A group wider than `exact_width` (one scale per channel) takes a
sketch of H instead of H_gg.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbit.errors import FormatError
from fewbit.formats.grids import encode_values, round_to_grid
from fewbit.formats.grouping import CHUNK_ELEMENTS, check_matrix
from fewbit.formats.scales import compute_scales, round_scale, scale_as_float, scale_divisor, zero_points
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.methods.moments import moments_factor
from fewbit.methods.rtn import rtn
from fewbit.methods.statistics import InputStatistics

__all__ = ["ClipSettings", "clip"]

_FRACTIONS = (0.0, 0.5, 0.25, 0.75)  # where in a step between two ranges each sweep has its own
_SIGNED_UP_TO_BITS = 4  # a negative scale turns -8..7 over: see formats.scales


@dataclass(frozen=True)
class ClipSettings:
    """How the ranges are searched.

    Attributes:
        candidates: ranges per group (and sign) in each sweep, evenly between `narrowest` and `widest` times the min-max range.
        narrowest, widest: None for those that suit the number of bits.
        sweeps: how often each group is visited.
        shrinkage: share of H's off-diagonal that is not believed, for calibration with few tokens; None: from the number of tokens.
        exact_width: groups wider than that see a sketch of H with as many vectors.
        seed: of the sketch.
    """

    candidates: int = 12
    narrowest: float | None = None
    widest: float = 1.1
    sweeps: int = 2
    shrinkage: float | None = None
    exact_width: int = 512
    seed: int = 0


def clip(weight: torch.Tensor, spec: QuantSpec, statistics: InputStatistics, settings: ClipSettings | None = None) -> QuantizedTensor:
    """Quantize one weight with scales that are searched against the error of its outputs.

    Args:
        weight: [out, in], floating point; not changed.
        spec: per group or per channel; other strategies are rounded to nearest with MSE scales.
        statistics: of the weight's inputs, with second moments; per channel a sample will do.
        settings: see ClipSettings.

    Raises:
        FormatError: a weight that does not fit the format or the statistics, or statistics without second moments.
    """
    settings = settings or ClipSettings()
    check_matrix(weight, spec)
    if weight.shape[1] != statistics.columns:
        raise FormatError(f"a weight with {weight.shape[1]} input columns was given statistics of width {statistics.columns}")
    if spec.strategy not in ("group", "channel") or spec.type == "codebook" or spec.scale_dtype == "e8m0":
        return rtn(weight, spec, observer="mse", importance=statistics.mean_square)
    return _Clipping(weight, spec, statistics, settings).run()


class _Clipping:
    """The search over one weight.

    Attributes:
        error: [out, in], of the groups visited so far; the others have none yet.
    """

    def __init__(self, weight: torch.Tensor, spec: QuantSpec, statistics: InputStatistics, settings: ClipSettings) -> None:
        self.weight, self.spec, self.settings = weight.float(), spec, settings
        self.rows, self.columns = weight.shape
        self.size = spec.group_size or self.columns
        self.error = torch.zeros_like(self.weight)
        self.codes = torch.empty_like(self.weight)  # grid points; of affine formats with the zero point taken off
        groups = self.columns // self.size
        self.scales = torch.empty(self.rows, groups)
        self.zeros = None if spec.symmetric else torch.zeros(self.rows, groups, dtype=torch.int8)
        self.global_scale = compute_scales(weight, spec, observer="mse")[2] if spec.global_scale else None
        self.factor: torch.Tensor | None = None
        self.hessian: torch.Tensor | None = None
        if self.size > settings.exact_width:
            self.factor = moments_factor(statistics, vectors=settings.exact_width, seed=settings.seed)
        else:
            self.hessian = _believed(statistics, settings)

    def run(self) -> QuantizedTensor:
        for sweep in range(self.settings.sweeps if self.columns > self.size else 1):
            for group in range(self.columns // self.size):
                self._visit(group, sweep)
        stored = self.scales.to(round_scale(self.scales[:1].abs(), self.spec.scale_dtype).dtype)
        if self.zeros is not None:
            shifted = self.codes.view(self.rows, -1, self.size) + self.zeros.unsqueeze(-1)
            values = encode_values(shifted.view(self.rows, self.columns), self.spec)
        else:
            values = encode_values(self.codes, self.spec)
        return QuantizedTensor(values, stored, self.spec, self.zeros, None, self.global_scale)

    def _visit(self, group: int, sweep: int) -> None:
        """Choose the scale and the codes of one group in all rows, given the errors of the groups that are known."""
        columns = slice(group * self.size, (group + 1) * self.size)
        cross, known = None, self.columns if sweep else columns.start
        if self.hessian is None:
            assert self.factor is not None
            moments = self.factor[columns]
        else:
            moments = self.hessian[columns, columns].contiguous()
            if known:  # c_g of (1), [rows, size]; in the first sweep the errors of this group and of those behind it are still zero
                cross = torch.matmul(self.error[:, :known], self.hessian[columns, :known].T).sub_(self.error[:, columns] @ moments)
        candidates = self._starts(sweep)
        step = max(1, CHUNK_ELEMENTS // (self.size * len(candidates)))
        for first in range(0, self.rows, step):
            rows = slice(first, first + step)
            self._choose(rows, columns, candidates, moments, None if cross is None else cross[rows], again=sweep > 0)

    def _starts(self, sweep: int) -> torch.Tensor:
        """[candidates]: the ranges to try, relative to the min-max range; negative ones turn the grid over."""
        settings, spec = self.settings, self.spec
        narrowest = settings.narrowest if settings.narrowest is not None else {2: 0.25, 3: 0.4, 4: 0.55}.get(spec.num_bits, 0.8)
        count = settings.candidates
        between = (_FRACTIONS[sweep % len(_FRACTIONS)] + torch.arange(count)) / count
        factors = settings.widest + (narrowest - settings.widest) * between
        signed = spec.type == "int" and spec.symmetric and spec.num_bits <= _SIGNED_UP_TO_BITS
        return torch.cat([factors, -factors]) if signed else factors

    def _choose(
        self, rows: slice, columns: slice, factors: torch.Tensor, moments: torch.Tensor, cross: torch.Tensor | None, again: bool
    ) -> None:
        """The best of the ranges and, where a sweep has been there before (`again`), of what it has found.

        Args:
            factors: [c]. moments: H_gg, or the columns' part of the factor of H. cross: c_g of these rows.
        """
        weight, group = self.weight[rows, columns], columns.start // self.size  # [r, g]
        steps, zeros = self._steps(weight, factors)  # [c, r, 1], [c, r, 1] or None
        scaled = weight * (1 / steps)
        codes = round_to_grid(scaled if zeros is None else scaled.round_().add_(zeros), self.spec)
        if zeros is not None:
            codes -= zeros
        if again:
            codes = torch.cat([codes, self.codes[rows, columns].unsqueeze(0)])
            steps = torch.cat([steps, self._scale_in_use(rows, group)[None, :, None]])
            zeros = None if zeros is None or self.zeros is None else torch.cat([zeros, self.zeros[rows, group].float()[None, :, None]])
        square, product = self._parabola(codes, weight, moments, cross)
        best = product / square.clamp_min(torch.finfo(torch.float32).tiny)
        scale = self._stored(torch.where(square > 0, best, steps.squeeze(-1)), steps.squeeze(-1))
        gain = scale * (2 * product - scale * square)  # (2), turned round
        chosen = gain.argmax(dim=0)  # [r]
        each = torch.arange(weight.shape[0])
        picked, scale = codes[chosen, each], scale[chosen, each]
        self.codes[rows, columns] = picked
        self.error[rows, columns] = (picked * scale.unsqueeze(-1)).sub_(weight)
        self.scales[rows, group] = scale if self.global_scale is None else scale / self.global_scale
        if zeros is not None and self.zeros is not None:
            self.zeros[rows, group] = zeros[chosen, each, 0].to(torch.int8)

    def _scale_in_use(self, rows: slice, group: int) -> torch.Tensor:
        """float32 [r]: what the group's codes are multiplied with."""
        scale = self.scales[rows, group]
        return scale if self.global_scale is None else scale * self.global_scale

    def _steps(self, weight: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The scales [c, r, 1] that the codes are computed with, and zero points of that shape."""
        low, high = torch.aminmax(weight, dim=-1)
        low, high = low.clamp_max_(0.0), high.clamp_min_(0.0)
        factors = factors[:, None, None]
        if self.spec.symmetric:
            full = torch.maximum(-low, high) / scale_divisor(self.spec)
            return factors * torch.where(full > 0, full, 1.0)[:, None], None
        full = (high - low) / (2**self.spec.num_bits - 1)
        steps = factors * torch.where(full > 0, full, 1.0)[:, None]
        return steps, zero_points((low[:, None] * factors).contiguous(), steps, self.spec.num_bits).float()

    def _parabola(
        self, codes: torch.Tensor, weight: torch.Tensor, moments: torch.Tensor, cross: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q H q^T and q H w^T - c q^T, [c, r] each."""
        projected = codes @ moments
        if self.factor is not None:
            return projected.square().sum(-1), (projected * (weight @ moments)).sum(-1)
        wanted = weight @ moments if cross is None else (weight @ moments).sub_(cross)
        return projected.mul_(codes).sum(-1), (codes * wanted).sum(-1)

    def _stored(self, scale: torch.Tensor, started: torch.Tensor) -> torch.Tensor:
        """The scales as they will be read back, float32; where the best one has another sign than its codes', the one of the codes."""
        scale = torch.where(scale * started > 0, scale, started)
        size = scale.abs() if self.global_scale is None else scale.abs() / self.global_scale
        return scale_as_float(round_scale(size, self.spec.scale_dtype), self.spec, self.global_scale) * scale.sign()


def _believed(statistics: InputStatistics, settings: ClipSettings) -> torch.Tensor:
    """H [K, K] with its off-diagonal shrunk by what few tokens cannot tell."""
    hessian = statistics.hessian
    if hessian is None:
        raise FormatError("clipping needs the second moments of the inputs", "gather statistics with hessian=True")
    share = settings.shrinkage
    if share is None:
        share = 1.0 / (1.0 + statistics.tokens / 192)
    diagonal = hessian.diagonal().clone()
    hessian *= 1 - share
    hessian.diagonal().copy_(diagonal.clamp_min(1e-12 * float(diagonal.max()) + 1e-30))
    return hessian
