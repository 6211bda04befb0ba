"""HQQ, half-quadratic quantization (Badri & Shaji 2023): better zero points and scales from the weight alone, no calibration data.

A few weights lie far from the rest. Squared error lets them decide the scale; HQQ minimizes a norm that forgives them,

    min over z, s   sum |W - s (q - z)|^p,     p = 0.7,     q = clamp(round(W / s) + z)

and splits it in two that are easy (Geman & Yang's half-quadratic trick): with an extra variable E for the part of the error that is
forgiven,

    E <- shrink(R),  R = W - s (q - z)       shrink(r) = sign(r) max(0, |r| - |r|^(p-1) / beta)         the proximal step for |.|^p
    z <- mean(q - (W - E) / s)               affine formats, the paper's step; the scale stays
    s <- <q, W - E> / <q, q>                 symmetric formats, the same step for the scale: least squares against what is not forgiven
    beta <- kappa beta                       less and less is forgiven

**What differs from the paper.** The published method stores z as a float. fewbit's formats have integer zero points, packed like the
values, as most layouts do. So z is rounded in every step, and both neighbours are tried. From a min-max scale an integer z has nowhere
better to go (on the reference model the result is min-max's, W3A16-ASYM: KL 0.184 both); each group therefore starts from its min-max and
from its least-squares scale, and keeps the best it has seen. So the result is never worse in the objective above than either.

The affine scale stays on purpose. Moved by the step above it lowers the objective further, by forgiving more outliers than a network
does: W3A16-ASYM on the reference model KL 0.252, against 0.150 with the scale kept and 0.154 for RTN with MSE scales.

Symmetric formats have only the scale, and there the same holds at three bits and fewer (W3A16: KL 0.177, with MSE scales 0.148): HQQ is
here because it is asked for, and MSE scales are the better choice where its norm is not wanted for its own sake (docs/log.md).

Errors are measured in steps (W / s), so that beta means the same for every weight. (On raw weights of the usual size the published
beta = 10 makes the threshold larger than any error: E is 0, and p has no effect.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fewbit.errors import FormatError, UsageError
from fewbit.formats.grouping import row_chunks, to_groups
from fewbit.formats.quantize import quantize
from fewbit.formats.scales import compute_scales, round_scale
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["HQQSettings", "hqq", "hqq_objective"]

_FLOAT_SCALES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HQQSettings:
    """How the search goes.

    Attributes:
        p: the norm's exponent, above 0 and at most 1.
        beta: how much of an error is forgiven at first (the more the smaller); in units of one step to the power of 2 - p.
        kappa: beta grows by this factor in each iteration.
        iterations: from each start.

    Raises:
        UsageError: values that make no sense.
    """

    p: float = 0.7
    beta: float = 5.0
    kappa: float = 1.2
    iterations: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1 or self.beta <= 0 or self.kappa < 1 or self.iterations < 1:
            raise UsageError(f"these settings of HQQ cannot be meant: {self}", "0 < p <= 1, beta > 0, kappa >= 1, at least one iteration")


@dataclass
class _State:
    """One candidate per group: the stored scale and the zero point (0 when symmetric), float32, the scales' shape with a 1 behind."""

    scale: torch.Tensor
    zero: torch.Tensor


def hqq(weight: torch.Tensor, spec: QuantSpec, settings: HQQSettings | None = None) -> QuantizedTensor:
    """Quantize one weight by HQQ.

    Args:
        weight: [out, in], floating point; not changed.
        spec: an integer format with float scales, symmetric or affine, of any strategy.
        settings: the defaults when None.

    Raises:
        FormatError: the weight does not fit the format, or the format is none of the kind.
    """
    if spec.type != "int" or spec.scale_dtype not in _FLOAT_SCALES:
        raise FormatError(f"HQQ chooses scales and zero points of integers, not of {spec}", "use rtn with MSE scales for this format")
    settings = settings or HQQSettings()
    starts = [compute_scales(weight, spec, observer=observer)[:2] for observer in ("minmax", "mse")]
    rows, columns = weight.shape
    shared = starts[0][0].shape[0] != rows
    found = []
    for chunk in row_chunks(spec, rows, columns):
        own = slice(None) if shared else chunk
        groups = to_groups(weight[chunk].float(), spec)
        states = [_State(scale[own].float().unsqueeze(-1), _as_float(zero, scale, own)) for scale, zero in starts]
        found.append(_search(groups, states, spec, settings))
    scale = torch.cat([state.scale.squeeze(-1) for state in found]).to(starts[0][0].dtype)
    zero_point = None if spec.symmetric else torch.cat([state.zero.squeeze(-1) for state in found]).to(torch.int8)
    return quantize(weight, spec, scale=scale, zero_point=zero_point)


