"""Commands that look something up: the number formats, and the kernels of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from fewbit.cli.options import JsonOption, example
from fewbit.cli.output import show

__all__ = ["app", "formats", "kernels"]

PANEL = "Look up"
app = typer.Typer()


@app.command(
    rich_help_panel=PANEL,
    epilog=example("fewbit formats --tensor model.safetensors:model.layers.0.mlp.down_proj.weight --out results/formats"),
)
def formats(
    tensor: Annotated[
        str | None, Option(metavar="FILE:NAME", help="A tensor of a safetensors file, in place of the bundled model's.")
    ] = None,
    out: Annotated[Path | None, Option(metavar="DIR", help="Write the figures here.")] = None,
    json: JsonOption = False,
) -> None:
    """Show each number format, and the error and overhead of each granularity on Gaussian, heavy-tailed and real weights."""
    from fewbit.report.format_tables import render_formats
    from fewbit.workflows.formats import describe_formats

    result = describe_formats(tensor)
    if out is not None:
        from fewbit.report.format_figures import write_format_figures

        write_format_figures(result, out)
    show(result, render_formats, json=json)


@app.command(rich_help_panel=PANEL, epilog=example("fewbit kernels --out-features 8960 --in-features 1536"))
def kernels(
    out_features: Annotated[int, Option(metavar="N", help="Rows of the weight.", min=1)] = 4096,
    in_features: Annotated[int, Option(metavar="N", help="Columns of the weight.", min=1)] = 4096,
    json: JsonOption = False,
) -> None:
    """Show which kernel this machine runs for each scheme, and why not the others."""
    from fewbit.report.kernel_tables import render_kernels
    from fewbit.workflows.kernels import list_kernels

    result = list_kernels((out_features, in_features))
    show(result, render_kernels, json=json)
