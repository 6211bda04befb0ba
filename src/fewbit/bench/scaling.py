"""From a slice of the layers to the whole stack.

A 7B model in BF16 does not fit on many machines that one wants to know its speed on, but its layers are all alike: a slice of k of its
L layers, with the real lm_head and embeddings, tells everything but what repetition adds. Each timed step is split by a clock around
the stack,

    step = stack (k layers, one after the other) + outside (embeddings, final norm, lm_head, the engine's own work)

and the whole model's step is outside + stack * L / k. The split is measured within every single step, so percentiles scale sample by
sample and no slope has to be fitted between two noisy runs (the alternative, stacks of 2 and 4 layers, halves the samples and doubles
the loading for the same figure).

What this leaves out: L layers average out noise that k layers show, so scaled p95 and p99 lie a little too far out; and a slice that
fits in the last-level cache would read its weights faster than the whole stack could. Use slices that do not. Every scaled result says
`scaled`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import nn

from fewbit.bench.machine import synchronize
from fewbit.errors import MeasurementError
from fewbit.models.families import get_family

__all__ = ["LayerScale", "StackClock", "decoder_blocks"]


@dataclass(frozen=True)
class LayerScale:
    """How a measured slice relates to the whole model.

    Attributes:
        layers_measured: layers that ran.
        layers_total: layers of the whole model.

    Raises:
        MeasurementError: no layers, or more measured than there are.
    """

    layers_measured: int
    layers_total: int

    def __post_init__(self) -> None:
        if not 1 <= self.layers_measured <= self.layers_total:
            raise MeasurementError(f"cannot scale {self.layers_measured} measured layers to a model of {self.layers_total}")

    @property
    def is_scaled(self) -> bool:
        """Whether anything has to be scaled at all."""
        return self.layers_measured != self.layers_total

    def scale(self, whole: float, stack: float) -> float:
        """The whole model's figure.

        Args:
            whole: measured over the slice, in any unit that adds up over layers (milliseconds, bytes, operations).
            stack: the part of `whole` that is in the layers.

        Raises:
            MeasurementError: the stack took nothing, so it cannot be scaled, or more than the whole.
        """
        if not self.is_scaled:
            return whole
        if not 0 < stack <= whole:
            raise MeasurementError(
                f"the layers took {stack:g} of {whole:g}, which cannot be scaled to {self.layers_total} layers",
                "measure again on an idle machine, or without --shapes",
            )
        return whole + stack * (self.layers_total / self.layers_measured - 1)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(dotted name, the list of decoder blocks), from the family table; for unknown families the longest list of modules.

    Raises:
        MeasurementError: the model has no list of modules.
    """
    family = get_family(getattr(getattr(model, "config", None), "model_type", ""))
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    if family is not None and family.blocks in modules:
        return family.blocks, modules[family.blocks]
    if not modules:
        raise MeasurementError(f"{type(model).__name__} has no list of layers that could be timed")
    name = max(modules, key=lambda key: len(modules[key]))
    return name, modules[name]


class StackClock:
    """Times the stack of layers inside a forward pass: two hooks, at the first layer's entry and at the last one's exit.

    Use as a context manager; the hooks are gone afterwards. `stack_ms` is the time of the latest forward pass. On a GPU the hooks wait
    for the device, which costs two synchronizations per step.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        self._blocks = decoder_blocks(model)[1]
        self._device = device
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._entered = 0.0
        self.stack_ms = 0.0

    def __enter__(self) -> StackClock:
        self._handles = [
            self._blocks[0].register_forward_pre_hook(self._enter_stack),
            self._blocks[-1].register_forward_hook(self._leave_stack),
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter_stack(self, *_: object) -> None:
        synchronize(self._device)
        self._entered = time.perf_counter()

    def _leave_stack(self, *_: object) -> None:
        synchronize(self._device)
        self.stack_ms = (time.perf_counter() - self._entered) * 1e3
