"""Folding a scale into the modules of a block, in place: `methods.folding` on a link of `models.links`.

Weights of linears are changed in the dtype they have. Blocks that are about to be quantized are in the walk's working precision, so that
only a norm's gain, which is stored as it is, needs `representable_scale`.
"""

from __future__ import annotations

import torch
from torch import nn

from fewbit.errors import UnsupportedModelError
from fewbit.methods.folding import divide_norm, divide_rows, multiply_columns, representable, shared
from fewbit.models.links import Link

__all__ = ["channel_count", "channels_of", "column_scale", "fold_scale", "representable_scale"]


def channels_of(block: nn.Module, link: Link) -> torch.Tensor | None:
    """int64 [K]: the producer's channel that feeds each column of the readers; None when each has its own (`methods.awq` takes both)."""
    return link.channels(_matrix(block, link.readers[0]).shape[-1]) if link.shares_channels else None


def channel_count(block: nn.Module, link: Link) -> int:
    """How many channels the link has: entries of its scale (for each expert)."""
    channels = channels_of(block, link)
    return _matrix(block, link.readers[0]).shape[-1] if channels is None else int(channels.max()) + 1


def column_scale(block: nn.Module, link: Link, scale: torch.Tensor) -> torch.Tensor:
    """[..., columns] of a scale [..., channels]: what a reader's columns are multiplied by."""
    channels = channels_of(block, link)
    return scale if channels is None else scale[..., channels]


def representable_scale(block: nn.Module, link: Link, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale [channels] next to this one that folds without rounding anything that is stored in `dtype`.

    Only a norm stores what it is divided by; the rows of a linear are quantized later, and any scale will do.
    """
    if link.kind != "norm":
        return scale
    gain = block.get_submodule(link.producer).get_parameter("weight")
    return representable(gain.detach().to(dtype), scale.to(gain.device), offset=link.gain_offset)


@torch.no_grad()
def fold_scale(block: nn.Module, link: Link, scale: torch.Tensor) -> None:
    """Divide what the producer gives by `scale` and multiply the readers' columns by it; the block computes what it did before.

    Args:
        block: one block of a model in high precision; changed in place.
        link: one of `models.links.block_links`.
        scale: [channels] of the producer, positive; [experts, channels] for stacked experts. A scale [columns] of the readers, equal where
            columns share a channel, is taken as well.

    Raises:
        UnsupportedModelError: a reader or producer that is no plain linear.
        FormatError: a scale of another length, or one that is not positive and finite.
    """
    readers = [_matrix(block, name) for name in link.readers]
    channels = channels_of(block, link)
    if channels is not None and scale.shape[-1] == channels.shape[0]:
        scale = shared(scale, channels, channel_count(block, link))
    columns = column_scale(block, link, scale)
    scaled = [multiply_columns(weight, columns) for weight in readers]
    if link.kind == "norm":
        norm = block.get_submodule(link.producer)
        gain, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
        new_gain, new_bias = divide_norm(gain, bias, scale, offset=link.gain_offset)
        gain.copy_(new_gain)
    else:
        producer, bias = _matrix(block, link.producer), _bias(block, link.producer)
        new_rows, new_bias = divide_rows(producer, bias, scale, link.rows(producer.shape[-2], scale.shape[-1]))
        producer.copy_(new_rows)
    if bias is not None and new_bias is not None:
        bias.copy_(new_bias)
    for weight, new_weight in zip(readers, scaled, strict=True):
        weight.copy_(new_weight)


def _matrix(block: nn.Module, name: str) -> torch.Tensor:
    """The weight [..., out, in] of a linear, a router or stacked experts."""
    parent, _, last = name.rpartition(".")
    found = getattr(block.get_submodule(parent), last)
    weight = found if isinstance(found, nn.Parameter) else getattr(found, "weight", None)
    plain = isinstance(found, nn.Parameter | nn.Linear) or type(found).__name__.endswith("Router")
    if weight is None or not plain or weight.ndim not in (2, 3):
        raise UnsupportedModelError(
            f"{name} is a {type(found).__name__}, not an nn.Linear", "no scale can be folded into it: use a method without scaling"
        )
    return weight.detach()


def _bias(block: nn.Module, name: str) -> torch.Tensor | None:
    parent, _, last = name.rpartition(".")
    found = getattr(block.get_submodule(parent), last)
    bias = getattr(found, "bias", None)
    return None if isinstance(found, nn.Parameter) or bias is None else bias.detach()
