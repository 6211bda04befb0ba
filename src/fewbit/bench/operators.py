"""Where the time of a decode step goes, by class of operator, so that the hot path is seen and not assumed.

    ffn projections         gate, up and down (or their like)
    attention projections   q, k, v and o
    attention               the attention modules without their projections: rotary embedding, cache, scores, softmax
    lm_head
    rest                    the step without all of these: embeddings, norms, activation functions, residuals, Python

Timing hooks sit on the outermost module of each class, in a pass of its own, because a hook costs a microsecond or two and would be
part of every latency otherwise. What the hooks of the projections cost ends up in attention and rest; nothing is counted twice, and the
classes add up to the step.

The engine counts for itself in every pass. Its classes of projections contain what it fuses with them: norms, bias, activation, residual.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fewbit.bench.machine import synchronize
from fewbit.bench.scaling import LayerScale, StackClock
from fewbit.models.families import OperatorClass, operator_class
from fewbit.results import OperatorTimes
from fewbit.runtime.engine import Engine

__all__ = ["engine_operators", "measure_operators", "operator_clocks"]

_CLASSES: tuple[OperatorClass, ...] = ("ffn", "attention_projection", "attention", "lm_head")


def measure_operators(model: nn.Module, step: Callable[[], float], *, steps: int, scale: LayerScale, device: str = "cpu") -> OperatorTimes:
    """Mean times of one step by operator class.

    Args:
        model: its `config.model_type` says which names belong to which class.
        step: runs one decode step of `model` and returns its milliseconds.
        steps: how many are averaged.
        scale: to the whole stack, when `model` is a slice.
        device: where the model runs.
    """
    total, stack = 0.0, 0.0
    step()  # the first step after other work pays for the caches
    with operator_clocks(model, device) as spent, StackClock(model, device) as clock:
        for _ in range(steps):
            total += step()
            stack += clock.stack_ms
    mean = {kind: milliseconds / steps for kind, milliseconds in spent.items()}
    total, stack = total / steps, stack / steps
    projections, ffn, head = mean["attention_projection"], mean["ffn"], mean["lm_head"]
    attention = max(mean["attention"] - projections, 0.0)
    rest_in_stack = max(stack - ffn - projections - attention, 0.0)
    rest_outside = max(total - stack - head, 0.0)
    factor = scale.layers_total / scale.layers_measured
    return OperatorTimes(
        ffn_projections_ms=ffn * factor,
        attention_projections_ms=projections * factor,
        attention_ms=attention * factor,
        lm_head_ms=head,
        rest_ms=rest_in_stack * factor + rest_outside,
    )


def engine_operators(engine: Engine, step: Callable[[], float], *, steps: int, scale: LayerScale) -> OperatorTimes:
    """The same from the engine's own clock.

    Args:
        engine: which `step` runs.
        step, steps, scale: as in `measure_operators`.
    """
    step()
    ffn = projections = attention = head = rest = 0.0
    for _ in range(steps):
        total, times = step(), engine.times
        ffn, projections, attention = ffn + times.ffn, projections + times.attention_projections, attention + times.attention
        head += times.head
        rest += max(total - times.layers - times.head, 0.0)
    factor = scale.layers_total / scale.layers_measured / steps
    return OperatorTimes(
        ffn_projections_ms=ffn * factor,
        attention_projections_ms=projections * factor,
        attention_ms=attention * factor,
        lm_head_ms=head / steps,
        rest_ms=rest / steps,
    )


@contextmanager
def operator_clocks(model: nn.Module, device: str = "cpu") -> Iterator[dict[OperatorClass, float]]:
    """Within this context, the returned dictionary counts the milliseconds spent in each class since its start."""
    spent: dict[OperatorClass, float] = dict.fromkeys(_CLASSES, 0.0)
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for kind, module in _outermost(model):
            handles += _clock(module, kind, spent, device)
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _outermost(model: nn.Module) -> Iterator[tuple[OperatorClass, nn.Module]]:
    """The modules to time: of nested modules of one class only the outer one."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    taken: dict[OperatorClass, list[str]] = {kind: [] for kind in _CLASSES}
    for name, module in model.named_modules():
        kind = operator_class(name, model_type) if name else "rest"
        if kind != "rest" and not any(name.startswith(outer + ".") for outer in taken[kind]):
            taken[kind].append(name)
            yield kind, module


def _clock(
    module: nn.Module, kind: OperatorClass, spent: dict[OperatorClass, float], device: str
) -> list[torch.utils.hooks.RemovableHandle]:
    entered = 0.0

    def enter(*_: object) -> None:
        nonlocal entered
        synchronize(device)
        entered = time.perf_counter()

    def leave(*_: object) -> None:
        synchronize(device)
        spent[kind] += (time.perf_counter() - entered) * 1e3

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
