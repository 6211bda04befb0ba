"""What `fewbit inspect` tells a person."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fewbit.results import InspectResult

__all__ = ["render_inspect"]


def render_inspect(result: InspectResult, console: Console) -> None:
    """Print the summary, what is stored how, who runs it, and what contradicts itself."""
    console.print(_summary(result))
    console.print(_formats(result))
    if result.runtimes:
        console.print(_runtimes(result))
    for one in result.hardware:
        console.print(f"Multiplied as stored by: {one.hardware} ({one.source})", highlight=False, soft_wrap=True)
    if result.scheme and not result.hardware:
        console.print("No hardware multiplies these weights as they are stored: every kernel widens them first", soft_wrap=True)
    for note in result.notes:
        console.print(f"Note: {note}", highlight=False, soft_wrap=True)
    for problem in result.problems:
        console.print(f"[red]Problem:[/] {problem}", highlight=False, soft_wrap=True)
    if not result.problems:
        console.print("[green]Nothing contradicts itself[/] (headers and one linear of each kind; `fewbit verify` reads everything)")


def _summary(result: InspectResult) -> Table:
    table = Table(title=result.checkpoint, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    bits = result.effective_bits_per_weight
    rows = (
        ("layout", f"{result.layout}" + (f" ({result.kind})" if result.kind else "")),
        ("architecture", result.architecture),
        ("scheme", result.scheme or ("none of fewbit's" if result.quantized_parameters else "high precision")),
        ("weights", result.weights),
        ("inputs", result.input_activations),
        ("KV cache", result.kv_cache),
        ("parameters", f"{result.parameters:,}, {result.quantized_parameters:,} of them quantized"),
        ("size", _size(result.stored_bytes)),
        ("bits per quantized weight", "" if bits is None else f"{bits:.3f}"),
        ("bits per parameter", f"{result.effective_bits_per_parameter:.3f}"),
    )
    for name, value in rows:
        if value:
            table.add_row(name, value)
    return table


def _formats(result: InspectResult) -> Table:
    table = Table(title="Stored", title_justify="left")
    table.add_column("format", overflow="fold")
    for name in ("linears", "others", "parameters", "size"):
        table.add_column(name, justify="right")
    table.add_column("kernel here")
    table.add_column("faster ones, why not", overflow="fold")
    for one in result.formats:
        reasons = "; ".join(f"{p.kernel}: {p.reason}" for p in one.passed_over)
        size = _size(one.stored_bytes)
        table.add_row(one.format, str(one.linears), str(one.others), f"{one.parameters:,}", size, one.kernel or "-", reasons)
    return table


def _runtimes(result: InspectResult) -> Table:
    table = Table(title="Other runtimes, on a machine without a GPU", title_justify="left")
    for name in ("runtime", "loads it", "why not", "proven with"):
        table.add_column(name, overflow="fold")
    for cell in result.runtimes:
        table.add_row(cell.runtime, "[green]yes[/]" if cell.loads else "no", cell.reason or "", cell.proven_with)
    return table


def _size(count: int) -> str:
    """Bytes in decimal units, as everywhere in the reports."""
    unit, name = next(((scale, name) for scale, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= scale), (1.0, "B"))
    return f"{count / unit:.4g} {name}"