def hqq_objective(weight: torch.Tensor, dequantized: torch.Tensor, p: float = 0.7) -> float:
    """sum |W - W_hat|^p over all weights."""
    return float((weight.float() - dequantized.float()).abs().pow(p).sum(dtype=torch.float64))


def _as_float(zero_point: torch.Tensor | None, scale: torch.Tensor, rows: slice) -> torch.Tensor:
    chosen = torch.zeros_like(scale[rows], dtype=torch.float32) if zero_point is None else zero_point[rows].float()
    return chosen.unsqueeze(-1)


def _search(groups: torch.Tensor, starts: list[_State], spec: QuantSpec, settings: HQQSettings) -> _State:
    """The best state per group that is seen on the way from the starts; groups [..., values], states [..., 1]."""
    best, least = starts[0], _objective(groups, starts[0], spec, settings.p)
    for start in starts:
        for state in _path(groups, start, spec, settings):
            objective = _objective(groups, state, spec, settings.p)
            better = objective < least
            least = torch.where(better, objective, least)
            best = _State(torch.where(better, state.scale, best.scale), torch.where(better, state.zero, best.zero))
    return best


def _path(groups: torch.Tensor, state: _State, spec: QuantSpec, settings: HQQSettings) -> Iterator[_State]:
    """The states that half-quadratic steps lead through, the start first. In the affine case each step yields the two roundings of z and
    goes on from the nearer."""
    yield state
    beta = settings.beta
    for _ in range(settings.iterations):
        codes = _codes(groups, state, spec)
        kept = groups - state.scale * _shrink(groups / state.scale - (codes - state.zero), settings.p, beta)  # W - E
        if spec.symmetric:
            state = _State(_least_squares(codes, kept, state.scale, spec), state.zero)
            yield state
        else:
            low, high = _range(spec)
            ideal = (codes - kept / state.scale).mean(-1, keepdim=True)
            below = ideal.floor()
            nearer = ideal.round().clamp_(low, high)
            other = torch.where(nearer > below, below, below + 1).clamp_(low, high)
            yield _State(state.scale, other)
            state = _State(state.scale, nearer)
            yield state
        beta *= settings.kappa


def _range(spec: QuantSpec) -> tuple[int, int]:
    return -(2 ** (spec.num_bits - 1)), 2 ** (spec.num_bits - 1) - 1


def _codes(groups: torch.Tensor, state: _State, spec: QuantSpec) -> torch.Tensor:
    return (groups / state.scale).round_().add_(state.zero).clamp_(*_range(spec))


def _shrink(error: torch.Tensor, p: float, beta: float) -> torch.Tensor:
    """The part of each error, in steps, that is forgiven."""
    size = error.abs()
    threshold = size.clamp_min(1e-6).pow_(p - 1).div_(beta)
    return size.sub_(threshold).clamp_min_(0.0).copysign_(error)


def _least_squares(steps: torch.Tensor, target: torch.Tensor, before: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The scale that brings steps * scale closest to target, as it is stored; where it says nothing (all steps 0) the one before."""
    norm = steps.square().sum(-1, keepdim=True)
    scale = (steps * target).sum(-1, keepdim=True) / norm.clamp_min(1e-30)
    # a negative scale of a signed start stays negative; one that has lost its sign is nothing
    usable = (norm > 0) & (scale * before > 0)
    stored = round_scale(scale.abs(), spec.scale_dtype).float() * before.sign()
    return torch.where(usable, stored, before)


def _objective(groups: torch.Tensor, state: _State, spec: QuantSpec, p: float) -> torch.Tensor:
    """sum |W - s (q - z)|^p per group, [..., 1]."""
    error = (_codes(groups, state, spec) - state.zero).mul_(state.scale).sub_(groups)
    return error.abs_().pow_(p).sum(-1, keepdim=True)
