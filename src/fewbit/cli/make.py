"""Commands that make checkpoints: quantize and convert."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from fewbit.cli.options import JsonOption, ModelArgument, example
from fewbit.cli.output import progress_bar, show

__all__ = ["app", "convert", "quantize"]

PANEL = "Make checkpoints"
app = typer.Typer()

# What is made.
SchemeOption = Annotated[str, Option(metavar="NAME", help="Which tensors get which number format, e.g. W4A16, W8A8, FP8.")]
OutOption = Annotated[Path, Option(metavar="DIR", help="The checkpoint's directory; unfinished work waits in DIR.partial.")]
MethodOption = Annotated[
    str,
    Option(metavar="CHAIN", help="rtn, gptq, gptaq, hqq, llm_int8, awq, smoothquant, autoround, or a chain: awq+gptaq, gptq+autoround."),
]
LayoutOption = Annotated[
    str,
    Option(
        "--format",
        metavar="NAME",
        help="Who is to load it: compressed-tensors, gptq, gptq_v2, awq, gguf, bitsandbytes, torchao, modelopt or fewbit.",
    ),
]
GroupSizeOption = Annotated[int | None, Option(metavar="SIZE", help="Weights that share a scale, in place of the scheme's.", min=1)]
ObserverOption = Annotated[str | None, Option(metavar="NAME", help="How scales are chosen: minmax or mse; the method's own when left out.")]
IgnoreOption = Annotated[
    list[str] | None,
    Option(metavar="PATTERN", help="Linears that stay in high precision besides lm_head, e.g. '*.down_proj'; may be repeated."),
]

# What the methods see, and their own settings.
CalibrationOption = Annotated[list[Path] | None, Option(metavar="FILE", help="Calibrate on this text or JSONL file; may be repeated.")]
DatasetOption = Annotated[str | None, Option(metavar="ID", help="Calibrate on a data set of the hub, ID[:CONFIG][:SPLIT].")]
SamplesOption = Annotated[int, Option(metavar="N", help="Calibration windows.", min=1)]
SequenceLengthOption = Annotated[int, Option(metavar="TOKENS", help="Tokens of a calibration window.", min=2)]
ChatTemplateOption = Annotated[bool, Option("--chat-template", help="Wrap calibration text in the model's chat template.")]
SeedOption = Annotated[int, Option(metavar="SEED", help="For drawing text, and for what methods draw.")]
ActorderOption = Annotated[str | None, Option(metavar="NAME", help="GPTQ's order of columns: none or static.")]
DampeningOption = Annotated[float | None, Option(metavar="SHARE", help="GPTQ's damping, as a share of the mean diagonal.")]
MemoryOption = Annotated[
    str | None, Option(metavar="SIZE", help="Memory for hidden states, e.g. 6GiB; what does not fit goes into DIR.partial.")
]
PrecisionOption = Annotated[str, Option(metavar="DTYPE", help="In which the model is computed: auto, float32 or bfloat16.")]

# Whether it is good enough to be written.
GateOption = Annotated[bool, Option("--gate/--no-gate", help="Compare with the model in high precision on held-out text.")]
GateTextOption = Annotated[list[Path] | None, Option(metavar="FILE", help="Held-out text of the gate; may be repeated.")]
GateThresholdOption = Annotated[float | None, Option(metavar="NATS", help="KL divergence per token above which nothing is written.")]
ForceOption = Annotated[bool, Option("--force", help="Write a checkpoint that failed the gate, marked as such.")]
OverwriteOption = Annotated[bool, Option("--overwrite", help="Replace an existing DIR, or unfinished work of another command.")]
VerifyOption = Annotated[bool, Option("--verify", help="At the end do what `fewbit verify` does, with the runtimes that are installed.")]
VerboseOption = Annotated[bool, Option("--verbose", "-v", help="Every layer in the table, not only the worst.")]

# What convert takes.
SourceArgument = Annotated[str, Argument(metavar="MODEL", help="A quantized checkpoint: a directory, a GGUF file or a hub id.")]
NewLayoutOption = Annotated[
    str,
    Option(
        "--format",
        metavar="NAME",
        help="A layout as in `quantize`, dense or dense-float32 to dequantize; of a high-precision model gguf-dense, gguf-q4_k_m, ...",
    ),
]
NewOutOption = Annotated[Path, Option(metavar="DIR", help="The checkpoint's directory, or FILE.gguf; it appears when it is whole.")]


@app.command(rich_help_panel=PANEL, epilog=example("fewbit quantize --scheme W4A16 --method gptq --out quantized/w4a16"))
def quantize(
    model: ModelArgument = None,
    *,
    scheme: SchemeOption,
    out: OutOption,
    method: MethodOption = "rtn",
    layout: LayoutOption = "compressed-tensors",
    group_size: GroupSizeOption = None,
    observer: ObserverOption = None,
    ignore: IgnoreOption = None,
    calibration: CalibrationOption = None,
    dataset: DatasetOption = None,
    samples: SamplesOption = 128,
    sequence_length: SequenceLengthOption = 512,
    chat_template: ChatTemplateOption = False,
    seed: SeedOption = 0,
    actorder: ActorderOption = None,
    dampening: DampeningOption = None,
    memory: MemoryOption = None,
    precision: PrecisionOption = "auto",
    gate: GateOption = True,
    gate_text: GateTextOption = None,
    gate_threshold: GateThresholdOption = None,
    force: ForceOption = False,
    overwrite: OverwriteOption = False,
    verify: VerifyOption = False,
    verbose: VerboseOption = False,
    json: JsonOption = False,
) -> None:
    """Make a checkpoint that other programs load; the same command goes on where it was interrupted."""
    from fewbit.report.quantize_table import estimate_text, render_quantize
    from fewbit.walk.settings import CalibrationChoice, GateChoice, walk_settings
    from fewbit.workflows.quantize import quantize_model
    from fewbit.workflows.sizes import parse_bytes

    settings = walk_settings(
        method=method,
        observer=observer,
        actorder=actorder,
        dampening=dampening,
        precision=precision,
        seed=seed,
        memory_bytes=None if memory is None else parse_bytes(memory),
        calibration=CalibrationChoice(tuple(calibration or ()), dataset, samples, sequence_length, chat_template),
        gate=GateChoice(gate, tuple(gate_text or ()), gate_threshold, force=force),
    )
    with progress_bar(quiet=json) as progress:
        result = quantize_model(
            model,
            scheme=scheme,
            out=out,
            settings=settings,
            group_size=group_size,
            ignore=("lm_head", *(ignore or ())),
            layout=layout,
            overwrite=overwrite,
            verify=("all",) if verify else None,
            progress=progress,
            on_estimate=None if json else lambda estimate: typer.echo(f"Estimate: {estimate_text(estimate)}", err=True),
        )
    show(result, partial(render_quantize, verbose=verbose), json=json)
    if result.verify is not None and not result.verify.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL, epilog=example("fewbit convert quantized/w4a16 --format gptq --out quantized/w4a16-gptq"))
def convert(
    model: SourceArgument,
    *,
    layout: NewLayoutOption,
    out: NewOutOption,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing DIR.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a quantized checkpoint in another layout with the same integers; say exactly what is lost, if anything is."""
    from fewbit.report.convert_table import render_convert
    from fewbit.workflows.convert import convert_checkpoint

    with progress_bar(quiet=json) as progress:
        result = convert_checkpoint(model, layout=layout, out=out, overwrite=overwrite, progress=progress)
    show(result, render_convert, json=json)
