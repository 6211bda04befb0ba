"""The terminal page of `fewbit kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fewbit.results import PassedOverKernel

__all__ = ["render_kernels"]


class _Kernel(Protocol):
    name: str
    description: str
    fused: bool


class _SchemeKernel(Protocol):
    scheme: str
    weights: str
    input_activations: str
    kernel: str
    fused: bool
    fused_candidates: list[str]
    refused: list[PassedOverKernel]


class _Report(Protocol):
    """What is rendered: the fields of `workflows.kernels.KernelsReport`, which stands to the right of this layer."""

    cpu: str
    torch: str
    device: str
    dtype: str
    out_features: int
    in_features: int

    @property
    def kernels(self) -> Sequence[_Kernel]: ...

    @property
    def schemes(self) -> Sequence[_SchemeKernel]: ...


def render_kernels(report: _Report) -> RenderableType:
    """Two tables: which kernel runs each scheme and why no fused one when none does; and what the kernels are."""
    title = f"{report.out_features} x {report.in_features}, {report.dtype} on {report.device}: {report.cpu}, torch {report.torch}"
    schemes = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("scheme", "weights", "kernel", "why no faster one"):
        schemes.add_column(heading, overflow="fold")
    for row in report.schemes:
        inputs = "" if row.input_activations == "BF16" else f"; inputs {row.input_activations}"
        schemes.add_row(row.scheme, row.weights + inputs, Text(row.kernel, style="green" if row.fused else "yellow"), _why(row))
    kernels = Table(title="kernels", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("kernel", "fused", "what it does"):
        kernels.add_column(heading, overflow="fold")
    for kernel in report.kernels:
        kernels.add_row(kernel.name, "yes" if kernel.fused else "no", kernel.description)
    return Group(schemes, Text(), kernels)


def _why(row: _SchemeKernel) -> Text:
    """Nothing for a fused kernel; else the refusals that a user can act on."""
    if row.fused:
        return Text("")
    if not row.fused_candidates:
        return Text("no fused kernel for this format yet", style="dim")
    return Text("\n".join(f"{entry.kernel}: {entry.reason}" for entry in row.refused if entry.kernel in row.fused_candidates))
