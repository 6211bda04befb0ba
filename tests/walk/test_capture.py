"""Linears are grouped by the tensor that they are given, in the order in which they are called."""

from __future__ import annotations

import torch
from torch import nn

from fewbit.walk.capture import capture, find_groups, stages


class Block(nn.Module):
    """q and k share an input, and so do both linears of each expert; expert 1 is only called for windows with a positive first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(4, 4) for _ in range(3))
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(4, 6), "gate": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for _ in range(3)
        )
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = x + self.o(self.q(x) * self.k(x))
        for index in (0, 1) if float(x.flatten()[0]) > 0 else (0,):
            part, expert = y * (index + 1), self.experts[index]
            y = y + expert["down"](expert["up"](part) * expert["gate"](part))
        return y


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def test_groups_stages_and_what_is_never_called() -> None:
    block = Block()
    windows = [-torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4)]
    groups = find_groups(linears(block), lambda index: block(windows[index]), 3)
    names = [group.names for group in groups]
    assert names[:4] == [("q", "k"), ("o",), ("experts.0.up", "experts.0.gate"), ("experts.0.down",)]
    assert set(names[4:6]) == {("experts.1.up", "experts.1.gate"), ("experts.1.down",)}
    assert {frozenset(group) for group in names[6:]} == {frozenset({"experts.2.up", "experts.2.gate"}), frozenset({"experts.2.down"})}
    assert [[len(group.names) for group in stage] for stage in stages(groups)] == [[2], [1], [2, 2, 2], [1, 1, 1]]
    assert [group.columns for group in groups[:4]] == [4, 4, 4, 6]


def test_a_run_ends_as_soon_as_everything_was_seen() -> None:
    block = Block()
    seen: dict[str, torch.Tensor] = {}
    reached = []
    block.o.register_forward_hook(lambda *_: reached.append("o"))
    x = torch.randn(1, 2, 4)
    with capture({"q": block.q, "k": block.k}, seen.__setitem__, stop=True):
        block(x)
    assert torch.equal(seen["q"], x) and torch.equal(seen["k"], x) and not reached
    assert not block.q._forward_pre_hooks
    block(x)
    assert reached == ["o"]
