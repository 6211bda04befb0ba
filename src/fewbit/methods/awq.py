"""AWQ, activation-aware weight quantization (arXiv 2306.00978): before rounding, scale up the input channels that matter.

Rounding to few bits errs by about as much in each column of a weight, but an error in column k reaches the output multiplied by x_k. So
the columns whose inputs are large are multiplied by s_k > 1, and the inputs divided by it:

    W x  ~  Q(W diag(s)) (diag(s)^-1 x)

A column that is scaled up is rounded more finely relative to its size, as long as it does not widen the range of its group. How far to go
is a trade between the columns of a group, and it is searched: s comes from a family of candidates with one exponent, and the exponent with
the least error of the layers' outputs wins. No forward pass is needed for that. With D = Q(W diag(s)) diag(s)^-1 - W, the mean squared
error of the output over the calibration tokens is exactly

    tr(D H D^T),   H = mean_t x_t x_t^T

Candidates, with a_k = mean|x_k| and w_k the mean over the group's linears of |W_jk| over the largest of its row or group:

    activation       s = a^r                       r in [0, 1]: the paper
    duo              s = a^r / w^(1 - r)           AWQ's code and llm-compressor's: columns with large weights are scaled less

normalized by sqrt(max s * min s), which leaves the rounding as it is. All linears that read the same input share s, and so a search.

Large layers. The trace costs rows * K^2 for each candidate. It is a sum over rows and a mean over tokens, so a regular sample of rows and a
seeded Gaussian sketch of H (n vectors z_i with mean z_i z_i^T = H) estimate it without bias at rows_sampled * K * n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fewbit.errors import FormatError
from fewbit.formats.quantize import dequantize
from fewbit.formats.scales import Observer
from fewbit.formats.spec import QuantSpec
from fewbit.methods.folding import shared
from fewbit.methods.moments import moments_factor
from fewbit.methods.rtn import rtn
from fewbit.methods.statistics import InputStatistics

__all__ = ["AWQResult", "AWQSettings", "awq_scales"]


@dataclass(frozen=True)
class AWQSettings:
    """How the scales are searched.

    Attributes:
        grid_points: exponents that are tried, evenly over [0, 1], for each form of candidate.
        duo: also try the candidates that look at the weights.
        observer: how the candidates are rounded during the search.
        most_rows: rows of a group's weights, all together, that the error is taken over.
        sketch: vectors that stand for H in layers wider than that; narrower ones use H itself.
        seed: of the sketch.
    """

    grid_points: int = 20
    duo: bool = True
    observer: Observer = "mse"
    most_rows: int = 512
    sketch: int = 512
    seed: int = 0


@dataclass(frozen=True)
class AWQResult:
    """What the search found.

    Attributes:
        scale: float32 [K]; W diag(scale) is to be quantized and x / scale to be fed. Ones when nothing was better than that.
        form: `activation`, `duo` or `none`.
        exponent: r of the module's header.
        error_before, error_after: relative output error of the group, sqrt(tr(D H D^T) / tr(W H W^T)), for scale 1 and for `scale`; as
            the search saw it.
    """

    scale: torch.Tensor
    form: str
    exponent: float
    error_before: float
    error_after: float


def awq_scales(
    weights: Sequence[torch.Tensor],
    spec: QuantSpec,
    statistics: InputStatistics,
    settings: AWQSettings | None = None,
    *,
    channels: torch.Tensor | None = None,
) -> AWQResult:
    """Search the scale of the input channels of all linears that read the same input.

    Args:
        weights: [out_i, K] each, floating point; not changed.
        spec: the format that they will be rounded to.
        statistics: of the common input, with second moments or a sample.
        settings: see AWQSettings.
        channels: int64 [K]: columns with the same number get the same scale, because one channel of what is in front feeds them all
            (grouped-query attention); None when each column has its own.

    Raises:
        FormatError: weights of other widths than the statistics, or statistics with neither second moments nor a sample.
    """
    settings = settings or AWQSettings()
    objective = OutputError(weights, spec, statistics, settings)
    before = objective(torch.ones(statistics.columns))
    best = AWQResult(torch.ones(statistics.columns), "none", 0.0, before, before)
    for form, exponent, scale in _candidates(weights, spec, statistics, settings, channels):
        error = objective(scale)
        if error < best.error_after:
            best = AWQResult(scale, form, exponent, before, error)
    return best


class OutputError:
    """Relative output error of a group of linears as a function of the input channels' scale.

    Args:
        weights, spec, statistics, settings: as in `awq_scales`.
    """

    def __init__(self, weights: Sequence[torch.Tensor], spec: QuantSpec, statistics: InputStatistics, settings: AWQSettings) -> None:
        if not weights or any(w.ndim != 2 or w.shape[1] != statistics.columns for w in weights):
            raise FormatError(f"the weights {[list(w.shape) for w in weights]} do not read an input of width {statistics.columns}")
        self._spec, self._observer = spec, settings.observer
        self._weights = _sampled_rows(weights, spec, settings.most_rows)
        self._factor = moments_factor(statistics, vectors=settings.sketch, seed=settings.seed)
        self._mean_square = statistics.mean_square
        self._energy = sum(self._squares(w) for w in self._weights)

    def _squares(self, matrix: torch.Tensor) -> float:
        """tr(M H M^T), or its estimate."""
        return float((matrix @ self._factor).square().sum(dtype=torch.float64))

    def __call__(self, scale: torch.Tensor) -> float:
        """sqrt(tr(D H D^T) / tr(W H W^T)) for the scale [K]."""
        total = 0.0
        importance = self._mean_square / scale.square()
        for weight in self._weights:
            rounded = dequantize(rtn(weight * scale, self._spec, observer=self._observer, importance=importance))
            total += self._squares(rounded.div_(scale).sub_(weight))
        return math.sqrt(total / max(self._energy, 1e-30))


def _sampled_rows(weights: Sequence[torch.Tensor], spec: QuantSpec, most_rows: int) -> list[torch.Tensor]:
    """Every n-th row of each weight, float32; all rows where rows share scales."""
    if spec.strategy in ("tensor", "block"):
        return [w.float() for w in weights]
    step = max(1, -(-sum(w.shape[0] for w in weights) // most_rows))
    return [torch.cat([w[step // 2 :: step] if w.shape[0] > step // 2 else w[:1] for w in weights]).float()]


def _candidates(
    weights: Sequence[torch.Tensor], spec: QuantSpec, statistics: InputStatistics, settings: AWQSettings, channels: torch.Tensor | None
) -> Iterator[tuple[str, float, torch.Tensor]]:
    """(form, exponent, scale [K]) of everything that is tried."""
    activation = _positive(statistics.mean_abs)
    weight = _positive(_weight_magnitude(weights, spec))
    if channels is not None:
        count = int(channels.max()) + 1
        activation = shared(activation, channels, count, reduce="mean")[channels]
        weight = shared(weight, channels, count, reduce="mean")[channels]
    for point in range(settings.grid_points + 1):
        exponent = point / settings.grid_points
        if point:
            yield "activation", exponent, _normalized(activation**exponent)
        if settings.duo:
            yield "duo", exponent, _normalized(activation**exponent / weight ** (1 - exponent))


def _weight_magnitude(weights: Sequence[torch.Tensor], spec: QuantSpec) -> torch.Tensor:
    """[K]: mean over the rows of all linears of |W_jk| / the largest of its group in the row."""
    total, rows = torch.zeros(weights[0].shape[1]), 0
    size = spec.group_size or weights[0].shape[1]
    for weight in weights:
        for part in torch.split(weight, 1024):
            groups = part.float().abs().reshape(part.shape[0], -1, size)
            total += (groups / groups.amax(-1, keepdim=True).clamp_min(1e-30)).sum(0).reshape(-1)
            rows += part.shape[0]
    return total / rows


def _positive(values: torch.Tensor) -> torch.Tensor:
    """Dead channels get the least of the others: they have no say and must not spread the scales."""
    least = values[values > 0].min() if bool((values > 0).any()) else torch.ones(())
    return values.clamp_min(float(least))


def _normalized(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.clamp(1e-4, 1e4)
    return scale / (scale.max() * scale.min()).sqrt()
