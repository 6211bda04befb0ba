"""The command line: parsing of arguments and nothing else.

Each command calls one function of `fewbit.workflows` and prints what it returns, as tables or with `--json` as the result's own JSON.
Errors that fewbit raises on purpose end in one line on stderr and exit code 2; `--debug` shows the traceback. Heavy imports happen inside
the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.errors import FewbitError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["app", "main"]

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

app = typer.Typer(
    name="fewbit",
    help="Which quantization to deploy: measures memory, latency and quality of the same weights together, makes the checkpoint, says why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A local Hugging Face directory or a hub id; the bundled reference model when left out."),
]
PlannedModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A directory, a config.json, a hub id, published shapes such as llama-3-70b, or a count such as 7e9; no weights are read.",
    ),
]
HardwareOption = Annotated[str | None, typer.Option(metavar="NAME", help="A device, e.g. h100-sxm or jetson-agx-orin-64gb.")]
HardwareFileOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="TOML with further devices, in the form of fewbit's own predict/hardware.toml.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout instead of tables.")]
TextOption = Annotated[
    list[Path] | None, typer.Option("--text", help="Measure quality on this UTF-8 file; may be repeated.", metavar="FILE")
]
CorpusOption = Annotated[str | None, typer.Option(metavar="NAME", help="stdlib (default), wikitext2 (from the hub) or wikitext2:FILE.")]
ProtocolOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="stdlib, standard-2048 or lab-512; the corpus's own when left out.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Fail instead of running a slower kernel where a fused one exists for the format.")
]

ComputeOption = Annotated[
    str, typer.Option(metavar="MODE", help="exact, or int8-activations: kernels may quantize their inputs to INT8 on the fly.")
]
LmHeadOption = Annotated[
    str | None, typer.Option("--lm-head", metavar="NAME", help="Format of the output head: bf16, int8, int4, int3, int2, fp8, nf4, ...")
]
RuntimeOption = Annotated[
    str, typer.Option(metavar="NAME", help="Who runs the passes: engine, transformers, or auto: the engine wherever it can.")
]


def _example(text: str) -> str:
    return f"Example: [bold]{text}[/bold]"


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr; silent when stderr is no terminal or `quiet`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _print_json(result: Any) -> None:
    from pydantic import TypeAdapter

    sys.stdout.write(TypeAdapter(type(result)).dump_json(result, indent=2).decode() + "\n")


def _version(value: bool) -> None:
    if value:
        from fewbit.workflows.environment import environment, environment_lines

        typer.echo("\n".join(environment_lines(environment())))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and the environment, for bug reports, and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; torch's own choice when left out.", min=1)] = None,
) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@app.command(epilog=_example("fewbit compare --variants bf16,int8-w8a16,int4-w4a16 --out results/compare"))
def compare(
    model: ModelArgument = None,
    variants: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Comma-separated rows or schemes; all default rows when left out.")
    ] = None,
    text: TextOption = None,
    corpus: CorpusOption = None,
    protocol: ProtocolOption = None,
    shapes: Annotated[
        str | None, typer.Option(metavar="NAME", help="Add latency and memory on random weights in these real shapes, e.g. qwen2.5-1.5b.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write results.json, results.csv, figures and report.html here.")] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="TOKENS", help="Tokens that quality is measured on; 0 for the whole corpus.", min=0)
    ] = 32_768,
    threshold: Annotated[
        float, typer.Option(metavar="PERCENT", help="Largest increase of perplexity over BF16 that passes, in percent.", min=0.0)
    ] = 5.0,
    prompt_tokens: Annotated[int, typer.Option(metavar="TOKENS", help="Prompt length of the prefill measurement.", min=1)] = 512,
    context: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens in the KV cache while decode is measured.", min=1)] = 128,
    memory_budget: Annotated[str, typer.Option(metavar="SIZE", help="Memory in which sequences are fitted, e.g. 8GiB.")] = "8GiB",
    kv_context: Annotated[int, typer.Option(metavar="TOKENS", help="Length of those sequences; cut to the model's maximum.", min=1)] = 4096,
    counters: Annotated[bool, typer.Option("--counters", help="Also read hardware counters, where perf is there.")] = False,
    strict: StrictOption = False,
    compute: ComputeOption = "exact",
    lm_head: LmHeadOption = None,
    runtime: RuntimeOption = "auto",
    seed: Annotated[int, typer.Option(metavar="SEED", help="For sampling text and for random weights.")] = 0,
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
    with _progress(quiet=json) as progress:
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
    if json:
        _print_json(results)
        return
    console = _console()
    render_results(results, console)
    if out is not None:
        console.print(f"\nReport: {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command(epilog=_example("fewbit report results/compare"))
def report(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory with results.json.")]) -> None:
    """Rebuild table, figures and page from a results file alone."""
    from fewbit.workflows.report import build_report

    typer.echo(build_report(directory))


@app.command(epilog=_example("fewbit evaluate --scheme W4A16"))
def evaluate(
    model: ModelArgument = None,
    scheme: Annotated[str | None, typer.Option(metavar="NAME", help="The scheme to evaluate; the checkpoint's own when left out.")] = None,
    compute: ComputeOption = "exact",
    lm_head: LmHeadOption = None,
    against: Annotated[
        str | None, typer.Option(help="The model in high precision to compare with; MODEL itself in BF16 when left out.")
    ] = None,
    text: TextOption = None,
    corpus: CorpusOption = None,
    protocol: ProtocolOption = None,
    max_tokens: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens that are scored; 0 for the whole corpus.", min=0)] = 0,
    threshold: Annotated[
        float, typer.Option(metavar="PERCENT", help="Largest increase of perplexity over BF16 that passes, in percent.", min=0.0)
    ] = 5.0,
    seed: Annotated[int, typer.Option(metavar="SEED", help="For sampling text.")] = 0,
    json: JsonOption = False,
) -> None:
    """Measure perplexity and, for a quantized scheme, its difference to BF16 with KL divergence and flips.

    Without --max-tokens all of the text is read, as the papers do.
    """
    from fewbit.report.evaluate_table import render_evaluate
    from fewbit.workflows.evaluate import evaluate as run

    with _progress(quiet=json) as progress:
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
    _print_json(result) if json else render_evaluate(result, _console())


@app.command(epilog=_example("fewbit bench --shapes qwen2.5-1.5b --scheme W4A16"))
def bench(
    model: ModelArgument = None,
    shapes: Annotated[str | None, typer.Option(metavar="NAME", help="Random weights in these real shapes, in place of a model.")] = None,
    scheme: Annotated[str, typer.Option(metavar="NAME", help="The scheme to time against BF16.")] = "W4A16",
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="A kernel's name, or 'unfused'; the fastest when left out.")] = None,
    compute: ComputeOption = "exact",
    lm_head: LmHeadOption = None,
    runtime: RuntimeOption = "auto",
    prompt_tokens: Annotated[int, typer.Option(metavar="TOKENS", help="Prompt length of the prefill measurement.", min=1)] = 512,
    context: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens in the KV cache while decode is measured.", min=1)] = 128,
    machine: Annotated[bool, typer.Option("--machine", help="Measure only the machine: bandwidth, GEMM rate, time per operator.")] = False,
    counters: Annotated[bool, typer.Option("--counters", help="Also read hardware counters, where perf is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Measure prefill, decode and memory of one scheme against BF16, or of the machine itself."""
    from fewbit.bench.latency import LatencySettings
    from fewbit.report.bench_table import render_bench, render_machine
    from fewbit.runtime.runner import runtime_choice
    from fewbit.workflows.bench import bench as run
    from fewbit.workflows.bench import bench_machine
    from fewbit.workflows.section import SectionSettings

    latency = LatencySettings(prompt_tokens=prompt_tokens, context_tokens=context, counters=counters)
    with _progress(quiet=json) as progress:
        if machine:
            result: Any = bench_machine()
        else:
            settings = SectionSettings(latency=latency, runtime=runtime_choice(runtime))
            result = run(
                model, shapes=shapes, scheme=scheme, kernel=kernel, compute=compute, lm_head=lm_head, settings=settings, progress=progress
            )
    if json:
        _print_json(result)
    else:
        (render_machine if machine else render_bench)(result, _console())


