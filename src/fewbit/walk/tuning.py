"""Learned rounding of a block in a walk: what `methods.learned_rounding` trains on.

It is given the block as a function of its linears' weights, and pairs of windows: hidden states on the quantized path, and what the block,
as it was before rounding, makes of the same windows on the reference path. The block so learns to make up for what the blocks in front
of it have lost. The wanted outputs are computed once and kept like all hidden states, in memory or in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call

from fewbit.formats.tensor import QuantizedTensor
from fewbit.methods.learned_rounding import LearnedRounding, learn_rounding
from fewbit.walk.settings import WalkSettings

if TYPE_CHECKING:
    from fewbit.walk.block import BlockTask

__all__ = ["tune"]


class _Bound(nn.Module):
    """The block's call as a module, so that its weights can be given from outside."""

    def __init__(self, block: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.block = block
        self._call = call

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._call(hidden)


def tune(
    task: BlockTask,
    originals: Mapping[str, torch.Tensor],
    rounded: Mapping[str, QuantizedTensor],
    as_it_was: Callable[[], AbstractContextManager[Any]],
    settings: WalkSettings,
) -> LearnedRounding:
    """Train the rounding of all linears of a block together.

    Args:
        task: the block, with a reference path.
        originals: each linear's weight before rounding. rounded: where training starts.
        as_it_was: a context in which the block has the original weights.

    Raises:
        FormatError: a format that cannot be trained.
    """
    assert task.inputs is not None and task.reference is not None and task.new_store is not None
    inputs, wanted = task.inputs, task.new_store(task.fitted)
    bound = _Bound(task.block, task.call)
    try:
        with torch.no_grad(), as_it_was():
            for window in range(task.fitted):
                wanted[window] = task.call(task.reference[window])

        def forward(weights: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
            named = {f"block.{name}.weight": weight.to(hidden.dtype) for name, weight in weights.items()}
            output: torch.Tensor = functional_call(bound, named, (hidden,))
            return output

        def pair(window: int) -> tuple[torch.Tensor, torch.Tensor]:
            return inputs[window], wanted[window]

        chosen = {name: originals[name] for name in rounded}
        return learn_rounding(forward, chosen, rounded, task.fitted, pair, settings.learned)
    finally:
        wanted.close()
