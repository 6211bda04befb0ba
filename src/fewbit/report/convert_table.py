"""What `fewbit convert` tells a person at the end."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fewbit.results import ConvertResult

__all__ = ["render_convert"]


def render_convert(result: ConvertResult, console: Console) -> None:
    """Two columns, what and its value; what was lost has a line each."""
    table = Table(title=f"{result.model} as {result.layout}", title_justify="left", show_header=False)
    table.add_column("what", style="dim")
    table.add_column("value", overflow="fold")
    rows = [
        ("from", f"{result.source_layout}, {result.source_scheme}"),
        ("to", f"{result.layout}, {result.layout_format}, {result.scheme}"),
        ("linears", f"{result.quantized_linears} carried over, {result.kept_tensors} tensors as they were"),
        ("bytes", f"{result.checkpoint_bytes:,} (source {result.source_bytes:,})"),
        *([("lost", "nothing: every integer, scale and zero point is the source's")] if not result.losses else []),
        *(("lost", loss) for loss in result.losses),
        *(("note", note) for note in result.notes),
        ("time", f"{result.duration_s:.1f} s"),
        ("out", result.out),
    ]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
