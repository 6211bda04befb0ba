"""What the columns of a comparison are: headings, where the value stands in the results file, how it is shown, what it means.

The terminal table, the page and its list of definitions all read this one table. Values are addressed by JSON pointer (RFC 6901) in the
document of results.json, `/variants/3/latency/decode_ms_p50`, so that whatever is shown can be traced to the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewbit.report.numbers import Kind, byte_unit, format_figure

__all__ = [
    "COLUMNS",
    "GROUPS",
    "HEADLINE",
    "OPERATORS",
    "Column",
    "Section",
    "cell_text",
    "column_unit",
    "kernel_text",
    "lookup",
    "sections",
]

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: its name in the layouts below.
        heading: what stands above it.
        path: where the value stands below a variant, for example `latency/decode_ms_p50`; of an interval, the interval itself.
        kind: how the value is shown.
        meaning: its definition in one sentence.
        unit: shown under the heading; for `bytes` chosen by the values.
        interval: the path leads to an interval of value, low and high.
    """

    key: str
    heading: str
    path: str
    kind: Kind
    meaning: str
    unit: str = ""
    interval: bool = False

    @property
    def value_path(self) -> str:
        return f"{self.path}/value" if self.interval else self.path


_ALL = (
    Column(
        "bits",
        "Bits",
        "memory/effective_bits_per_weight",
        "bits",
        "Effective bits per weight of the quantized linears: values, scales and zero points.",
        "/weight",
    ),
    Column(
        "bits_all",
        "Bits, all",
        "memory/effective_bits_per_parameter",
        "bits",
        "Effective bits per parameter of the whole model: what stays in BF16 (embeddings, norms, lm_head) counted.",
        "/param",
    ),
    Column(
        "weights", "Weights", "memory/resident_weight_bytes", "bytes", "Bytes of all parameters and packed weights that stay in memory."
    ),
    Column(
        "linears",
        "Linears",
        "memory/quantized_linear_bytes",
        "bytes",
        "Of the weights, those of the quantized linears, scales and zero points included.",
    ),
    Column(
        "disk", "On disk", "memory/disk_bytes", "bytes", "Bytes of the checkpoint's weight files; not every format has a checkpoint layout."
    ),
    Column(
        "peak",
        "Peak RSS",
        "memory/peak_rss_bytes",
        "bytes",
        "Highest resident memory of a fresh process that loads the variant, runs a prefill and a few decode steps.",
    ),
    Column(
        "kv",
        "KV cache",
        "memory/kv_bytes_per_token",
        "bytes",
        "Bytes that one more token in the cache costs, scales and zero points included.",
    ),
    Column(
        "kv_constant",
        "KV const.",
        "memory/kv_constant_bytes",
        "bytes",
        "Bytes of cache per sequence that do not grow: the newest tokens, kept in BF16.",
    ),
    Column(
        "fits",
        "Sequences",
        "memory/kv_sequences_that_fit",
        "count",
        "How many sequences of the stated context fit into the stated memory budget beside the weights.",
        "that fit",
    ),
    Column("prefill", "Prefill", "latency/prefill_ms", "ms", "Time to read the prompt in one pass.", "ms"),
    Column(
        "prefill_speedup",
        "Prefill",
        "latency/prefill_speedup_over_bf16",
        "ratio",
        "Prefill time of BF16 over that of the variant.",
        "vs BF16",
    ),
    Column("p50", "Decode", "latency/decode_ms_p50", "ms", "Time of one decode step: one token, one sequence. Median.", "ms"),
    Column("p95", "p95", "latency/decode_ms_p95", "ms", "95th percentile of the decode steps.", "ms"),
    Column("p99", "p99", "latency/decode_ms_p99", "ms", "99th percentile of the decode steps; shown from 100 steps on.", "ms"),
    Column("n", "Steps", "latency/decode_n", "count", "Decode steps measured.", "n"),
    Column("generate", "32 tokens", "latency/generate_32_ms", "ms", "Prefill of the prompt and 32 decoded tokens.", "ms"),
    Column(
        "speedup",
        "Speed-up",
        "latency/speedup_over_bf16",
        "ratio",
        "Decode time of BF16 over that of the variant, in blocks taken in turns, so it holds while milliseconds drift; above 1 is faster.",
        "vs BF16",
        True,
    ),
    Column(
        "gb_s",
        "Weights",
        "latency/achieved_weight_gb_s",
        "gb_s",
        "Weight bytes read per decode step over its time (1 GB/s = 1e9 bytes per second).",
        "GB/s",
    ),
    Column(
        "bandwidth",
        "Of memory",
        "latency/bandwidth_share",
        "share",
        "Memory traffic of a step, an unfused kernel's copies included, as a share of the read bandwidth probed beside the steps.",
        "bandwidth",
    ),
    Column(
        "overhead",
        "Overhead",
        "latency/overhead_share",
        "share",
        "Time of the same step with every linear emptied, over the step.",
        "of step",
    ),
    Column(
        "bound",
        "Decode",
        "latency/bound",
        "text",
        "What limits a decode step: overhead when that is half of the step or more, "
        "else bandwidth when half of the machine's is used, else compute.",
        "bound by",
    ),
    Column("prefill_bound", "Prefill", "latency/prefill_bound", "text", "What limits the prefill, named from its own shares.", "bound by"),
    Column(
        "perplexity",
        "Perplexity",
        "quality/perplexity",
        "perplexity",
        "exp of the mean negative log-likelihood per token; lower is better; comparable only under one protocol.",
        "",
        True,
    ),
    Column(
        "delta",
        "\u0394 ppl",
        "quality/perplexity_delta_percent",
        "percent",
        "Change of perplexity against BF16 on the same tokens, from paired differences.",
        "vs BF16",
        True,
    ),
    Column(
        "kl",
        "KL div.",
        "quality/kl_divergence_nats",
        "nats",
        "Mean Kullback-Leibler divergence KL(BF16 || variant) per token.",
        "nats",
        True,
    ),
    Column(
        "flips", "Flips", "quality/flip_share", "share", "Share of positions whose most likely token is another than BF16's.", "top-1", True
    ),
    Column("verdict", "Verdict", "quality/passed", "verdict", "pass when the change of perplexity is within the threshold, else fail."),
    Column(
        "runtime", "Run by", "latency/runtime", "text", "Who ran the passes: fewbit's engine, or transformers with the linears swapped."
    ),
    Column("kernel", "Kernel", "kernels", "text", "The kernel that ran; fused: no dequantized copy of the weight is written to memory."),
)
COLUMNS: Mapping[str, Column] = {column.key: column for column in _ALL}