@app.command(epilog=_example("fewbit quantize --scheme W4A16 --method gptq --out quantized/w4a16"))
def quantize(
    model: ModelArgument = None,
    *,
    scheme: Annotated[str, typer.Option(metavar="NAME", help="Which tensors get which number format, e.g. W4A16, W8A8, FP8.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The checkpoint's directory; unfinished work waits in DIR.partial.")],
    method: Annotated[
        str,
        typer.Option(metavar="CHAIN", help="rtn, gptq, hqq, awq, smoothquant, autoround, llm_int8, or a chain: awq+gptq, gptq+autoround."),
    ] = "rtn",
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Who is to load it: compressed-tensors, gptq, gptq_v2, awq, gguf, bitsandbytes, torchao or modelopt.",
        ),
    ] = "compressed-tensors",
    group_size: Annotated[
        int | None, typer.Option(metavar="SIZE", help="Weights that share a scale, in place of the scheme's.", min=1)
    ] = None,
    observer: Annotated[
        str | None, typer.Option(metavar="NAME", help="How scales are chosen: minmax or mse; the method's own when left out.")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Linears that stay in high precision besides lm_head, e.g. '*.down_proj'; may be repeated."),
    ] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Calibrate on this text or JSONL file; may be repeated.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Calibrate on a data set of the hub, ID[:CONFIG][:SPLIT]."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Calibration windows.", min=1)] = 128,
    sequence_length: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of a calibration window.", min=2)] = 512,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Wrap calibration text in the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(metavar="SEED", help="For drawing text, and for what methods draw.")] = 0,
    actorder: Annotated[str | None, typer.Option(metavar="NAME", help="GPTQ's order of columns: none or static.")] = None,
    dampening: Annotated[float | None, typer.Option(metavar="SHARE", help="GPTQ's damping, as a share of the mean diagonal.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for hidden states, e.g. 6GiB; what does not fit goes into DIR.partial.")
    ] = None,
    precision: Annotated[str, typer.Option(metavar="DTYPE", help="In which the model is computed: auto, float32 or bfloat16.")] = "auto",
    gate: Annotated[bool, typer.Option("--gate/--no-gate", help="Compare with the model in high precision on held-out text.")] = True,
    gate_text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Held-out text of the gate; may be repeated."),
    ] = None,
    gate_threshold: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="KL divergence per token above which nothing is written."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write a checkpoint that failed the gate, marked as such.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing DIR, or unfinished work of another command.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="At the end do what `fewbit verify` does, with the runtimes that are installed.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every layer in the table, not only the worst.")] = False,
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
    with _progress(quiet=json) as progress:
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
    _print_json(result) if json else render_quantize(result, _console(), verbose=verbose)
    if result.verify is not None and not result.verify.passed:
        raise typer.Exit(1)


