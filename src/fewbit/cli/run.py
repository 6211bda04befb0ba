"""Commands that run a model: generate in fewbit's own runtime, serve in somebody else's."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from fewbit.cli.options import (
    CheckpointArgument,
    ComputeOption,
    JsonOption,
    KernelOption,
    LmHeadOption,
    ModelArgument,
    RuntimeOption,
    StrictOption,
    example,
)
from fewbit.cli.output import print_json, terminal

__all__ = ["app", "generate", "serve"]

PANEL = "Run"
app = typer.Typer()


@app.command(rich_help_panel=PANEL, epilog=example("fewbit generate --prompt 'def fibonacci(n):' --scheme W8A16"))
def generate(
    model: ModelArgument = None,
    prompt: Annotated[str, Option(help="The text to continue.")] = "import ",
    scheme: Annotated[str | None, Option(metavar="NAME", help="The scheme to run; the checkpoint's own when left out.")] = None,
    kernel: KernelOption = None,
    max_new_tokens: Annotated[int, Option(metavar="TOKENS", min=1)] = 64,
    temperature: Annotated[float, Option(metavar="T", help="0 takes the most likely token.", min=0.0)] = 0.0,
    top_p: Annotated[float, Option(metavar="P", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, Option(metavar="SEED", help="For sampling.")] = 0,
    strict: StrictOption = False,
    compute: ComputeOption = "exact",
    lm_head: LmHeadOption = None,
    runtime: RuntimeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Continue a text, streaming tokens, and print the time per token and the kernel that ran."""
    from fewbit.runtime.runner import runtime_choice
    from fewbit.workflows.generate import generate_text

    console = terminal()
    result = generate_text(
        model,
        prompt=prompt,
        scheme=scheme,
        kernel=kernel,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        strict=strict,
        compute=compute,
        lm_head=lm_head,
        runtime=runtime_choice(runtime),
        on_text=None if json else lambda piece: console.print(piece, end="", markup=False, highlight=False, soft_wrap=True),
    )
    if json:
        print_json(result)
    else:
        console.print(f"\n\n[dim]{result.summary()}[/dim]", highlight=False)


@app.command(rich_help_panel=PANEL, epilog=example("fewbit serve quantized/w4a16 --port 8000"))
def serve(
    checkpoint: CheckpointArgument,
    runtime: Annotated[
        str | None,
        Option(metavar="NAME", help="vllm, llama.cpp or transformers; the first that is installed and loads it if left out."),
    ] = None,
    host: Annotated[str, Option(metavar="ADDRESS", help="Where it listens.")] = "127.0.0.1",
    port: Annotated[int, Option(metavar="PORT", min=1, max=65535)] = 8000,
    context: Annotated[int | None, Option(metavar="TOKENS", help="Length of a sequence; the model's own if left out.", min=1)] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the command and start nothing.")] = False,
) -> None:
    """Start the best installed server for a checkpoint with the right flags, and print a curl line that asks it."""
    from fewbit.workflows.serve import run_server, serve_plan

    plan = serve_plan(checkpoint, runtime=runtime, host=host, port=port, context=context)
    for name, reason in plan.passed_over.items():
        typer.echo(f"not {name}: {reason}", err=True)
    typer.echo(plan.shell, err=not dry_run)
    if not dry_run:
        raise typer.Exit(run_server(plan, on_ready=lambda ready: typer.echo(ready.curl)))
