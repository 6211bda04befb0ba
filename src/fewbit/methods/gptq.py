"""GPTQ (arXiv 2210.17323): round column by column and let the columns that are still to come make up for the error.

For one row w of a weight and the inputs' second moments H, minimize over the grid

    e H e^T,   e = w - w_hat

Write H = R R^T with R upper triangular in the order of processing, U = R diag(R)^-1 (ones on the diagonal), D = diag(R)^2. Then

    e H e^T = sum_k D_k (e_k + sum_{j<k} e_j U_jk)^2                                               (1)

and column k, the columns before it given, is best rounded at

    w_hat_k = Q(t_k),   t_k = w_k + sum_{j<k} e_j U_jk                                              (2)

which is GPTQ's update in the form of QuIP's LDLQ (arXiv 2307.13304, theorem 6) and of Babai's nearest plane. The paper inverts H and takes
the Cholesky factor of the inverse; (2) needs the factor of H alone: a quarter of the arithmetic, and no inverse of a nearly singular
matrix. What is left of (1) is sum_k D_k (t_k - w_hat_k)^2, so the objective comes for free.

What goes beyond the paper, each measured to help (docs/log.md):

- **Scale search.** (1) says what a rounding error in column k costs after all later columns have done what they can: D_k, not H_kk. The
  MSE search of scales is weighted with D.
- **Compensation of the input's error** (GPTAQ, arXiv 2504.02692). The inputs x of a linear come from layers that are quantized already; the
  full-precision model would feed x'. The wanted output is W x', and among all real weights W + W C (H + damping)^-1
  with C = E[(x' - x) x^T] gives it best. (What is left is orthogonal to x, so that (1) stays the right objective.)

**Order** (`actorder`). Columns with the largest H_kk first, while many columns can still compensate: `static` keeps the groups where they
are in memory, `dynamic` forms the groups in the order of processing (each scale is computed when its group begins, from the updated
weights) and needs a group index per column in the checkpoint; `none` goes from left to right.

**Damping.** `dampening` times the mean of diag(H) is added to it; when the factorization fails, ten times as much, and again.
Columns that no calibration token used have H_kk = 0: they are rounded to nearest and take part in nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

import torch

from fewbit.errors import FormatError
from fewbit.formats.grids import round_to_grid
from fewbit.formats.grouping import check_matrix
from fewbit.formats.quantize import quantize
from fewbit.formats.scales import Observer, compute_scales, scale_as_float
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.methods.permute import gather_transposed, scatter_transposed
from fewbit.methods.statistics import InputStatistics

__all__ = ["ActOrder", "GPTQResult", "GPTQSettings", "gptq"]

ActOrder: TypeAlias = Literal["none", "static", "dynamic"]
_ESCALATIONS = (1.0, 10.0, 100.0)
_OUTER, _INNER = 256, 32  # columns between two products with all earlier errors, and between two with those of the same outer block


@dataclass(frozen=True)
class GPTQSettings:
    """How GPTQ rounds.

    Attributes:
        actorder: order of the columns, see the module's header.
        dampening: share of the mean of diag(H) that is added to it.
        observer: how scales are chosen: `mse` searches them under the weights D of the header, `minmax` is what the paper does.
        compensation: share of the input's error that is compensated, 0 to 1; needs cross moments in the statistics when not 0.

    Raises:
        FormatError: a value that cannot be meant.
    """

    actorder: ActOrder = "static"
    dampening: float = 0.01
    observer: Observer = "mse"
    compensation: float = 0.0

    def __post_init__(self) -> None:
        if self.actorder not in ("none", "static", "dynamic"):
            raise FormatError(f"there is no column order '{self.actorder}'", "choose none, static or dynamic")
        if not 0.0 < self.dampening < float("inf"):
            raise FormatError(f"a dampening of {self.dampening} cannot be meant", "choose a small positive number, 0.01 for example")
        if not 0.0 <= self.compensation <= 1.0:
            raise FormatError(f"a compensation of {self.compensation} cannot be meant", "choose a number from 0 to 1")


@dataclass(frozen=True)
class GPTQResult:
    """One rounded weight.

    Attributes:
        quantized: the weight [out, in].
        dampening: what was needed in the end.
        dead_columns: columns that no calibration token used.
        objective: sum over rows of (1): the squared error of the layer's output that is left, mean over tokens, damping included.
    """

    quantized: QuantizedTensor
    dampening: float
    dead_columns: int
    objective: float


@dataclass(frozen=True)
class _Factor:
    """H + damping = R R^T in the order of processing, held backwards so that LAPACK's lower factor serves.

    Attributes:
        backwards: int64 [K]: column of the weight at each position; the last position is processed first.
        unit: U of the header at the same positions, [K, K], lower triangular: what an error at row j adds to the target at column i < j.
        variance: D at the same positions, [K].
        dampening: what was needed. dead: columns without any input.
    """

    backwards: torch.Tensor
    unit: torch.Tensor
    variance: torch.Tensor
    dampening: float
    dead: int


def gptq(
    weights: Sequence[torch.Tensor], spec: QuantSpec, statistics: InputStatistics, settings: GPTQSettings | None = None
) -> list[GPTQResult]:
    """Round all weights that read one input.

    Args:
        weights: each [out, K], floating point; not changed. They share the factorization and the loop over columns.
        spec: the weights' number format; any strategy.
        statistics: of the input, with second moments, and cross moments when the settings compensate.

    Returns:
        One result per weight, in their order.

    Raises:
        FormatError: a weight does not fit the format, the statistics lack what is needed or saw no token, `dynamic` order without
            groups, or a matrix of second moments that cannot be factorized even with 100 times the dampening.
    """
    settings = settings or GPTQSettings()
    for weight in weights:
        check_matrix(weight, spec)
        if weight.shape[1] != statistics.columns:
            raise FormatError(f"a weight of {weight.shape[1]} columns was given with statistics of {statistics.columns} inputs")
    if settings.actorder == "dynamic" and spec.strategy != "group":
        raise FormatError(f"the column order 'dynamic' forms groups, and {spec} has none", "choose static or none")
    factor = _factorize(statistics, settings)
    targets = _targets(weights, statistics, factor, settings)
    if settings.actorder == "dynamic":
        return _round_dynamic(weights, targets, spec, factor, settings)
    return _round_static(weights, targets, spec, factor, settings)


# --------------------------------------------------------------------------------------------------------------- factor


def _factorize(statistics: InputStatistics, settings: GPTQSettings) -> _Factor:
    moments = statistics.moments
    if moments is None or statistics.tokens == 0:
        raise FormatError("GPTQ needs second moments of the inputs", "gather statistics with hessian=True over at least one token")
    diagonal = moments.diagonal() / statistics.tokens
    dead = diagonal <= 0
    if settings.actorder == "none":
        order = torch.arange(len(diagonal), device=diagonal.device)
    else:
        order = torch.argsort(diagonal, descending=True, stable=True)
    backwards = order.flip(0)
    mean = float(diagonal.mean()) or 1.0
    for times in _ESCALATIONS:
        dampening = settings.dampening * times
        matrix = gather_transposed(moments, backwards, backwards).div_(statistics.tokens)  # of a symmetric matrix
        matrix.diagonal().add_(dampening * mean)
        lower = matrix.mT  # the same symmetric matrix, in the column-major order that LAPACK factorizes in place
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        root = lower.diagonal().clone()
        if int(info) == 0 and bool(torch.isfinite(root).all()) and float(root.min()) > 0:
            lower.div_(root)  # column by column
            return _Factor(backwards, lower, root.square(), dampening, int(dead.sum()))
    raise FormatError(
        f"the second moments of the inputs cannot be factorized, not even with a dampening of {dampening:g}",
        "use more calibration text, or another method for this layer",
    )


def _targets(weights: Sequence[torch.Tensor], statistics: InputStatistics, factor: _Factor, settings: GPTQSettings) -> torch.Tensor:
    """What to come close to, [K, rows of all weights], float32, columns backwards; transposed, so that a column is contiguous."""
    stacked = torch.cat([weight.float() for weight in weights])
    if settings.compensation:
        cross = statistics.cross_moments
        if cross is None:
            raise FormatError(
                "compensation needs cross moments of the inputs", "gather statistics with cross=True, or set compensation to 0"
            )
        wanted = gather_transposed((stacked @ cross).mul_(settings.compensation / statistics.tokens), factor.backwards)
        # (H + damping) = U D U^T, at the same positions: two triangular systems
        half = torch.linalg.solve_triangular(factor.unit, wanted, upper=False, unitriangular=True)
        half /= factor.variance[:, None]
        shift = torch.linalg.solve_triangular(factor.unit.mT, half, upper=True, unitriangular=True)
        return gather_transposed(stacked, factor.backwards).add_(shift)
    return gather_transposed(stacked, factor.backwards)


# ---------------------------------------------------------------------------------------------------------------- rounding


def _corrected(targets: torch.Tensor, errors: torch.Tensor, factor: _Factor, span: slice) -> torch.Tensor:
    """Targets at the positions `span`, [columns, rows], with the errors of everything behind it made up for; a new tensor."""
    return torch.addmm(targets[span], factor.unit[span.stop :, span].mT, errors[span.stop :])


def _round_span(current: torch.Tensor, targets: torch.Tensor, errors: torch.Tensor, factor: _Factor, span: slice, grid: _Grid) -> None:
    """Round the columns at the positions `span`, the last one first.

    Args:
        current: [columns of the span, rows] from `_corrected`; destroyed.
        targets: [K, rows]; the span's rows are overwritten with the rounded weights. errors: [K, rows]; the span's rows are filled in.
        grid: what a column is rounded to; its `objective` is added to.
    """
    for stop in range(span.stop, span.start, -_INNER):
        inner = slice(max(stop - _INNER, span.start), stop)
        block = current[inner.start - span.start : stop - span.start]
        if stop < span.stop:
            block.addmm_(factor.unit[stop : span.stop, inner].mT, errors[stop : span.stop])
        feedback = factor.unit[inner, inner].contiguous()
        for i in range(inner.stop - inner.start - 1, -1, -1):
            position = inner.start + i
            rounded = grid.nearest(block[i], position)
            grid.objective.add_(block[i].sub_(rounded).square_(), alpha=float(factor.variance[position]))
            torch.sub(targets[position], rounded, out=errors[position])
            targets[position] = rounded
            if i:
                block[:i].addr_(feedback[i, :i], errors[position])


class _Grid:
    """What the columns of several stacked weights are rounded to.

    Args:
        spec: the number format. rows: of all weights together. group_of_position: [K] row of `scale` for each position.

    Attributes:
        scale, zero_point: float32 [groups, rows], expanded to one per row whatever shares a scale; zero_point None when symmetric.
        objective: [rows], each row's part of (1) so far.
    """

    def __init__(self, spec: QuantSpec, rows: int, group_of_position: torch.Tensor) -> None:
        self.spec = spec
        self.scale = torch.empty(0)
        self.zero_point: torch.Tensor | None = None
        self.objective = torch.zeros(rows, device=group_of_position.device)
        self._group = group_of_position.tolist()

    def nearest(self, target: torch.Tensor, position: int) -> torch.Tensor:
        """`target` [rows] at the column of that position, rounded, in the weight's units."""
        spec, scale = self.spec, self.scale[self._group[position]]
        scaled = target / scale
        if self.zero_point is None:
            return round_to_grid(scaled, spec).mul_(scale)
        zero = self.zero_point[self._group[position]]
        return round_to_grid(scaled.round_().add_(zero), spec).sub_(zero).mul_(scale)