@app.command(epilog=_example("fewbit convert quantized/w4a16 --format gptq --out quantized/w4a16-gptq"))
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A quantized checkpoint: a directory, a GGUF file or a hub id.")],
    *,
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="A layout as in `quantize`, dense or dense-float32 to dequantize; of a high-precision model gguf-dense, gguf-q4_k_m, ...",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The checkpoint's directory, or FILE.gguf; it appears when it is whole.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing DIR.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a quantized checkpoint in another layout with the same integers; say exactly what is lost, if anything is."""
    from fewbit.report.convert_table import render_convert
    from fewbit.workflows.convert import convert_checkpoint

    with _progress(quiet=json) as progress:
        result = convert_checkpoint(model, layout=layout, out=out, overwrite=overwrite, progress=progress)
    _print_json(result) if json else render_convert(result, _console())


@app.command(epilog=_example("fewbit inspect quantized/w4a16"))
def inspect(
    checkpoint: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint by any tool: a directory, a GGUF file or a hub id.")],
    json: JsonOption = False,
) -> None:
    """Show what is quantized and how, how many bits that takes, who loads and runs it and who does not, and what contradicts itself.

    The exit code is 1 when something does.
    """
    from fewbit.report.inspect_table import render_inspect
    from fewbit.workflows.inspect import inspect_checkpoint

    result = inspect_checkpoint(checkpoint)
    _print_json(result) if json else render_inspect(result, _console())
    if result.problems:
        raise typer.Exit(1)


@app.command(epilog=_example("fewbit verify quantized/w4a16 --against models/mine --runtime vllm"))
def verify(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint by any tool: a Hugging Face directory or a GGUF file.")],
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="The model in high precision that it was made from.")] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="transformers, vllm, llama.cpp, openvino, none, or all that are installed (default); may be repeated."
        ),
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
    with _progress(quiet=json) as progress:
        result = verify_checkpoint(
            checkpoint,
            against=against,
            runtime_names=names,
            texts=text or (),
            progress=lambda what: progress(0, 1, what),
        )
    _print_json(result) if json else render_verify(result, _console())
    if not result.passed:
        raise typer.Exit(1)


