"""The tables of `fewbit formats`: what each format holds, then what it costs by granularity."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fewbit.results import FormatData, FormatInfo, FormatsResult

__all__ = ["render_formats"]

_NARROW = 110


def render_formats(result: FormatsResult, console: Console) -> None:
    """Print both kinds of tables and the conclusions."""
    narrow = console.width < _NARROW
    console.print(_formats_table(result.formats, narrow))
    if narrow:
        for info in result.formats:
            console.print(f"{info.label} in hardware: {_native(info)}", highlight=False, markup=False, style="dim")
    for data in result.data:
        console.print(_errors_table(data))
    for line in result.conclusions:
        console.print(line, highlight=False, markup=False)


def _number(value: float) -> str:
    """Integers and short decimals as they are, the rest with three digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.4g}" if value != int(value) else f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def _native(info: FormatInfo) -> str:
    return "; ".join(support.hardware for support in info.native) or "nobody: storage only"


def _formats_table(formats: list[FormatInfo], narrow: bool) -> Table:
    table = Table(title="Number formats (before any scale)", title_justify="left")
    for column in ("format", "bits", "smallest", "largest", "step at 1", "next to zero"):
        table.add_column(column, justify="left" if column in ("format", "next to zero") else "right", no_wrap=column == "format")
    if not narrow:
        table.add_column("multiplied in hardware by", ratio=1)
    for info in formats:
        step = "1" if info.name.startswith("int") else _number(info.epsilon) if info.epsilon is not None else "uneven"
        near = ", ".join(_number(p) for p in info.points_near_zero[:4]) if info.code_points else ""
        row = [info.label, str(info.bits), _number(info.smallest), _number(info.maximum), step, near]
        table.add_row(*row, *([] if narrow else [_native(info)]))
    return table


def _errors_table(data: FormatData) -> Table:
    granularities = list(dict.fromkeys(entry.granularity for entry in data.errors))
    table = Table(title=f"Error in % of the norm, on {data.name}: {data.description}", title_justify="left")
    table.add_column("format", no_wrap=True)
    for granularity in granularities:
        table.add_column(granularity.replace("group ", "g"), justify="right")
    for name in dict.fromkeys(entry.format for entry in data.errors):
        found = {entry.granularity: entry for entry in data.errors if entry.format == name}
        table.add_row(name, *(_cell(found[g].relative_error) if g in found else "" for g in granularities))
    overheads = {entry.granularity: entry.overhead_bits for entry in data.errors if entry.format == "INT4"}
    table.add_section()
    table.add_row(
        "bits added", *(f"{overheads[g]:.3g}" if g in overheads and overheads[g] >= 1e-3 else "<0.001" for g in granularities), style="dim"
    )
    return table


def _cell(relative_error: float) -> str:
    return f"{100 * relative_error:.2f}" if relative_error < 0.1 else f"{100 * relative_error:.1f}"
