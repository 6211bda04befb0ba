"""Quantize and dequantize: weights with stored scales, activations and KV with scales computed on the fly.

    quantize      q = encode(x / scale)                           symmetric, and every float and table format
                  q = clamp(round(x / scale) + zero_point)        affine
    dequantize    x ~ decode(q) * (scale * global_scale)          symmetric
                  x ~ (q - zero_point) * scale                    affine

Weights are worked on in float32, a few rows at a time, so that the temporaries stay at some tens of megabytes whatever the size of the
weight. The dynamic functions run inside every decode step: few operators, no check for NaN (it would force a synchronization), and none
is needed: a NaN makes the scale of its group NaN, so the whole group comes back as NaN; an infinity takes the largest scale there is, so
the rest of its group comes back as zeros and itself as an infinity or the largest number. Both show. A group of zeros gets the smallest
scale and comes back as zeros.

Dynamic groupings, always relative to the last dimension of x [..., n]:

    strategy    scale shape            for
    tensor      [1] * x.ndim           activations
    token       [..., 1]               activations (one token), KV (one token of one head: n = head_dim)
    group       [..., n / group_size]  activations, KV
    channel     [..., t / group_size, n] of x [..., t, n]: group_size tokens of one channel (KIVI's keys, arXiv 2402.02750)
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fewbit.errors import FormatError
from fewbit.formats.grids import decode_values, encode_values, value_dtype
from fewbit.formats.grouping import CHUNK_ELEMENTS, check_matrix, from_groups, row_chunks, scale_shape, to_groups
from fewbit.formats.scales import compute_scales, round_scale, scale_as_float, scale_divisor, zero_points
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["dequantize", "dequantize_dynamic", "fake_quantize", "outlier_columns", "quantize", "quantize_dynamic"]


def _per_column(scale: torch.Tensor, g_idx: torch.Tensor) -> torch.Tensor:
    """[rows, groups] -> [rows, in]: the group of each column looked up."""
    return scale[:, g_idx.long()]


def _check_g_idx(g_idx: torch.Tensor, spec: QuantSpec, columns: int, groups: int) -> None:
    if spec.strategy != "group" or g_idx.shape != (columns,):
        raise FormatError(
            f"g_idx has shape {list(g_idx.shape)} for {columns} columns and strategy '{spec.strategy}'", "it is [in], with strategy 'group'"
        )
    counts = torch.bincount(g_idx.long(), minlength=groups)
    if counts.numel() != groups or not bool(torch.eq(counts, spec.group_size or 0).all()):
        raise FormatError(f"g_idx does not put {spec.group_size} columns into each of the {groups} groups")


def quantize(
    weight: torch.Tensor,
    spec: QuantSpec,
    *,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
    codebook: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Round a weight to its format.

    Args:
        weight: [out, in], floating point; not changed.
        scale, zero_point, global_scale: as `compute_scales` returns them; min-max scales are computed when `scale` is None.
        g_idx: int32 [in], the group of each column, when groups are not neighbours (GPTQ's activation order).
        codebook: [entries] for type `codebook`.

    Raises:
        FormatError: what `check_matrix` refuses, or scales whose shape does not fit the weight.
    """
    rows, columns = weight.shape if weight.ndim == 2 else (0, 0)
    if g_idx is not None:
        _check_g_idx(g_idx, spec, columns, scale_shape(spec, rows, columns)[1])
    if scale is None:
        ordered = weight if g_idx is None else weight[:, torch.argsort(g_idx, stable=True)]
        scale, zero_point, global_scale = compute_scales(ordered, spec, codebook=codebook)
    else:
        check_matrix(weight, spec)
    expected = scale_shape(spec, rows, columns)
    if tuple(scale.shape) != expected:
        raise FormatError(
            f"the scale has shape {list(scale.shape)}, a {rows} x {columns} weight in {spec} has scales of shape {list(expected)}"
        )
    if spec.symmetric != (zero_point is None):
        raise FormatError(f"{spec} {'has no' if spec.symmetric else 'needs a'} zero point")

    steps = scale_as_float(scale, spec, global_scale)
    values = torch.empty(rows, columns, dtype=value_dtype(spec), device=weight.device)
    for chunk in row_chunks(spec, rows, columns):
        x, step, zero = (
            weight[chunk].float(),
            _rows_of(steps, chunk, rows),
            None if zero_point is None else _rows_of(zero_point, chunk, rows),
        )
        if g_idx is None:
            encoded = _encode(to_groups(x, spec), step.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1), spec, codebook)
            values[chunk] = from_groups(encoded, spec, x.shape[0], columns)
        else:
            values[chunk] = _encode(x, _per_column(step, g_idx), None if zero is None else _per_column(zero, g_idx), spec, codebook)
    return QuantizedTensor(values, scale, spec, zero_point, g_idx, global_scale, codebook)