@app.command(epilog=_example("fewbit serve quantized/w4a16 --port 8000"))
def serve(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint by any tool: a Hugging Face directory or a GGUF file.")],
    runtime: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="vllm, llama.cpp or transformers; the first that is installed and loads it if left out."),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where it listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65535)] = 8000,
    context: Annotated[int | None, typer.Option(metavar="TOKENS", help="Length of a sequence; the model's own if left out.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and start nothing.")] = False,
) -> None:
    """Start the best installed server for a checkpoint with the right flags, and print a curl line that asks it."""
    from fewbit.workflows.serve import run_server, serve_plan

    plan = serve_plan(checkpoint, runtime=runtime, host=host, port=port, context=context)
    for name, reason in plan.passed_over.items():
        typer.echo(f"not {name}: {reason}", err=True)
    typer.echo(plan.shell, err=not dry_run)
    if not dry_run:
        raise typer.Exit(run_server(plan, on_ready=lambda ready: typer.echo(ready.curl)))


@app.command(epilog=_example("fewbit plan qwen2.5-7b --scheme W4A16 --kv KV-INT8 --hardware jetson-agx-orin-64gb --batch 16"))
def plan(
    model: PlannedModelArgument = None,
    scheme: Annotated[str, typer.Option(metavar="NAME", help="Formats of weights and inputs, e.g. W4A16, W8A8, FP8, NVFP4.")] = "W4A16",
    kv: Annotated[str | None, typer.Option(metavar="NAME", help="Format of the KV cache: BF16, KV-INT8, KV-FP8 or KV-INT4.")] = None,
    hardware: HardwareOption = None,
    hardware_file: HardwareFileOption = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences at once.", min=1)] = 1,
    context: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of each sequence.", min=1)] = 4096,
    layers: Annotated[int, typer.Option(metavar="N", help="For a bare parameter count: layers of the KV cache.", min=0)] = 0,
    kv_heads: Annotated[int, typer.Option(metavar="N", help="For a bare parameter count: heads of keys and values.", min=0)] = 0,
    head_dim: Annotated[int, typer.Option(metavar="N", help="For a bare parameter count: width of a head.", min=0)] = 0,
    method: Annotated[
        str, typer.Option(metavar="CHAIN", help="For --cost: how the numbers are chosen; the usual method if left out.")
    ] = "",
    cost: Annotated[bool, typer.Option("--cost", help="Estimate memory, disk and time of making the checkpoint on this machine.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the classes of tensors here.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw memory against context and batch here.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every class, with risks and fallbacks.")] = False,
    json: JsonOption = False,
) -> None:
    """Show what a scheme makes of every class of tensors, and what fits, from the configuration alone."""
    from fewbit.workflows.plan import plan_model

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
        from fewbit.report.files import write_text
        from fewbit.report.plan_table import plan_csv

        write_text(csv, plan_csv(result))
    if json:
        _print_json(result)
        return
    from fewbit.report.plan_table import render_plan

    render_plan(result, _console(), verbose=verbose)


