"""The terminal page of `fewbit kernels`."""

from __future__ import annotations

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fewbit.kernels.cpu.extension import missing_native
from fewbit.kernels.dispatch import KERNELS
from fewbit.results import KernelsReport, SchemeKernel

__all__ = ["render_kernels"]


def render_kernels(report: KernelsReport, console: Console) -> None:
    """Print two tables: which kernel runs each scheme and why no fused one when none does; and what the kernels are."""
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
    console.print(Group(*_missing(), schemes, Text(), kernels))


def _missing() -> list[Text]:
    """What an installation without a compiler lacks, and what to do."""
    if missing_native() is None:
        return []
    names = ", ".join(kernel.name for kernel in KERNELS if kernel.needs_native)
    return [Text(f"missing: {names}: {missing_native()} (pip install --force-reinstall --no-deps fewbit)", style="red"), Text()]


def _why(row: SchemeKernel) -> Text:
    """Nothing for a fused kernel; else the refusals that a user can act on."""
    if row.fused:
        return Text("")
    if not row.fused_candidates:
        return Text("no fused kernel for this format yet", style="dim")
    return Text("\n".join(f"{entry.kernel}: {entry.reason}" for entry in row.refused if entry.kernel in row.fused_candidates))