def _rows_of(scales: torch.Tensor, chunk: slice, rows: int) -> torch.Tensor:
    """The scales of a chunk of rows; all of them when rows share scales (then `row_chunks` gives one chunk)."""
    return scales[chunk] if scales.shape[0] == rows else scales


def _encode(
    x: torch.Tensor, step: torch.Tensor, zero_point: torch.Tensor | None, spec: QuantSpec, codebook: torch.Tensor | None = None
) -> torch.Tensor:
    """x / step on the grid, all broadcast against x."""
    scaled = x / step
    if zero_point is not None:
        scaled = scaled.round_().add_(zero_point)
    return encode_values(scaled, spec, codebook)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight that `q` stands for: [out, in] in `dtype`, computed in float32 and rounded once."""
    rows, columns = q.shape
    steps = scale_as_float(q.scale, q.spec, q.global_scale)
    out = torch.empty(rows, columns, dtype=dtype, device=q.values.device)
    for chunk in row_chunks(q.spec, rows, columns):
        decoded = decode_values(q.values[chunk], q.spec, q.codebook)
        step, zero = _rows_of(steps, chunk, rows), None if q.zero_point is None else _rows_of(q.zero_point, chunk, rows)
        if q.g_idx is not None:
            if zero is not None:
                decoded -= _per_column(zero, q.g_idx)
            out[chunk] = decoded.mul_(_per_column(step, q.g_idx))
            continue
        groups = to_groups(decoded, q.spec)
        if zero is not None:
            groups -= zero.unsqueeze(-1)
        out[chunk] = from_groups(groups.mul_(step.unsqueeze(-1)), q.spec, decoded.shape[0], columns)
    return out


def _split(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """View with dimension `dim` split into (runs, size); it works for strided x, where a reshape would copy."""
    split: torch.Tensor = x.unflatten(dim, (-1, size))  # type: ignore[no-untyped-call]
    return split


def _dynamic_view(x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, int | tuple[int, ...]]:
    """x unflattened so that scales are a reduction over the returned dimension(s)."""
    if spec.strategy == "token":
        return x, -1
    if spec.strategy == "tensor":
        return x, tuple(range(x.ndim))
    size = spec.group_size
    if spec.strategy == "group" or (spec.strategy == "channel" and size is not None and x.ndim >= 2):
        dim = -1 if spec.strategy == "group" else -2
        if size is None or x.shape[dim] % size:
            raise FormatError(
                f"group size {size} does not divide the {x.shape[dim]} {'channels' if dim == -1 else 'tokens'} of a tensor {list(x.shape)}"
            )
        # group: [..., n/g, g], reduced over g; channel: [..., t/g, g, n], reduced over g
        return _split(x, dim, size), dim
    raise FormatError(
        f"{spec} cannot be computed on the fly", "dynamic formats are per tensor, token, group, or KIVI's channel with a group size"
    )


def _encode_in_pieces(view: torch.Tensor, step: torch.Tensor, zero_point: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """`_encode`, in pieces that stay in the cache when x is large (a prefill): its float32 temporaries cost more than the arithmetic."""
    pieces = -(-view.numel() // CHUNK_ELEMENTS)
    if pieces <= 1:
        return _encode(view, step, zero_point, spec)
    dim = max(range(view.ndim), key=lambda d: view.shape[d])
    shared = step.shape[dim] == 1
    values = torch.empty(view.shape, dtype=value_dtype(spec), device=view.device)
    length = -(-view.shape[dim] // pieces)
    for start in range(0, view.shape[dim], length):
        piece = (slice(None),) * dim + (slice(start, start + length),)
        own = (slice(None),) if shared else piece
        values[piece] = _encode(view[piece], step[own], None if zero_point is None else zero_point[own], spec)
    return values


def quantize_dynamic(x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize activations or KV with scales computed from the values themselves.

    Args:
        x: [..., n] (channel: [..., t, n]), any floating dtype and strides.

    Returns:
        values of x's shape in `value_dtype(spec)`; scale in `spec.scale_dtype` (E8M0: uint8) and zero point (int8, None when symmetric),
        both of the shape given in the module's header.

    Raises:
        FormatError: a strategy that is not dynamic, a group size that does not divide, or a format with a global scale.
    """
    if spec.global_scale:
        raise FormatError(
            f"{spec} has a scale per tensor that must be calibrated", "use a format without global_scale for activations and KV"
        )
    view, dim = _dynamic_view(x, spec)
    if spec.symmetric:
        largest = view.abs().amax(dim, keepdim=True).float()
        scale, zero_point = round_scale(largest / scale_divisor(spec), spec.scale_dtype), None
        step = scale_as_float(scale, spec)
    else:
        low, high = view.amin(dim, keepdim=True).float().clamp_max_(0.0), view.amax(dim, keepdim=True).float().clamp_min_(0.0)
        scale = round_scale((high - low) / (2**spec.num_bits - 1), spec.scale_dtype)
        step = scale_as_float(scale, spec)
        zero_point = zero_points(low, step, spec.num_bits)
    values = _encode_in_pieces(view, step, zero_point, spec).reshape(x.shape)
    if view is not x:  # the reduced dimension of a group is dropped again
        assert isinstance(dim, int)
        scale, zero_point = scale.squeeze(dim), None if zero_point is None else zero_point.squeeze(dim)
    return values, scale, zero_point


