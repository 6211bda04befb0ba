"""What the linears of a block are given: found by running the block and looking.

Which linears share an input is not looked up in a table but seen: q, k and v are called with one and the same tensor. So an architecture
that nobody described is grouped as well as Llama. Groups are listed in the order in which the block calls them, which is the order in which
they are rounded: what a later one is given depends on the earlier ones.

The groups of a mixture's experts are called side by side: those that are alike but for the expert's number form one *stage*, whose inputs
are gathered in one run. A run ends as soon as every linear of the stage has been called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Group", "capture", "find_groups", "stages"]


class _Enough(Exception):
    """All inputs that were asked for have been seen."""


@dataclass(frozen=True)
class Group:
    """Linears that are called with the same tensor.

    Attributes:
        names: dotted names in the block, in the order in which they are called.
        columns: K, the input's width.
    """

    names: tuple[str, ...]
    columns: int


def find_groups(linears: Mapping[str, nn.Linear], run: Callable[[int], object], windows: int, *, products: bool = True) -> list[Group]:
    """Group linears by their input.

    Args:
        linears: the block's, by dotted name.
        run: runs the block on window i.
        windows: how many there are. More than the first are run only while a linear has not been called (a mixture's experts).
        products: whether the linears compute. Who reads which tensor does not depend on the values, so that zeros serve as well and take no
            time, but for a mixture, whose router has to choose.

    Returns:
        Groups in the order of execution; linears that no window reaches come last, those of one expert with equal widths together.
    """
    order: dict[tuple[str, ...], int] = {}
    missing = set(linears)
    for window in range(windows):
        seen: list[tuple[str, torch.Tensor]] = []

        def note(name: str, x: torch.Tensor, seen: list[tuple[str, torch.Tensor]] = seen) -> None:
            if x.numel():  # experts that no token of the window reached may be called with none
                seen.append((name, x))

        with capture(linears, note, stop=True), nullcontext() if products else _zeros_for(linears.values()):
            run(window)
        for names in _by_tensor(seen):
            if missing & set(names):
                order.setdefault(tuple(name for name in names if name in missing), len(order))
                missing -= set(names)
        if not missing:
            break
    groups = [Group(names, linears[names[0]].in_features) for names in order]
    return groups + _never_called(linears, [name for name in linears if name in missing], groups)


@contextmanager
def _zeros_for(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """The linears give zeros of the right shape."""

    def zeros_of(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: x.new_zeros(*x.shape[:-1], linear.out_features)

    changed = list(linears)
    for linear in changed:
        linear.forward = zeros_of(linear)  # type: ignore[assignment]
    try:
        yield
    finally:
        for linear in changed:
            del linear.forward  # the class's own comes back


def _by_tensor(seen: Sequence[tuple[str, torch.Tensor]]) -> list[list[str]]:
    """Names whose tensors are the same memory, in the order of first calls. All tensors are alive, so that addresses are unique."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for name, x in seen:
        key = (x.data_ptr(), tuple(x.shape), x.stride())
        if name not in found.setdefault(key, []):
            found[key].append(name)
    return list(found.values())


def _never_called(linears: Mapping[str, nn.Linear], names: Sequence[str], groups: Sequence[Group]) -> list[Group]:
    """Groups of linears that no token reached, formed as those of their siblings are (the same names but for the expert's number)."""
    patterns = {_pattern(member): tuple(map(_pattern, group.names)) for group in groups for member in group.names}
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        siblings = patterns.get(_pattern(name), (_pattern(name),))
        number = "".join(part for part in name.split(".") if part.isdigit())
        found.setdefault((number, *siblings), []).append(name)
    return [Group(tuple(members), linears[members[0]].in_features) for members in found.values()]


def stages(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that can be gathered in one run: alike but for an expert's number, in the order of the first of each."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        found.setdefault(tuple(map(_pattern, group.names)), []).append(group)
    return list(found.values())


def _pattern(name: str) -> str:
    """`mlp.experts.3.up_proj` -> `mlp.experts.*.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


@contextmanager
def capture(linears: Mapping[str, nn.Linear], see: Callable[[str, torch.Tensor], None], *, stop: bool = False) -> Iterator[None]:
    """While the block runs inside, `see(name, x)` is called with each linear's input, before anything is done to it.

    Args:
        linears: those to look at.
        stop: end the run, without an error, as soon as all of them have been called. A run that is to end so must be the only one inside.
    """
    waiting = set(linears)

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            see(name, arguments[0])
            waiting.discard(name)
            if stop and not waiting:
                raise _Enough

        return hook

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(hook_of(name), prepend=True).remove)
        with suppress(_Enough):
            yield


def run_all(run: Callable[[int], object], windows: Iterable[int]) -> None:
    """Run the block on several windows."""
    for window in windows:
        run(window)
