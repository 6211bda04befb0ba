"""The same weight in another format, without rounding it again: what `convert` does to each linear.

A grid is contained in another one more often than not, and then only the notation changes:

    symmetric -> affine         the zero point is 0
    affine -> symmetric         where all zero points are 0; or into more bits: q - z fits there with the zero point taken off
    b bits -> more bits         the same integers
    per tensor -> per channel -> groups -> smaller groups that divide them         scales are repeated
    dtype of the scales         exact where the new dtype holds the number, and that is looked at, number by number

What is not contained is not made up: NF4 into INT4, or groups of 32 into groups of 128, would round the weights a second time, and
`express` refuses. The one thing that may change is a scale that the new dtype cannot hold (FP16 keeps eleven bits of it and BF16 eight, and
FP16 ends at 6e-8), and `Expressed` counts those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fewbit.checkpoints.layout import torch_dtype
from fewbit.errors import FormatError
from fewbit.formats.grouping import scale_shape
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["Expressed", "express"]

_PLAIN_SCALES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Expressed:
    """A weight in another format.

    Attributes:
        tensor: the weight.
        scales: how many it has. rounded_scales: how many of the source's scales the new dtype could not hold.
        worst: the largest relative change of a scale; 0 when none changed.
    """

    tensor: QuantizedTensor
    scales: int
    rounded_scales: int
    worst: float


def express(q: QuantizedTensor, spec: QuantSpec) -> Expressed:
    """A quantized weight in another format, integers and zero points exactly, scales as well as the format's dtype allows.

    Args:
        q: the weight; not changed.
        spec: the format to put it in.

    Raises:
        FormatError: the format does not contain the weight's grid; the message says what is in the way.
    """
    if (q.spec.type, q.spec.exponent_bits) != (spec.type, spec.exponent_bits) or q.spec.global_scale != spec.global_scale:
        raise FormatError(f"{q.spec} is not contained in {spec}: the weights would be rounded a second time")
    if q.g_idx is not None and q.spec != spec:
        raise FormatError("its columns are out of order (act-order), and another notation would need them in order")
    scale, rounded, worst = _scales(q, spec)
    values, zero_point = _integers(q, spec) if spec.type == "int" else (q.values, None)
    if spec.type != "int" and q.spec.num_bits != spec.num_bits:
        raise FormatError(f"{q.spec} is not contained in {spec}")
    repeat = _repeats(q, spec)
    expanded = repeat(scale)
    zero = None if zero_point is None else repeat(zero_point)
    return Expressed(replace(q, values=values, scale=expanded, zero_point=zero, spec=spec), scale.numel(), rounded, worst)


def _scales(q: QuantizedTensor, spec: QuantSpec) -> tuple[torch.Tensor, int, float]:
    """The stored scales in the dtype of `spec`, how many changed, and the largest relative change."""
    if q.spec.scale_dtype == spec.scale_dtype:
        return q.scale, 0, 0.0
    if q.spec.scale_dtype not in _PLAIN_SCALES or spec.scale_dtype not in _PLAIN_SCALES:
        raise FormatError(f"scales in {q.spec.scale_dtype} have no equals in {spec.scale_dtype}")
    new = q.scale.to(torch_dtype(spec.scale_dtype))
    if not bool(new.float().isfinite().all()):
        raise FormatError(f"a scale of {float(q.scale.float().abs().max()):.4g} is beyond {spec.scale_dtype}")
    before, after = q.scale.double(), new.double()
    changed = before != after
    if not bool(changed.any()):
        return new, 0, 0.0
    relative = ((after - before).abs() / before.abs().clamp_min(torch.finfo(torch.float32).tiny))[changed]
    return new, int(changed.sum()), float(relative.max())


def _integers(q: QuantizedTensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and zero points in the new format, not repeated yet."""
    if spec.num_bits < q.spec.num_bits:
        raise FormatError(f"{q.spec} does not fit into {spec.num_bits} bits")
    if q.zero_point is None:
        return q.values, None if spec.symmetric else torch.zeros(q.scale.shape, dtype=torch.int8)
    if not spec.symmetric:
        return q.values, q.zero_point
    if not bool(q.zero_point.any()):
        return q.values, None
    per_column = _repeats(q, QuantSpec(q.spec.num_bits, strategy="group", group_size=1))(q.zero_point)
    shifted = q.values.to(torch.int16) - per_column
    if int(shifted.abs().max()) > 2 ** (spec.num_bits - 1) - 1:
        raise FormatError(f"it has zero points, which {spec} lacks, and its integers do not fit without them")
    return shifted.to(torch.int8), None


class _Repeat:
    """Scales or zero points [rows, groups] repeated into a finer grouping."""

    def __init__(self, rows: int, columns: int) -> None:
        self._rows, self._columns = rows, columns

    def __call__(self, scale: torch.Tensor) -> torch.Tensor:
        rows, columns = self._rows // scale.shape[0], self._columns // scale.shape[1]
        if (rows, columns) == (1, 1):
            return scale
        return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _repeats(q: QuantizedTensor, spec: QuantSpec) -> _Repeat:
    """How one grouping becomes another.

    Raises:
        FormatError: the new groups are not parts of the old ones.
    """
    rows, columns = q.shape
    wanted, given = scale_shape(spec, rows, columns), (q.scale.shape[0], q.scale.shape[1])
    blocks = "block" in (q.spec.strategy, spec.strategy) and q.spec.block_shape != spec.block_shape
    if blocks or wanted[0] % given[0] or wanted[1] % given[1]:
        raise FormatError(f"scales of {q.spec} are no whole repetitions in {spec}: the weights would be rounded a second time")
    return _Repeat(*wanted)
