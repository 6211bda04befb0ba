"""Mixtures of experts as lists of linears, so that each expert's matrices can be calibrated, quantized and stored by themselves.

A mixture routes each token to k of E small feed-forward networks and adds their outputs, weighted by the router:

    y_t = sum over the k experts e of token t:  r_te * down_e(act(gate_e(x_t)) * up_e(x_t))

transformers 5 keeps the experts of a block as two parameters, `gate_up_proj` [E, 2I, d] and `down_proj` [E, d, I]. Checkpoints, and the
runtimes that read quantized ones, have one matrix for each expert and projection. `unfuse_experts` puts an `ExpertList` in the place of
such a module: the same equation, with one nn.Linear each,

    mlp.experts.gate_up_proj [E, 2I, d]   ->   mlp.experts.0.gate_proj.weight [I, d], mlp.experts.0.up_proj.weight [I, d], ...
    mlp.experts.down_proj    [E, d, I]    ->   mlp.experts.0.down_proj.weight [d, I], ...

The router is no linear in transformers and stays in high precision: it is small, and a token sent elsewhere costs more than any rounding.
So does Qwen2-MoE's gate of the shared expert (`is_router`).

**Calibration.** Which tokens an expert sees is the router's choice; a rare expert may see none. A Hessian of fewer tokens than an eighth
of its columns tells little, and of none nothing, so a starved expert (fewer than max(64, d / 8) routed tokens) is shown others besides its
own: an even sample of the tokens that reach the mixture, as many as an expert sees on average. What it answers to them is used for the
statistics of its three linears and is not added to the block's output, which therefore stays exact. gate and up so get the moments of the
mixture's input, and down the moments of what this very expert would make of it; nothing is special-cased afterwards, and no scale can
become NaN.
`ExpertCoverage` says how many tokens were routed to each expert and which were starved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

__all__ = ["EXPERT_PROJECTIONS", "ExpertCoverage", "ExpertList", "expert_lists", "is_router", "same_routing", "unfuse_experts"]

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_LEAST_TOKENS = 64


@dataclass(frozen=True)
class ExpertCoverage:
    """How many calibration tokens reached the experts of one mixture.

    Attributes:
        tokens: routed to each expert.
        starved: experts with fewer than `required`; they were calibrated on `sampled` other tokens besides their own.
        required: tokens that an expert needs to be calibrated on its own.
        sampled: other tokens shown to each starved expert; 0 when none is starved.
    """

    tokens: tuple[int, ...]
    starved: tuple[int, ...]
    required: int
    sampled: int


class _Expert(nn.Module):
    """One feed-forward network: down(act(gate(x)) * up(x))."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))