@app.command(epilog=_example('fewbit predict 7e9 --hardware agx-orin-64gb --measured "bf16 decode 94 ms"'))
def predict(
    model: PlannedModelArgument = None,
    *,
    hardware: Annotated[str, typer.Option(metavar="NAME", help="A device, e.g. h100-sxm; this-machine is measured.")],
    hardware_file: HardwareFileOption = None,
    machine: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For this-machine: what fewbit bench --machine --json printed.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(metavar="GB/S", help="In place of the data sheet's, 1e9 bytes per second.")] = None,
    measured: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORDS|FILE",
            help="What you measured: 'bf16 decode 94 ms', 'W4A16 prefill 16 x 1024 13 s', or a file (JSON, CSV, TXT); may be repeated.",
        ),
    ] = None,
    estimator: Annotated[
        str, typer.Option(metavar="NAME", help="model, or bandwidth: nominal bits over the bandwidth, scaled by what was measured.")
    ] = "model",
    runtime: Annotated[
        str | None, typer.Option(metavar="NAME", help="Software whose overheads are known apart: llama.cpp or torch; else the class's own.")
    ] = None,
    schemes: Annotated[str | None, typer.Option(metavar="NAMES", help="Comma-separated, e.g. BF16,INT8,INT4,FP8,NVFP4,W8A8.")] = None,
    phase: Annotated[str | None, typer.Option(metavar="NAMES", help="decode, prefill or both with a comma.")] = None,
    kv: Annotated[str | None, typer.Option(metavar="NAMES", help="Formats of the KV cache: BF16, KV-INT8, KV-FP8, KV-INT4.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="N,N", help="Sequences at once, several with commas.")] = None,
    context: Annotated[str | None, typer.Option(metavar="N,N", help="Tokens cached (decode) or of each prompt (prefill).")] = None,
    layers: Annotated[int, typer.Option(metavar="N", help="For a bare parameter count: layers of the KV cache.", min=0)] = 0,
    kv_heads: Annotated[int, typer.Option(metavar="N", help="For a bare parameter count: heads of keys and values.", min=0)] = 0,
    head_dim: Annotated[int, typer.Option(metavar="N", help="For a bare parameter count: width of a head.", min=0)] = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Print every term of every step, and the factors behind them.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the predicted steps here.")] = None,
    figures: Annotated[Path | None, typer.Option("--figures", metavar="DIR", help="Write latency-bytes.svg and roofline.svg here.")] = None,
    json: JsonOption = False,
) -> None:
    """Predict the time of prefill and decode on a device, with 90 % intervals, from its data sheet and whatever was measured."""
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
        schemes=_words(schemes),
        phases=_words(phase),
        kv=_words(kv),
        batches=_numbers(batch, "--batch"),
        contexts=_numbers(context, "--context"),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    if csv is not None:
        from fewbit.report.files import write_text
        from fewbit.report.predict_table import predict_csv

        write_text(csv, predict_csv(result))
    if figures is not None:
        from fewbit.report.predict_figures import write_predict_figures

        write_predict_figures(result, figures)
    if json:
        _print_json(result)
        return
    from fewbit.report.predict_table import render_predict

    render_predict(result, _console(), explain=explain)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _numbers(text: str | None, option: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError as error:
        raise UsageError(f"{option} '{text}' is no list of whole numbers", "write for example 1,8,32") from error


@app.command(epilog=_example("fewbit decide qwen2.5-7b --hardware jetson-agx-orin-64gb --workload edge --batch 16"))
def decide(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Directories, config.json files, hub ids, published shapes, or counts such as 7e9."),
    ],
    *,
    hardware: Annotated[list[str], typer.Option(metavar="NAME", help="A device, e.g. h100-sxm or jetson-agx-orin-64gb; may be repeated.")],
    hardware_file: HardwareFileOption = None,
    machine: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For this-machine: what fewbit bench --machine --json printed.")
    ] = None,
    workload: Annotated[
        str,
        typer.Option(metavar="NAME", help="chat, single-stream, batch, prefill-heavy, edge, long-context, or a TOML file."),
    ] = "chat",
    batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences at once, in place of the workload's.")] = None,
    prompt: Annotated[int | None, typer.Option(metavar="TOKENS", help="Tokens of each prompt, in place of the workload's.")] = None,
    new_tokens: Annotated[int | None, typer.Option(metavar="TOKENS", help="Tokens of each answer, in place of the workload's.")] = None,
    max_latency: Annotated[float | None, typer.Option(metavar="MS", help="Longest time per output token.")] = None,
    max_ttft: Annotated[float | None, typer.Option(metavar="MS", help="Longest time to the first token of a prompt.")] = None,
    max_quality_loss: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="Largest increase of perplexity over BF16; 5 if left out.")
    ] = None,
    quality: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Results of fewbit compare on this model, in place of priors.")
    ] = None,
    perplexity: Annotated[
        str | None, typer.Option(metavar="LIST", help="Measured perplexities, e.g. 'bf16=12.4,int8=12.48,nf4=13.39'.")
    ] = None,
    measured: Annotated[
        list[str] | None, typer.Option(metavar="WORDS|FILE", help="Times measured on the device, as fewbit predict takes them.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(metavar="GB/S", help="In place of the data sheet's, 1e9 bytes per second.")] = None,
    price: Annotated[
        list[str] | None, typer.Option(metavar="PRICE", help="Per hour, 2.5 or h100-sxm=2.5, for the cost of tokens; may be repeated.")
    ] = None,
    layers: Annotated[int, typer.Option(metavar="N", help="For a bare parameter count: layers of the KV cache.", min=0)] = 0,
    kv_heads: Annotated[int, typer.Option(metavar="N", help="For a bare parameter count: heads of keys and values.", min=0)] = 0,
    head_dim: Annotated[int, typer.Option(metavar="N", help="For a bare parameter count: width of a head.", min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write decide.html (with sliders), decide.json, decide.csv and figures here.")
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write every candidate of every cell here.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every candidate, those that do not fit, too.")] = False,
    json: JsonOption = False,
) -> None:
    """Choose what to deploy: weights and KV cache for each model and device, the reason, the rejected ones, what to measure next."""
    from fewbit.report.decide_table import decide_csv, render_decide
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
        from fewbit.report.files import write_text

        write_text(csv, decide_csv(result))
    if json:
        _print_json(result)
        return
    console = _console()
    render_decide(result, console, verbose=verbose)
    if out is not None:
        console.print(f"\nPage: {out / 'decide.html'}", highlight=False, soft_wrap=True)


@app.command(epilog=_example("fewbit generate --prompt 'def fibonacci(n):' --scheme W8A16"))
def generate(
    model: ModelArgument = None,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "import ",
    scheme: Annotated[str | None, typer.Option(metavar="NAME", help="The scheme to run; the checkpoint's own when left out.")] = None,
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="A kernel's name, or 'unfused'; the fastest when left out.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="TOKENS", min=1)] = 64,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 takes the most likely token.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(metavar="P", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(metavar="SEED", help="For sampling.")] = 0,
    strict: StrictOption = False,
    compute: ComputeOption = "exact",
    lm_head: LmHeadOption = None,
    runtime: RuntimeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Continue a text, streaming tokens, and print the time per token and the kernel that ran."""
    from fewbit.runtime.runner import runtime_choice
    from fewbit.workflows.generate import generate_text

    console = _console()
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
        _print_json(result)
    else:
        console.print(f"\n\n[dim]{result.summary()}[/dim]", highlight=False)


@app.command(epilog=_example("fewbit formats --tensor model.safetensors:model.layers.0.mlp.down_proj.weight --out results/formats"))
def formats(
    tensor: Annotated[
        str | None, typer.Option(metavar="FILE:NAME", help="A tensor of a safetensors file, in place of the bundled model's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the figures here.")] = None,
    json: JsonOption = False,
) -> None:
    """Show each number format, and the error and overhead of each granularity on Gaussian, heavy-tailed and real weights."""
    from fewbit.report.format_tables import render_formats
    from fewbit.workflows.formats import describe_formats

    result = describe_formats(tensor)
    if out is not None:
        from fewbit.report.format_figures import write_format_figures

        write_format_figures(result, out)
    _print_json(result) if json else render_formats(result, _console())


@app.command(epilog=_example("fewbit kernels --out-features 8960 --in-features 1536"))
def kernels(
    out_features: Annotated[int, typer.Option(metavar="N", help="Rows of the weight.", min=1)] = 4096,
    in_features: Annotated[int, typer.Option(metavar="N", help="Columns of the weight.", min=1)] = 4096,
    json: JsonOption = False,
) -> None:
    """Show which kernel this machine runs for each scheme, and why not the others."""
    from fewbit.report.kernel_tables import render_kernels
    from fewbit.workflows.kernels import list_kernels

    result = list_kernels((out_features, in_features))
    _print_json(result) if json else render_kernels(result, _console())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors raised on purpose become one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    # `--debug` may stand anywhere, also behind the command's own options.
    arguments = ["--debug"] * debug + [a for a in arguments if a != "--debug"]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings are for programmers; an error of ours is one line
    try:
        code = app(args=arguments or ["--help"], prog_name="fewbit", standalone_mode=False)
    except typer.TyperException as error:  # a command, option or value that does not parse
        command = next((a for a in arguments if not a.startswith("-")), "")
        known = command in {info.name or info.callback.__name__ for info in app.registered_commands if info.callback}
        _fail(f"{error.format_message().rstrip('.')}; see fewbit {f'{command} ' if known else ''}--help", 2, debug)
    except FewbitError as error:
        _fail(str(error), 2, debug)
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 2, debug)
    if code == _INTERRUPTED:  # what typer makes of Ctrl-C, without a word
        sys.stderr.write("fewbit: error: interrupted\n")
    raise SystemExit(code)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        raise
    sys.stderr.write(f"fewbit: error: {' '.join(message.split())}\n")
    raise SystemExit(code) from None
