"""Commands that measure: compare, evaluate, bench, and report, which draws what compare measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from fewbit.cli.options import (
    ComputeOption,
    ContextOption,
    CorpusOption,
    CountersOption,
    JsonOption,
    KernelOption,
    LmHeadOption,
    ModelArgument,
    PromptTokensOption,
    ProtocolOption,
    RuntimeOption,
    StrictOption,
    TextOption,
    ThresholdOption,
    example,
)
from fewbit.cli.output import progress_bar, show, terminal

__all__ = ["app", "bench", "compare", "evaluate", "report"]

PANEL = "Measure"
app = typer.Typer()

VariantsOption = Annotated[str | None, Option(metavar="NAMES", help="Comma-separated rows or schemes; all default rows when left out.")]
AddShapesOption = Annotated[
    str | None, Option(metavar="NAME", help="Add latency and memory on random weights in these real shapes, e.g. qwen2.5-1.5b.")
]
OnlyShapesOption = Annotated[str | None, Option(metavar="NAME", help="Random weights in these real shapes, in place of a model.")]
ReportOption = Annotated[Path | None, Option(metavar="DIR", help="Write results.json, results.csv, figures and report.html here.")]
SomeTokensOption = Annotated[int, Option(metavar="TOKENS", help="Tokens that quality is measured on; 0 for the whole corpus.", min=0)]
AllTokensOption = Annotated[int, Option(metavar="TOKENS", help="Tokens that are scored; 0 for the whole corpus.", min=0)]
BudgetOption = Annotated[str, Option(metavar="SIZE", help="Memory in which sequences are fitted, e.g. 8GiB.")]
KvContextOption = Annotated[int, Option(metavar="TOKENS", help="Length of those sequences; cut to the model's maximum.", min=1)]
EvaluatedSchemeOption = Annotated[str | None, Option(metavar="NAME", help="The scheme to evaluate; the checkpoint's own when left out.")]
AgainstOption = Annotated[str | None, Option(help="The model in high precision to compare with; MODEL itself in BF16 when left out.")]
MachineOption = Annotated[bool, Option("--machine", help="Measure only the machine: bandwidth, and rates of the kernels that run.")]


@app.command(rich_help_panel=PANEL, epilog=example("fewbit compare --variants bf16,int8-w8a16,int4-w4a16 --out results/compare"))
def compare(
    model: ModelArgument = None,
    variants: VariantsOption = None,
    text: TextOption = None,
    corpus: CorpusOption = None,
    protocol: ProtocolOption = None,
    shapes: AddShapesOption = None,
    out: ReportOption = None,
    max_tokens: SomeTokensOption = 32_768,
    threshold: ThresholdOption = 5.0,
    prompt_tokens: PromptTokensOption = 512,
    context: ContextOption = 128,
    memory_budget: BudgetOption = "8GiB",
    kv_context: KvContextOption = 4096,
    counters: CountersOption = False,
    strict: StrictOption = False,
    compute: ComputeOption = "exact",
    lm_head: LmHeadOption = None,
    runtime: RuntimeOption = "auto",
    seed: Annotated[int, Option(metavar="SEED", help="For sampling text and for random weights.")] = 0,
    json: JsonOption = False,
) -> None:
    """Measure memory, latency and quality of each quantization of one model together, and say what to conclude."""
    from fewbit.bench.latency import LatencySettings
    from fewbit.report.table import render_results
    from fewbit.runtime.runner import runtime_choice
    from fewbit.workflows.compare import CompareSettings
    from fewbit.workflows.compare import compare as run
    from fewbit.workflows.sizes import parse_bytes

    settings = CompareSettings(
        latency=LatencySettings(prompt_tokens=prompt_tokens, context_tokens=context, counters=counters, seed=seed),
        max_tokens=max_tokens or None,
        threshold_percent=threshold,
        memory_budget_bytes=parse_bytes(memory_budget),
        kv_context_tokens=kv_context,
        strict=strict,
        runtime=runtime_choice(runtime),
        seed=seed,
    )
    with progress_bar(quiet=json) as progress:
        results = run(
            model,
            variants=variants,
            compute=compute,
            lm_head=lm_head,
            texts=text or (),
            corpus=corpus,
            protocol=protocol,
            shapes=shapes,
            out=out,
            settings=settings,
            progress=progress,
        )
    show(results, render_results, json=json)
    if out is not None and not json:
        terminal().print(f"\nReport: {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command(rich_help_panel=PANEL, epilog=example("fewbit report results/compare"))
def report(directory: Annotated[Path, Argument(metavar="DIR", help="A directory with results.json.")]) -> None:
    """Rebuild table, figures and page from a results file alone."""
    from fewbit.workflows.report import build_report

    typer.echo(build_report(directory))


@app.command(rich_help_panel=PANEL, epilog=example("fewbit evaluate --scheme W4A16"))
def evaluate(
    model: ModelArgument = None,
    scheme: EvaluatedSchemeOption = None,
    compute: ComputeOption = "exact",
    lm_head: LmHeadOption = None,
    against: AgainstOption = None,
    text: TextOption = None,
    corpus: CorpusOption = None,
    protocol: ProtocolOption = None,
    max_tokens: AllTokensOption = 0,
    threshold: ThresholdOption = 5.0,
    seed: Annotated[int, Option(metavar="SEED", help="For sampling text.")] = 0,
    json: JsonOption = False,
) -> None:
    """Measure perplexity and, for a quantized scheme, its difference to BF16 with KL divergence and flips.

    Without --max-tokens all of the text is read, as the papers do.
    """
    from fewbit.report.evaluate_table import render_evaluate
    from fewbit.workflows.evaluate import evaluate as run

    with progress_bar(quiet=json) as progress:
        result = run(
            model,
            scheme=scheme,
            compute=compute,
            lm_head=lm_head,
            against=against,
            corpus=corpus,
            texts=text or (),
            protocol=protocol,
            max_tokens=max_tokens or None,
            threshold=threshold,
            seed=seed,
            progress=progress,
        )
    show(result, render_evaluate, json=json)


@app.command(rich_help_panel=PANEL, epilog=example("fewbit bench --shapes qwen2.5-1.5b --scheme W4A16"))
def bench(
    model: ModelArgument = None,
    shapes: OnlyShapesOption = None,
    scheme: Annotated[str, Option(metavar="NAME", help="The scheme to time against BF16.")] = "W4A16",
    kernel: KernelOption = None,
    compute: ComputeOption = "exact",
    lm_head: LmHeadOption = None,
    runtime: RuntimeOption = "auto",
    prompt_tokens: PromptTokensOption = 512,
    context: ContextOption = 128,
    machine: MachineOption = False,
    counters: CountersOption = False,
    json: JsonOption = False,
) -> None:
    """Measure prefill, decode and memory of one scheme against BF16, or of the machine itself."""
    from fewbit.bench.latency import LatencySettings
    from fewbit.report.bench_table import render_bench, render_machine
    from fewbit.runtime.runner import runtime_choice
    from fewbit.workflows.bench import bench as run
    from fewbit.workflows.bench import bench_machine
    from fewbit.workflows.section import SectionSettings

    if machine:
        with progress_bar(json) as progress:
            machine_result = bench_machine(progress)
        show(machine_result, render_machine, json=json)
        return
    latency = LatencySettings(prompt_tokens=prompt_tokens, context_tokens=context, counters=counters)
    settings = SectionSettings(latency=latency, runtime=runtime_choice(runtime))
    with progress_bar(quiet=json) as progress:
        result = run(
            model, shapes=shapes, scheme=scheme, kernel=kernel, compute=compute, lm_head=lm_head, settings=settings, progress=progress
        )
    show(result, render_bench, json=json)