_Scales: TypeAlias = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _expanded(scale: torch.Tensor, spec: QuantSpec, rows: int) -> torch.Tensor:
    """[grid of scales] -> [rows, groups], float32: one scale per row, whatever rows share."""
    height = {"tensor": rows, "block": (spec.block_shape or (1, 1))[0]}.get(spec.strategy, 1)
    return scale.float().repeat_interleave(height, 0)[:rows]


def _round_static(
    weights: Sequence[torch.Tensor], targets: torch.Tensor, spec: QuantSpec, factor: _Factor, settings: GPTQSettings
) -> list[GPTQResult]:
    """All scales first, from the targets; then the columns."""
    columns = len(factor.backwards)
    importance = factor.variance[torch.argsort(factor.backwards)] if settings.observer == "mse" else None
    slices = _row_slices(weights)
    chosen: list[_Scales] = []
    for weight, rows in zip(weights, slices, strict=True):
        wanted = scatter_transposed(targets, rows, factor.backwards) if settings.compensation else weight
        chosen.append(compute_scales(wanted, spec, observer=settings.observer, importance=importance))

    width = {"group": spec.group_size, "block": (spec.block_shape or (1, columns))[1]}.get(spec.strategy) or columns
    grid = _Grid(spec, targets.shape[1], factor.backwards // width)
    steps = [_expanded(scale_as_float(scale, spec, total), spec, len(w)) for w, (scale, _, total) in zip(weights, chosen, strict=True)]
    zeros = [_expanded(zero, spec, len(w)) for w, (_, zero, _) in zip(weights, chosen, strict=True) if zero is not None]
    grid.scale = torch.cat(steps).T.contiguous()
    grid.zero_point = torch.cat(zeros).T.contiguous() if zeros else None

    errors = torch.empty_like(targets)
    for stop in range(columns, 0, -_OUTER):
        span = slice(max(stop - _OUTER, 0), stop)
        _round_span(_corrected(targets, errors, factor, span), targets, errors, factor, span, grid)
    del errors
    results = []
    for rows, (scale, zero_point, global_scale) in zip(slices, chosen, strict=True):
        rounded = scatter_transposed(targets, rows, factor.backwards)
        quantized = quantize(rounded, spec, scale=scale, zero_point=zero_point, global_scale=global_scale)
        results.append(GPTQResult(quantized, factor.dampening, factor.dead, float(grid.objective[rows].sum())))
    return results


def _round_dynamic(
    weights: Sequence[torch.Tensor], targets: torch.Tensor, spec: QuantSpec, factor: _Factor, settings: GPTQSettings
) -> list[GPTQResult]:
    """Group by group in the order of processing; a group's scales come from what is left to round when it begins."""
    columns, size = len(factor.backwards), spec.group_size or 0
    number = (columns - 1 - torch.arange(columns, device=targets.device)) // size  # the group at each position: 0 is processed first
    grid = _Grid(spec, targets.shape[1], torch.zeros_like(number))
    errors, chosen = torch.empty_like(targets), []
    for stop in range(columns, 0, -size):
        span = slice(stop - size, stop)
        current = _corrected(targets, errors, factor, span)
        importance = factor.variance[span] if settings.observer == "mse" else None
        scale, zero_point, _ = compute_scales(current.T, spec, observer=settings.observer, importance=importance)
        chosen.append((scale, zero_point))
        grid.scale, grid.zero_point = scale.float().T, None if zero_point is None else zero_point.float().T
        _round_span(current, targets, errors, factor, span, grid)
    del errors
    inverse = torch.argsort(factor.backwards)
    g_idx = number[inverse].to(torch.int32)
    scales = torch.cat([scale for scale, _ in chosen], dim=1)
    zeros = None if spec.symmetric else torch.cat([zero for _, zero in chosen if zero is not None], dim=1)
    results = []
    for rows in _row_slices(weights):
        rounded = scatter_transposed(targets, rows, factor.backwards)
        quantized = quantize(rounded, spec, scale=scales[rows], zero_point=None if zeros is None else zeros[rows], g_idx=g_idx)
        results.append(GPTQResult(quantized, factor.dampening, factor.dead, float(grid.objective[rows].sum())))
    return results


def _row_slices(weights: Sequence[torch.Tensor]) -> list[slice]:
    """Where each weight's rows are in the stack."""
    ends = list(accumulate(len(weight) for weight in weights))
    return [slice(end - len(weight), end) for weight, end in zip(weights, ends, strict=True)]