def dequantize_dynamic(
    values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, spec: QuantSpec, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The inverse of `quantize_dynamic`: values' shape, in `dtype`.

    Products are taken in the wider of `dtype` and the scale's dtype and rounded once: with BF16 scales and BF16 output nothing wider is
    written.
    """
    view, dim = _dynamic_view(values, spec)
    step = scale_as_float(scale, spec) if spec.scale_dtype in ("e8m0", "float8_e4m3fn") else scale
    if view is not values:
        assert isinstance(dim, int)
        step, zero_point = step.unsqueeze(dim), None if zero_point is None else zero_point.unsqueeze(dim)
    decoded = decode_values(view, spec, dtype=dtype)
    if zero_point is not None:
        decoded = decoded - zero_point  # at most 255 in magnitude: exact in BF16
    return (decoded * step).to(dtype).reshape(values.shape)


def outlier_columns(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """LLM.int8()'s outliers (arXiv 2208.07339): bool [n], the columns of x [..., n] in which any |value| exceeds `threshold`."""
    return x.abs().flatten(0, -2).amax(0) > threshold if x.ndim > 1 else x.abs() > threshold


def fake_quantize(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Quantize and dequantize on the fly: what a dynamic format does to x, in x's shape and dtype; outlier columns stay as they are.

    Raises:
        FormatError: as `quantize_dynamic`.
    """
    if spec.outlier_threshold is not None:
        outliers, plain = outlier_columns(x, spec.outlier_threshold), replace(spec, outlier_threshold=None)
        return torch.where(outliers, x, fake_quantize(x.masked_fill(outliers, 0.0), plain))
    values, scale, zero_point = quantize_dynamic(x, spec)
    return dequantize_dynamic(values, scale, zero_point, spec, x.dtype)
