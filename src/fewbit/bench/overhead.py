"""What remains of a step when the matrix products are gone: the framework's overhead, measured and not estimated.

Every linear (quantized or not, lm_head too) is replaced for the moment by one that returns zeros allocated beforehand, and a decode step
runs again, with a single token in a BF16 cache. What is left is Python, operator dispatch, norms, activation functions, rotary embeddings
and an attention that has nothing to read: the price of a step that no number format changes. Attention over a long context and the
dequantization of a quantized cache are work that formats do change; they are not in it, and count as bandwidth or compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fewbit.runtime.linear import QuantLinear

__all__ = ["emptied", "linears"]


def linears(model: nn.Module) -> list[tuple[str, nn.Linear | QuantLinear]]:
    """(dotted name, module) of every linear, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantLinear)]


@contextmanager
def emptied(model: nn.Module) -> Iterator[None]:
    """Within this context every linear of `model` returns zeros without reading its weight; afterwards the model is as it was."""
    before: list[tuple[nn.Module, object]] = []
    zeros: dict[tuple[int, ...], torch.Tensor] = {}
    try:
        for _, linear in linears(model):
            before.append((linear, linear.__dict__.get("forward")))
            linear.__dict__["forward"] = _returning_zeros(linear.out_features, zeros)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _returning_zeros(out_features: int, zeros: dict[tuple[int, ...], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward x [..., in] -> zeros [..., out]; one tensor per shape of outputs, which all linears of the model share."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], out_features)
        if shape not in zeros:
            zeros[shape] = torch.zeros(shape, dtype=x.dtype, device=x.device)
        return zeros[shape]

    return forward
