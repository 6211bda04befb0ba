"""Commands that check a checkpoint by any tool: inspect reads what it says, verify finds out whether it is true."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from fewbit.cli.options import CheckpointArgument, JsonOption, TextOption, example
from fewbit.cli.output import progress_bar, show

__all__ = ["app", "inspect", "verify"]

PANEL = "Check checkpoints"
app = typer.Typer()


@app.command(rich_help_panel=PANEL, epilog=example("fewbit inspect quantized/w4a16"))
def inspect(
    checkpoint: Annotated[str, Argument(metavar="MODEL", help="A checkpoint by any tool: a directory, a GGUF file or a hub id.")],
    json: JsonOption = False,
) -> None:
    """Show what is quantized and how, how many bits that takes, who loads and runs it and who does not, and what contradicts itself.

    The exit code is 1 when something does.
    """
    from fewbit.report.inspect_table import render_inspect
    from fewbit.workflows.inspect import inspect_checkpoint

    result = inspect_checkpoint(checkpoint)
    show(result, render_inspect, json=json)
    if result.problems:
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL, epilog=example("fewbit verify quantized/w4a16 --against models/mine --runtime vllm"))
def verify(
    checkpoint: CheckpointArgument,
    against: Annotated[str | None, Option(metavar="MODEL", help="The model in high precision that it was made from.")] = None,
    runtime: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="transformers, vllm, llama.cpp, openvino, none, or all that are installed (default); may be repeated."),
    ] = None,
    text: TextOption = None,
    json: JsonOption = False,
) -> None:
    """Check a checkpoint: read and compare every tensor, let the installed runtimes load it, and see that a damaged copy fails.

    The exit code is 1 when something is wrong with it.
    """
    from fewbit.report.verify_table import render_verify
    from fewbit.workflows.verify import verify_checkpoint

    names = [] if runtime == ["none"] else runtime or ["all"]
    with progress_bar(quiet=json) as progress:
        result = verify_checkpoint(
            checkpoint,
            against=against,
            runtime_names=names,
            texts=text or (),
            progress=lambda what: progress(0, 1, what),
        )
    show(result, render_verify, json=json)
    if not result.passed:
        raise typer.Exit(1)
