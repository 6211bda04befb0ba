"""Folding: a scale per channel moved from one layer into its neighbour, without changing what the model computes.

For positive s and a linear W that reads x,

    W x = (W diag(s)) (diag(s)^-1 x)

The columns of W are multiplied here, and the division is put into whatever made x, so that nothing is left to do at run time:

    norm            (offset + g) * n + b      offset + g and b are divided by s; Gemma stores g with offset 1, the others with 0
    linear          P y + c                   rows of P and c are divided; between P and W only a product per channel may stand: the gate
                                              of an MLP (up_proj -> down_proj), attention's weighted mean (v_proj -> o_proj), a ReLU
    attention       W has a column for each channel of each query head, and the query heads of a group read one key-value head: their
                    columns share one channel of v_proj, hence one scale

AWQ (arXiv 2306.00978) and SmoothQuant (arXiv 2211.10438) differ only in how they choose s.

**Exact in BF16.** A gain is stored in 16 bits, and g / s is not: rounded, it would be off by up to 2**-9 in each channel. The scale has no
need to be a particular number, so `representable` moves it to where the division comes out even: s = g / bf16(g / s). Rows of a linear
that will be quantized need no such care: they are kept in float32 until then.
"""

from __future__ import annotations

import torch

from fewbit.errors import FormatError

__all__ = ["divide_norm", "divide_rows", "multiply_columns", "representable", "shared"]


def _check(scale: torch.Tensor, length: int) -> torch.Tensor:
    if scale.ndim == 0 or scale.shape[-1] != length or not bool((scale.isfinite() & (scale > 0)).all()):
        raise FormatError(f"a folded scale has {length} positive entries; this one has shape {list(scale.shape)} or entries that are not")
    return scale.float()


def divide_norm(
    gain: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, *, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gain and bias of a norm whose output is to be divided by `scale`.

    Args:
        gain, bias: [K]; not changed.
        scale: [K], positive.
        offset: the norm multiplies by offset + gain.

    Returns:
        Both in their own dtypes.

    Raises:
        FormatError: a scale of another length, or one that is not positive and finite.
    """
    scale = _check(scale, gain.shape[0])
    divided = ((gain.float() + offset) / scale - offset).to(gain.dtype)
    return divided, None if bias is None else (bias.float() / scale).to(bias.dtype)


def divide_rows(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a linear of which some outputs are to be divided by `scale`.

    Args:
        weight: [..., out, in]; bias: [..., out] or None; not changed.
        scale: [n] (or [..., n] for stacked experts), positive.
        rows: int64 [n], the outputs meant; all of them when None. Fused projections have other things in the other rows.

    Raises:
        FormatError: another number of entries than rows, or one that is not positive and finite.
    """
    rows = torch.arange(weight.shape[-2]) if rows is None else rows
    scale = _check(scale, rows.shape[0])
    divided = weight.clone()
    divided[..., rows, :] = (weight[..., rows, :].float() / scale[..., None]).to(weight.dtype)
    if bias is None:
        return divided, None
    divided_bias = bias.clone()
    divided_bias[..., rows] = (bias[..., rows].float() / scale).to(bias.dtype)
    return divided, divided_bias


def multiply_columns(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """W diag(s): the reader's side.

    Args:
        weight: [..., out, K]; not changed.
        scale: [K] (or [..., K] for stacked experts), positive.

    Raises:
        FormatError: a scale of another length, or one that is not positive and finite.
    """
    scale = _check(scale, weight.shape[-1])
    return (weight.float() * scale[..., None, :]).to(weight.dtype)


def representable(gain: torch.Tensor, scale: torch.Tensor, *, offset: float = 0.0) -> torch.Tensor:
    """The scale next to `scale` by which a norm's gain can be divided without rounding.

    Args:
        gain: [K] in the dtype in which it is stored.
        scale: [K], positive.
        offset: the norm multiplies by offset + gain.

    Returns:
        float32 [K]; 1 where the gain is zero (nothing passes) or where rounding would change its sign.
    """
    scale = _check(scale, gain.shape[0])
    factor = gain.float() + offset
    rounded = ((factor / scale - offset).to(gain.dtype)).float() + offset
    exact = factor / rounded
    return torch.where(exact.isfinite() & (exact > 0), exact, 1.0)


def shared(values: torch.Tensor, channels: torch.Tensor, count: int, *, reduce: str = "amax") -> torch.Tensor:
    """One number for each channel of a producer, out of one for each column of the reader.

    Args:
        values: [K], for the reader's columns.
        channels: int64 [K], the producer's channel that each column reads. `shared(...)[channels]` has a row for each column again.
        count: channels of the producer.
        reduce: `amax` or `mean`.

    Returns:
        [count], values' dtype.
    """
    out = torch.zeros(count, dtype=values.dtype, device=values.device)
    return out.scatter_reduce(0, channels, values, reduce=reduce, include_self=False)
