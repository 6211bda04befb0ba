"""Runs of a block that pause in front of a linear until it is rounded, and then go on with the rounded weight.

True-sequential rounding needs a linear's inputs after everything in front of it was rounded. Running the block anew for each group of
linears repeats the same work: 2.4 forward passes for Llama's four groups. Here every window's run is a greenlet (a function that can be
left in the middle and entered again, in the same thread): all of them stop in front of the first group, give their inputs, wait while the
group is rounded, and go on to the next one. At the end each gives the block's output, which is that of the quantized path. One pass in all.

The price is memory: each paused run holds its intermediate tensors. `pending_bytes` says how many, for the caller to decide.

A hook that is attached to the linear in front of which a run waits is not seen by this run: formats of activations are attached beforehand
and switched on on the way (`InputFormats.prepare` in `walk.block`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from greenlet import getcurrent, greenlet
from torch import nn

__all__ = ["PausedRuns", "pending_bytes"]


def pending_bytes(windows: int, length: int, width: int, widest: int, dtype: torch.dtype) -> int:
    """What paused runs hold at most: hidden states in front of, beside and behind a norm, and the inputs of the widest linear.

    Args:
        windows, length, width: how many hidden states [1, length, width].
        widest: the largest input width of a linear.
        dtype: of the hidden states.
    """
    return windows * length * (3 * width + 2 * widest) * dtype.itemsize


class PausedRuns:
    """One run of the block per window. Use it as a context manager: what still waits at the end is ended.

    Args:
        linears: in front of which runs pause, by the name that `inputs` asks for, in the order in which the block calls them.
        run: runs the block on window i and returns its output.
        windows: how many.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], run: Callable[[int], torch.Tensor], windows: int) -> None:
        self._linears = linears
        self._runs = [greenlet(lambda window=window: run(window)) for window in range(windows)]
        self._own = set(self._runs)
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, linear in self._linears.items():
            self._handles.append(linear.register_forward_pre_hook(self._pause(name), prepend=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for run in self._runs:
            if not run.dead and run:  # begun and waiting: unwound by greenlet's own exception
                run.throw()

    def _pause(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            current = getcurrent()
            if current in self._own and current.parent is not None:
                current.parent.switch(name, arguments[0])

        return hook

    def inputs(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Let each window's run go on until it calls the linear `name`, and give (window, its input).

        The linears must be asked for in their order, and each exactly once.
        """
        for window, run in enumerate(self._runs):
            reached, x = run.switch()
            assert reached == name, f"window {window} has reached {reached}, not {name}"
            yield window, x

    def outputs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Let each run come to its end and give (window, the block's output)."""
        for window, run in enumerate(self._runs):
            yield window, run.switch()
