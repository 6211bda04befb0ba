"""Which values share a scale: one view for every granularity.

    strategy      scale shape                     values of one scale
    tensor        [1, 1]                          all
    channel       [out, 1]                        one row
    token         [out, 1]                        one row (of activations: one token)
    group         [out, in / group_size]          group_size neighbours in a row
    block         [ceil(out/r), ceil(in/c)]       an r x c rectangle; ragged edges are padded with zeros, which no scale notices

`to_groups` turns a [out, in] tensor into [*scale shape, values per scale], so that everything else is a reduction over the last dimension
or a product with `scale[..., None]`, and no other code knows about strategies. Only `block` copies; the others are views.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fewbit.errors import FormatError
from fewbit.formats.sizes import scale_shape
from fewbit.formats.spec import QuantSpec

__all__ = ["CHUNK_ELEMENTS", "check_matrix", "from_groups", "row_chunks", "scale_shape", "to_groups"]

CHUNK_ELEMENTS = 1 << 18  # 1 MiB of float32: temporaries stay in the cache and are not mapped afresh for every operator


def to_groups(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """[out, in] -> [*scale shape, values per scale]; a view, except for `block`."""
    rows, columns = x.shape
    shape = scale_shape(spec, rows, columns)
    if spec.block_shape is None:
        return x.reshape(*shape, -1)
    height, width = spec.block_shape
    padded = torch.nn.functional.pad(x, (0, shape[1] * width - columns, 0, shape[0] * height - rows))
    return padded.view(shape[0], height, shape[1], width).transpose(1, 2).reshape(*shape, height * width)


def from_groups(groups: torch.Tensor, spec: QuantSpec, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `to_groups`: [*scale shape, values per scale] -> [rows, columns]."""
    if spec.block_shape is None:
        return groups.reshape(rows, columns)
    height, width = spec.block_shape
    tall, wide = groups.shape[0], groups.shape[1]
    return groups.view(tall, wide, height, width).transpose(1, 2).reshape(tall * height, wide * width)[:rows, :columns]


def row_chunks(spec: QuantSpec, rows: int, columns: int, elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Slices of rows that can be processed one after the other; one slice when rows share scales (tensor, block)."""
    step = rows if spec.strategy in ("tensor", "block") else max(1, elements // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, max(step, 1)))


def check_matrix(weight: torch.Tensor, spec: QuantSpec) -> None:
    """Refuse what no format can hold.

    Raises:
        FormatError: not a 2-D floating-point tensor, empty, NaN or infinite entries, or a group size that does not divide.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise FormatError(
            f"cannot quantize a {weight.dtype} tensor of shape {list(weight.shape)}", "give a non-empty 2-D floating-point tensor [out, in]"
        )
    scale_shape(spec, weight.shape[0], weight.shape[1])
    # The sum is finite only if all are; one that overflows decides nothing. It takes a fifth of the time of a mask.
    if not bool(weight.sum().isfinite()) and not bool((finite := torch.isfinite(weight)).all()):
        bad = (~finite).nonzero()
        row, column = (int(i) for i in bad[0])
        found = float(weight[row, column])
        raise FormatError(
            f"the weight has {len(bad)} NaN or infinite entries of {weight.numel()}, the first at [{row}, {column}] ({found})",
            "repair or re-download the checkpoint",
        )
