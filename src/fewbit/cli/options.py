"""The options that several commands take, each written once, and the reading of lists in one argument.

An option is a type: `Annotated[int, Option(...)]`. A command puts it into its signature, with the default that fits there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fewbit.errors import UsageError

__all__ = [
    "BandwidthOption",
    "CheckpointArgument",
    "ComputeOption",
    "ContextOption",
    "CorpusOption",
    "CountersOption",
    "HardwareFileOption",
    "HeadDimOption",
    "JsonOption",
    "KernelOption",
    "KvHeadsOption",
    "LayersOption",
    "LmHeadOption",
    "MachineFileOption",
    "ModelArgument",
    "PlannedModelArgument",
    "PromptTokensOption",
    "ProtocolOption",
    "RuntimeOption",
    "StrictOption",
    "TextOption",
    "ThresholdOption",
    "example",
    "numbers",
    "words",
]

# What is worked on.
ModelArgument = Annotated[
    str | None,
    Argument(metavar="MODEL", help="A local Hugging Face directory or a hub id; the bundled reference model when left out."),
]
PlannedModelArgument = Annotated[
    str | None,
    Argument(
        metavar="MODEL",
        help="A directory, a config.json, a hub id, published shapes such as llama-3-70b, or a count such as 7e9; no weights are read.",
    ),
]
CheckpointArgument = Annotated[str, Argument(metavar="DIR", help="A checkpoint by any tool: a Hugging Face directory or a GGUF file.")]

# How it runs.
KernelOption = Annotated[str | None, Option(metavar="NAME", help="A kernel's name, or 'unfused'; the fastest when left out.")]
ComputeOption = Annotated[
    str, Option(metavar="MODE", help="exact, or int8-activations: kernels may quantize their inputs to INT8 on the fly.")
]
LmHeadOption = Annotated[
    str | None, Option("--lm-head", metavar="NAME", help="Format of the output head: bf16, int8, int4, int3, int2, fp8, nf4, ...")
]
RuntimeOption = Annotated[
    str, Option(metavar="NAME", help="Who runs the passes: engine, transformers, or auto: the engine wherever it can.")
]
StrictOption = Annotated[bool, Option("--strict", help="Fail instead of running a slower kernel where a fused one exists for the format.")]

# What latency and quality are measured on.
PromptTokensOption = Annotated[int, Option(metavar="TOKENS", help="Prompt length of the prefill measurement.", min=1)]
ContextOption = Annotated[int, Option(metavar="TOKENS", help="Tokens in the KV cache while decode is measured.", min=1)]
CountersOption = Annotated[bool, Option("--counters", help="Also read hardware counters, where perf is there.")]
TextOption = Annotated[list[Path] | None, Option("--text", help="Measure quality on this UTF-8 file; may be repeated.", metavar="FILE")]
CorpusOption = Annotated[str | None, Option(metavar="NAME", help="stdlib (default), wikitext2 (from the hub) or wikitext2:FILE.")]
ProtocolOption = Annotated[str | None, Option(metavar="NAME", help="stdlib, standard-2048 or lab-512; the corpus's own when left out.")]
ThresholdOption = Annotated[
    float, Option(metavar="PERCENT", help="Largest increase of perplexity over BF16 that passes, in percent.", min=0.0)
]

# Devices, and models that are known by their shapes alone.
HardwareFileOption = Annotated[
    Path | None, Option(metavar="FILE", help="TOML with further devices, in the form of fewbit's own predict/hardware.toml.")
]
MachineFileOption = Annotated[Path | None, Option(metavar="FILE", help="For this-machine: what fewbit bench --machine --json printed.")]
BandwidthOption = Annotated[float | None, Option(metavar="GB/S", help="In place of the data sheet's, 1e9 bytes per second.")]
LayersOption = Annotated[int, Option(metavar="N", help="For a bare parameter count: layers of the KV cache.", min=0)]
KvHeadsOption = Annotated[int, Option(metavar="N", help="For a bare parameter count: heads of keys and values.", min=0)]
HeadDimOption = Annotated[int, Option(metavar="N", help="For a bare parameter count: width of a head.", min=0)]

JsonOption = Annotated[bool, Option("--json", help="Print the result as JSON on stdout instead of tables.")]


def example(text: str) -> str:
    """What stands below a command's help."""
    return f"Example: [bold]{text}[/bold]"


def words(text: str | None) -> list[str]:
    """The words of a list with commas; None is the empty list."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def numbers(text: str | None, option: str) -> list[int]:
    """The whole numbers of a list with commas; `option` is named in the error.

    Raises:
        UsageError: something in it is no whole number.
    """
    try:
        return [int(word) for word in words(text)]
    except ValueError as error:
        raise UsageError(f"{option} '{text}' is no list of whole numbers", "write for example 1,8,32") from error
