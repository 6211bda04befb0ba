"""Paused runs see what repeated runs see, and end with the block's output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbit.walk.paused import PausedRuns


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.third(torch.relu(self.second(x + self.first(x))))


@torch.no_grad()
def test_each_linear_sees_what_rounded_linears_in_front_of_it_give() -> None:
    block, windows = Block(), [torch.randn(1, 4, 8) for _ in range(3)]
    linears = {"first": block.first, "second": block.second, "third": block.third}
    seen: dict[str, list[torch.Tensor]] = {}
    with PausedRuns(linears, lambda window: block(windows[window]), 3) as runs:
        for name, linear in linears.items():
            seen[name] = [x.clone() for _, x in runs.inputs(name)]
            linear.weight.data = linear.weight.data.round(decimals=1)
        outputs = [y for _, y in runs.outputs()]
    for window, x in enumerate(windows):
        second = x + block.first(x)
        assert torch.equal(seen["first"][window], x)
        assert torch.equal(seen["second"][window], second)
        assert torch.equal(seen["third"][window], torch.relu(block.second(second)))
        assert torch.equal(outputs[window], block(x))


@torch.no_grad()
def test_what_waits_is_ended_and_hooks_are_gone() -> None:
    block, ended = Block(), []

    def run(window: int) -> torch.Tensor:
        try:
            return block(torch.zeros(1, 2, 8))
        finally:
            ended.append(window)

    with pytest.raises(KeyError), PausedRuns({"second": block.second}, run, 3) as runs:
        inputs = runs.inputs("second")
        next(inputs)
        next(inputs)
        raise KeyError
    assert ended == [0, 1]
    assert not block.second._forward_pre_hooks
    block(torch.zeros(1, 2, 8))


@torch.no_grad()
def test_an_error_in_a_run_comes_out_where_it_is_asked_for() -> None:
    block = Block()

    def run(window: int) -> torch.Tensor:
        raise ValueError("broken")

    with PausedRuns({"second": block.second}, run, 2) as runs, pytest.raises(ValueError, match="broken"):
        next(runs.inputs("second"))
