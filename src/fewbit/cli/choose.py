"""Commands that choose from data sheets, predictions and what was measured: plan, predict, decide. None of them reads weights."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from fewbit.cli.options import (
    BandwidthOption,
    ComputeOption,
    HardwareFileOption,
    HeadDimOption,
    JsonOption,
    KvHeadsOption,
    LayersOption,
    MachineFileOption,
    PlannedModelArgument,
    example,
    numbers,
    words,
)
from fewbit.cli.output import show, terminal
from fewbit.errors import UsageError

__all__ = ["app", "decide", "plan", "predict"]

PANEL = "Choose"
app = typer.Typer()

CostMethodOption = Annotated[str, Option(metavar="CHAIN", help="For --cost: how the numbers are chosen; the usual method if left out.")]
MeasuredOption = Annotated[
    list[str] | None,
    Option(
        metavar="WORDS|FILE",
        help="What you measured: 'bf16 decode 94 ms', 'W4A16 prefill 16 x 1024 13 s', or a file (JSON, CSV, TXT); may be repeated.",
    ),
]
EstimatorOption = Annotated[
    str, Option(metavar="NAME", help="model, or bandwidth: nominal bits over the bandwidth, scaled by what was measured.")
]
OverheadsOption = Annotated[
    str | None,
    Option(metavar="NAME", help="Software whose kernels are known apart: llama.cpp, torch or tensorrt-llm; else the class's own."),
]
ModelsArgument = Annotated[
    list[str],
    Argument(metavar="MODEL...", help="Directories, config.json files, hub ids, published shapes, or counts such as 7e9."),
]
WorkloadOption = Annotated[
    str,
    Option(metavar="NAME", help="chat, single-stream, batch, prefill-heavy, edge, long-context, or a TOML file."),
]
QualityLossOption = Annotated[float | None, Option(metavar="PERCENT", help="Largest increase of perplexity over BF16; 5 if left out.")]
QualityOption = Annotated[Path | None, Option(metavar="DIR", help="Results of fewbit compare on this model, in place of priors.")]
PerplexityOption = Annotated[str | None, Option(metavar="LIST", help="Measured perplexities, e.g. 'bf16=12.4,int8=12.48,nf4=13.39'.")]
MeasuredHereOption = Annotated[
    list[str] | None, Option(metavar="WORDS|FILE", help="Times measured on the device, as fewbit predict takes them.")
]
RuntimeOption = Annotated[
    str | None, Option(metavar="NAME", help="The only runtime that may be used, e.g. vLLM or TensorRT-LLM; any if left out.")
]
PriceOption = Annotated[
    list[str] | None, Option(metavar="PRICE", help="Per hour, 2.5 or h100-sxm=2.5, for the cost of tokens; may be repeated.")
]
PageOption = Annotated[
    Path | None, Option(metavar="DIR", help="Write decide.html (with sliders), decide.json, decide.csv and figures here.")
]


@app.command(
    rich_help_panel=PANEL,
    epilog=example("fewbit plan qwen2.5-7b --scheme W4A16 --kv KV-INT8 --hardware jetson-agx-orin-64gb --batch 16"),
)
def plan(
    model: PlannedModelArgument = None,
    scheme: Annotated[str, Option(metavar="NAME", help="Formats of weights and inputs, e.g. W4A16, W8A8, FP8, NVFP4.")] = "W4A16",
    kv: Annotated[str | None, Option(metavar="NAME", help="Format of the KV cache: BF16, KV-INT8, KV-FP8 or KV-INT4.")] = None,
    hardware: Annotated[str | None, Option(metavar="NAME", help="A device, e.g. h100-sxm or jetson-agx-orin-64gb.")] = None,
    hardware_file: HardwareFileOption = None,
    batch: Annotated[int, Option(metavar="N", help="Sequences at once.", min=1)] = 1,
    context: Annotated[int, Option(metavar="TOKENS", help="Tokens of each sequence.", min=1)] = 4096,
    layers: LayersOption = 0,
    kv_heads: KvHeadsOption = 0,
    head_dim: HeadDimOption = 0,
    method: CostMethodOption = "",
    cost: Annotated[bool, Option("--cost", help="Estimate memory, disk and time of making the checkpoint on this machine.")] = False,
    csv: Annotated[Path | None, Option("--csv", metavar="FILE", help="Write the classes of tensors here.")] = None,
    svg: Annotated[Path | None, Option("--svg", metavar="FILE", help="Draw memory against context and batch here.")] = None,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Every class, with risks and fallbacks.")] = False,
    json: JsonOption = False,
) -> None:
    """Show what a scheme makes of every class of tensors, and what fits, from the configuration alone."""
    from fewbit.report.files import write_text
    from fewbit.report.plan_table import plan_csv, render_plan
    from fewbit.workflows.plan import plan_model

    if hardware_file is not None and hardware is None:
        raise UsageError("--hardware-file was given and no device", "name one of its devices with --hardware")
    result = plan_model(
        model,
        scheme=scheme,
        kv=kv,
        hardware=hardware,
        hardware_file=hardware_file,
        batch=batch,
        context=context,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        method=method,
        cost=cost,
        figure=svg,
    )
    if csv is not None:
        write_text(csv, plan_csv(result))
    show(result, partial(render_plan, verbose=verbose), json=json)


@app.command(rich_help_panel=PANEL, epilog=example('fewbit predict 7e9 --hardware agx-orin-64gb --measured "bf16 decode 94 ms"'))
def predict(
    model: PlannedModelArgument = None,
    *,
    hardware: Annotated[str, Option(metavar="NAME", help="A device, e.g. h100-sxm; this-machine is measured.")],
    hardware_file: HardwareFileOption = None,
    machine: MachineFileOption = None,
    bandwidth: BandwidthOption = None,
    measured: MeasuredOption = None,
    estimator: EstimatorOption = "model",
    runtime: OverheadsOption = None,
    compute: ComputeOption = "exact",
    schemes: Annotated[str | None, Option(metavar="NAMES", help="Comma-separated, e.g. BF16,INT8,INT4,FP8,NVFP4,W8A8.")] = None,
    phase: Annotated[str | None, Option(metavar="NAMES", help="decode, prefill or both with a comma.")] = None,
    kv: Annotated[str | None, Option(metavar="NAMES", help="Formats of the KV cache: BF16, KV-INT8, KV-FP8, KV-INT4.")] = None,
    batch: Annotated[str | None, Option(metavar="N,N", help="Sequences at once, several with commas.")] = None,
    context: Annotated[str | None, Option(metavar="N,N", help="Tokens cached (decode) or of each prompt (prefill).")] = None,
    layers: LayersOption = 0,
    kv_heads: KvHeadsOption = 0,
    head_dim: HeadDimOption = 0,
    explain: Annotated[bool, Option("--explain", help="Print every term of every step, and the factors behind them.")] = False,
    csv: Annotated[Path | None, Option("--csv", metavar="FILE", help="Write the predicted steps here.")] = None,
    figures: Annotated[Path | None, Option("--figures", metavar="DIR", help="Write latency-bytes.svg and roofline.svg here.")] = None,
    json: JsonOption = False,
) -> None:
    """Predict the time of prefill and decode on a device, with 90 % intervals, from its data sheet and whatever was measured."""
    from fewbit.report.files import write_text
    from fewbit.report.predict_table import predict_csv, render_predict
    from fewbit.workflows.predict import predict_model

    result = predict_model(
        model,
        hardware=hardware,
        hardware_file=hardware_file,
        machine=machine,
        bandwidth_gb_s=bandwidth,
        measured=measured or (),
        estimator=estimator,
        runtime=runtime,
        compute=compute,
        schemes=words(schemes),
        phases=words(phase),
        kv=words(kv),
        batches=numbers(batch, "--batch"),
        contexts=numbers(context, "--context"),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    if csv is not None:
        write_text(csv, predict_csv(result))
    if figures is not None:
        from fewbit.report.predict_figures import write_predict_figures

        write_predict_figures(result, figures)
    show(result, partial(render_predict, explain=explain), json=json)


@app.command(rich_help_panel=PANEL, epilog=example("fewbit decide qwen2.5-7b --hardware jetson-agx-orin-64gb --workload edge --batch 16"))
def decide(
    models: ModelsArgument,
    *,
    hardware: Annotated[list[str], Option(metavar="NAME", help="A device, e.g. h100-sxm or jetson-agx-orin-64gb; may be repeated.")],
    hardware_file: HardwareFileOption = None,
    machine: MachineFileOption = None,
    workload: WorkloadOption = "chat",
    batch: Annotated[int | None, Option(metavar="N", help="Sequences at once, in place of the workload's.")] = None,
    prompt: Annotated[int | None, Option(metavar="TOKENS", help="Tokens of each prompt, in place of the workload's.")] = None,
    new_tokens: Annotated[int | None, Option(metavar="TOKENS", help="Tokens of each answer, in place of the workload's.")] = None,
    max_latency: Annotated[float | None, Option(metavar="MS", help="Longest time per output token.")] = None,
    max_ttft: Annotated[float | None, Option(metavar="MS", help="Longest time to the first token of a prompt.")] = None,
    max_quality_loss: QualityLossOption = None,
    quality: QualityOption = None,
    perplexity: PerplexityOption = None,
    measured: MeasuredHereOption = None,
    bandwidth: BandwidthOption = None,
    runtime: RuntimeOption = None,
    price: PriceOption = None,
    layers: LayersOption = 0,
    kv_heads: KvHeadsOption = 0,
    head_dim: HeadDimOption = 0,
    out: PageOption = None,
    csv: Annotated[Path | None, Option("--csv", metavar="FILE", help="Write every candidate of every cell here.")] = None,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Every candidate, those that do not fit, too.")] = False,
    json: JsonOption = False,
) -> None:
    """Choose what to deploy: weights and KV cache for each model and device, the reason, the rejected ones, what to measure next."""
    from fewbit.report.decide_table import decide_csv, render_decide
    from fewbit.report.files import write_text
    from fewbit.workflows.decide import decide_deployment, parse_prices

    result = decide_deployment(
        models,
        hardware,
        workload=workload,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        max_ms_per_token=max_latency,
        max_ttft_ms=max_ttft,
        max_quality_loss=max_quality_loss,
        quality=quality,
        perplexity=perplexity,
        measured=measured or (),
        bandwidth_gb_s=bandwidth,
        runtime=runtime,
        prices=parse_prices(price or ()),
        hardware_file=hardware_file,
        machine=machine,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        out=out,
        command=" ".join(["fewbit", *sys.argv[1:]]),
    )
    if csv is not None:
        write_text(csv, decide_csv(result))
    show(result, partial(render_decide, verbose=verbose), json=json)
    if out is not None and not json:
        terminal().print(f"\nPage: {out / 'decide.html'}", highlight=False, soft_wrap=True)