HEADLINE: Sequence[str] = ("bits", "weights", "kv", "p50", "speedup", "bound", "perplexity", "delta", "flips", "verdict", "kernel")
"""The columns of the one wide table."""

GROUPS: Mapping[str, Sequence[str]] = {
    "Memory": ("bits", "bits_all", "weights", "linears", "disk", "peak", "kv", "kv_constant", "fits"),
    "Latency": (
        "prefill",
        "p50",
        "p95",
        "p99",
        "n",
        "generate",
        "speedup",
        "prefill_speedup",
        "gb_s",
        "bandwidth",
        "overhead",
        "bound",
        "prefill_bound",
        "runtime",
    ),
    "Quality": ("perplexity", "delta", "kl", "flips", "verdict"),
}
"""Every column, by what it measures."""

OPERATORS: Mapping[str, tuple[str, str]] = {
    "ffn": ("FFN projections", "ffn_projections_ms"),
    "attention_projections": ("Attention projections", "attention_projections_ms"),
    "attention": ("Attention", "attention_ms"),
    "lm_head": ("lm_head", "lm_head_ms"),
    "rest": ("The rest", "rest_ms"),
}
"""Operator classes of a decode step: heading and field of OperatorTimes."""


@dataclass(frozen=True)
class Section:
    """One comparison in the document: the model itself, or the stack in real shapes.

    Attributes:
        key: `model` or `shapes`.
        model: the ModelInfo as it stands in the document.
        pointer: where the list of variants stands.
        variants: that list.
        note: how it was measured, in words; may be empty.
    """

    key: str
    model: Mapping[str, Any]
    pointer: str
    variants: Sequence[Mapping[str, Any]]
    note: str = ""

    @property
    def scaled(self) -> str:
        """`scaled from 4 of 28 layers`, or empty when the whole model ran."""
        measured, total = self.model["layers_measured"], self.model["layers_total"]
        return f"scaled from {measured} of {total} layers" if measured != total else ""

    def has(self, column: Column) -> bool:
        """Whether any row was measured in this column."""
        return any(lookup(variant, column.value_path) not in (None, []) for variant in self.variants)

    def has_part(self, part: str) -> bool:
        """Whether any row has a `latency` or a `quality`."""
        return any(variant.get(part) is not None for variant in self.variants)


def sections(document: Document) -> list[Section]:
    """The model's section and, when measured, that of the shapes."""
    found = [Section("model", document["model"], "/variants", document["variants"])]
    shapes = document.get("shapes")
    if shapes:
        found.append(Section("shapes", shapes["model"], "/shapes/variants", shapes["variants"], shapes.get("note", "")))
    return found


def lookup(node: Any, pointer: str) -> Any:
    """The value at a JSON pointer, with or without its leading slash; None when a container on the way is None.

    Raises:
        KeyError, IndexError: the document has no such member.
    """
    for part in pointer.strip("/").split("/"):
        if node is None:
            return None
        node = node[int(part)] if isinstance(node, Sequence) else node[part]
    return node


def column_unit(column: Column, variants: Sequence[Mapping[str, Any]]) -> str:
    """The unit under the heading; one unit of bytes for all rows."""
    if column.kind != "bytes":
        return column.unit
    return byte_unit(lookup(variant, column.value_path) for variant in variants)


def cell_text(column: Column, variant: Mapping[str, Any], unit: str) -> str:
    """The text of a cell; for `kernel` the kernels' names."""
    if column.key == "kernel":
        return kernel_text(variant["kernels"])
    return format_figure(lookup(variant, column.value_path), column.kind, unit if column.kind == "bytes" else "")


def kernel_text(uses: Sequence[Mapping[str, Any]]) -> str:
    """`torch-int4pack`; when several kernels ran, each with its number of linears."""
    counts: dict[str, int] = {}
    for use in uses:
        counts[use["kernel"]] = counts.get(use["kernel"], 0) + use["linears"]
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{kernel} \u00d7{count}" for kernel, count in counts.items())
