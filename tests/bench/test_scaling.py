"""A slice scaled to the whole stack: arithmetic, the clock around the stack, and what cannot be scaled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewbit.bench.scaling import LayerScale, StackClock, decoder_blocks
from fewbit.errors import MeasurementError


@given(
    per_layer=st.floats(min_value=0.01, max_value=100),
    outside=st.floats(min_value=0, max_value=1000),
    measured=st.integers(min_value=1, max_value=8),
    more=st.integers(min_value=0, max_value=90),
)
def test_recovers_a_linear_model(per_layer: float, outside: float, measured: int, more: int) -> None:
    total = measured + more
    scale = LayerScale(measured, total)
    assert scale.scale(outside + measured * per_layer, measured * per_layer) == pytest.approx(outside + total * per_layer)
    assert scale.is_scaled == (more > 0)


def test_what_cannot_be_scaled() -> None:
    with pytest.raises(MeasurementError, match="cannot scale 5 measured layers"):
        LayerScale(5, 4)
    with pytest.raises(MeasurementError, match="cannot be scaled to 8 layers"):
        LayerScale(2, 8).scale(10.0, 0.0)
    with pytest.raises(MeasurementError, match="cannot be scaled"):
        LayerScale(2, 8).scale(10.0, 11.0)
    assert LayerScale(4, 4).scale(10.0, 0.0) == 10.0


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Identity()])
        self.h = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = block(x)
        result: torch.Tensor = self.head(x)
        return result


def test_unknown_families_take_the_longest_list() -> None:
    assert decoder_blocks(Toy())[0] == "h"
    with pytest.raises(MeasurementError, match="no list of layers"):
        decoder_blocks(nn.Linear(2, 2))


def test_the_clock_runs_and_leaves_no_hooks() -> None:
    model = Toy()
    with StackClock(model, "cpu") as clock:
        model(torch.ones(1, 4))
        assert clock.stack_ms > 0
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
