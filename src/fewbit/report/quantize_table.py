"""What `fewbit quantize` tells a person at the end."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fewbit.results import QuantizeResult

__all__ = ["quantize_table", "render_quantize"]


def quantize_table(result: QuantizeResult) -> Table:
    """Two columns: what, and its value."""
    table = Table(title=f"{result.model} in {result.scheme}", title_justify="left", show_header=False)
    table.add_column("what", style="dim")
    table.add_column("value", overflow="fold")
    ignored = ", ".join(result.ignored_linears[:4]) + (
        f" and {len(result.ignored_linears) - 4} more" if len(result.ignored_linears) > 4 else ""
    )
    saved = 1 - result.checkpoint_bytes / result.source_bytes
    rows = (
        ("weights", result.weights),
        ("input activations", result.input_activations),
        ("method", f"{result.method}, scales by {result.observer}"),
        ("quantized", f"{result.quantized_linears} linears, {result.quantized_parameters:,} of {result.parameters:,} parameters"),
        ("as in the source", f"{result.kept_tensors} tensors; linears left out: {ignored or 'none'}"),
        (
            "effective bits",
            f"{result.effective_bits_per_weight:.3f} per quantized weight, {result.effective_bits_per_parameter:.3f} per parameter",
        ),
        ("bytes", f"{result.checkpoint_bytes:,} (source {result.source_bytes:,}, {saved:.1%} saved)"),
        ("layout", f"{result.layout}, {result.layout_format}"),
        ("time", f"{result.duration_s:.1f} s"),
        ("directory", result.out),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table


def render_quantize(result: QuantizeResult, console: Console) -> None:
    """Print the table and how to go on."""
    console.print(quantize_table(result))
    console.print(f"Quality is not measured here: fewbit evaluate {result.out}", style="dim", highlight=False, soft_wrap=True)