class ExpertList(nn.ModuleList):
    """The experts of one mixture; it is called as transformers calls its own.

    Args:
        experts: in the router's order.

    Attributes:
        calibrating: count routed tokens, and call every expert in every forward, if need be with no token: whoever records the inputs
            of linears then meets all of them, always in the same order.
    """

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__(experts)
        self.calibrating = False
        self._counting = False
        self._pinned = False
        self._last: torch.Tensor | None = None
        self._tokens = [0] * len(experts)
        self._seen = 0
        self._top_k = 1
        self._starved: frozenset[int] = frozenset()
        self._stride = 1

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: [tokens, d]. top_k_index: int64 [tokens, k], the experts of each token; an index of E or more is no expert.
            top_k_weights: [tokens, k], what each of them counts.
        """
        result = torch.zeros_like(hidden_states)
        if self.calibrating:
            if self._pinned and self._last is not None:
                top_k_index = self._last
            self._last = top_k_index
        order = top_k_index.flatten().argsort(stable=True)
        counts = torch.bincount(top_k_index.flatten(), minlength=len(self))[: len(self)].tolist()
        if self._counting:
            self._count(counts, *top_k_index.shape)
        for index, chosen in enumerate(torch.split(order[: sum(counts)], counts)):
            if not len(chosen) and not self.calibrating:
                continue
            token = chosen // top_k_index.shape[1]  # [n], ascending
            shown = self._shown(index, token, len(hidden_states))
            answer = self[index](hidden_states[shown])[: len(token)]
            answer = answer * top_k_weights.flatten()[chosen, None]
            result.index_add_(0, token, answer.to(result.dtype))
        return result

    def _shown(self, index: int, token: torch.Tensor, tokens: int) -> torch.Tensor:
        """The tokens that an expert computes: those routed to it first, then, if it is starved, the sample of the others."""
        if not self.calibrating or index not in self._starved:
            return token
        sample = torch.arange(index % self._stride, tokens, self._stride, device=token.device)
        return torch.cat([token, sample[~torch.isin(sample, token)]])

    def _count(self, counts: list[int], tokens: int, top_k: int) -> None:
        self._tokens = [total + count for total, count in zip(self._tokens, counts, strict=True)]
        self._seen += tokens
        self._top_k = top_k

    def start_calibration(self) -> None:
        """Begin to count, with all counts at zero and no expert starved."""
        self.calibrating = self._counting = True
        self._tokens, self._seen, self._starved = [0] * len(self), 0, frozenset()

    def cover(self) -> ExpertCoverage:
        """After one pass over the calibration text: find the starved experts. From the next forward on they are shown the sample, too."""
        self._counting = False
        columns = cast(_Expert, self[0]).gate_proj.in_features
        required = max(_LEAST_TOKENS, columns // 8)
        starved = [index for index, count in enumerate(self._tokens) if count < required]
        average = self._seen * self._top_k // len(self)
        self._stride = max(1, self._seen // max(required, average, 1))
        self._starved = frozenset(starved)
        sampled = -(-self._seen // self._stride) if starved else 0
        return ExpertCoverage(tuple(self._tokens), tuple(starved), required, sampled)

    def stop_calibration(self) -> None:
        """Back to plain evaluation: experts without a token are not called."""
        self.calibrating = self._counting = False
        self._starved, self._last = frozenset(), None


def unfuse_experts(model: nn.Module) -> list[str]:
    """Replace, in place, all modules of stacked experts by lists of linears; views of the same memory, so nothing is copied.

    Modules whose equation is another (biases, other gates, transposed parameters) are left as they are.

    Args:
        model: a model or a block of one, on any device.

    Returns:
        The dotted names of the modules that were replaced.
    """
    stacked = [name for name, module in model.named_modules() if name and _is_stacked(module)]
    for name in stacked:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _unfused(model.get_submodule(name)))
    return stacked


def expert_lists(model: nn.Module) -> Iterator[tuple[str, ExpertList]]:
    """The lists of experts in a model or a block, by dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertList):
            yield name, module


@contextmanager
def same_routing(block: nn.Module) -> Iterator[None]:
    """Inside, experts are given the tokens that they were given in the run before, wherever the router would send them now.

    So the inputs of an expert's linears in two runs over the same window, say with and without rounded weights, are of the same tokens,
    row by row. Only while calibrating; the block's output means nothing then.
    """
    lists = [experts for _, experts in expert_lists(block)]
    for experts in lists:
        experts._pinned = True
    try:
        yield
    finally:
        for experts in lists:
            experts._pinned = False


def is_router(name: str) -> bool:
    """Whether a linear of this dotted name decides where tokens go, or how much of an expert's answer counts: never quantized."""
    parent, _, last = name.rpartition(".")
    return last == "shared_expert_gate" or (last in ("gate", "router") and parent.rpartition(".")[2] in ("mlp", "block_sparse_moe"))


def _is_stacked(module: nn.Module) -> bool:
    """Whether it is a module of stacked experts with the equation of this file.

    transformers runs all such modules by one implementation that knows nothing but these attributes, so they say what the module computes.
    """
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter) or gate_up.ndim != 3 or down.ndim != 3:
        return False
    unlike = ("has_bias", "is_transposed", "has_post_expert_norm")
    plain = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", True)
    own_gate = getattr(getattr(type(module), "_apply_gate", None), "__name__", "") != "_default_apply_gate"
    halves = (down.shape[0], 2 * down.shape[2], down.shape[1]) == tuple(gate_up.shape)
    return bool(plain and halves and not own_gate and not any(getattr(module, name, False) for name in unlike))


def _unfused(module: nn.Module) -> ExpertList:
    gate_up, down = cast(nn.Parameter, module.gate_up_proj), cast(nn.Parameter, module.down_proj)
    activation = cast(nn.Module, module.act_fn)
    width = down.shape[2]
    experts: list[nn.Module] = []
    for index in range(down.shape[0]):
        gate, up, back = (_linear(part, gate_up.requires_grad) for part in (gate_up[index, :width], gate_up[index, width:], down[index]))
        experts.append(_Expert(gate, up, back, activation))
    return ExpertList(experts).train(module.training)


def _linear(weight: torch.Tensor, requires_grad: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=requires_grad)
    return linear
