"""The comparison in the terminal.

A table that wraps its cells cannot be read, so the layout follows the width: where the headline columns fit there is one wide table,
below that the columns stand in stacked tables, one for each question (memory, latency, quality, kernel), each of which fits 80 columns; a
table that would still be too wide (long labels, a narrower terminal) is continued in another.
Meaning never hangs on colour alone: pass, fail and the bound are words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fewbit.report.columns import COLUMNS, HEADLINE, OPERATORS, Section, cell_text, column_unit, lookup, sections
from fewbit.report.numbers import format_figure
from fewbit.report.results_file import to_document
from fewbit.results import CompareResults

__all__ = ["render_results"]

_WIDE: Mapping[str, Sequence[str]] = {
    "": HEADLINE,
    "in detail": (
        "disk",
        "peak",
        "fits",
        "prefill",
        "prefill_bound",
        "p95",
        "p99",
        "n",
        "generate",
        "gb_s",
        "bandwidth",
        "overhead",
        "kl",
        "runtime",
    ),
}
_NARROW: Mapping[str, Sequence[str]] = {
    "memory": ("bits", "weights", "disk", "peak", "kv", "fits"),
    "latency": ("prefill", "p50", "p95", "p99", "generate", "speedup", "n"),
    "bottleneck": ("gb_s", "bandwidth", "overhead", "bound", "prefill_bound"),
    "quality": ("perplexity", "delta", "interval", "kl", "flips", "verdict"),
    "kernel": ("runtime", "kernel"),
}
_COLOURS = {"pass": "green", "fail": "bold red", "bandwidth": "cyan", "compute": "magenta", "overhead": "yellow"}
_GAP = 2  # blanks between columns


def render_results(results: CompareResults, console: Console) -> None:
    """Print the tables, the kernels passed over, the conclusions and the warnings at the console's width.

    Raises:
        MeasurementError: a figure is not finite.
    """
    document = to_document(results)
    for section in sections(document):
        console.print()
        _print_title(section, document, console)
        headline = [_column(key, section) for key in HEADLINE if _measured(key, section)]
        layout = _WIDE if len(list(_chunks(section, headline, console.width))) == 1 else _NARROW
        for title, keys in layout.items():
            _print_columns(title, section, [_column(key, section) for key in keys if _measured(key, section)], console)
        if section.has_part("latency"):
            _print_columns("where a decode step goes, ms", section, _operator_columns(section), console)
    _print_notes(document, console)
    _print_passed_over(document, console)
    _print_list("Conclusions", document["conclusions"], console, "bold")
    _print_list("Warnings", document["warnings"], console, "bold yellow")


def _print_title(section: Section, document: Mapping[str, Any], console: Console) -> None:
    environment = document["environment"]
    if section.key == "model":
        title, about = section.model["source"], f"on {environment['cpu']}, {environment['threads']} threads"
    else:
        title, about = section.model["source"].removeprefix("shapes:"), "in real shapes, random weights"
    text = Text.assemble((title, "bold"), f" {about}")
    if section.scaled:
        text.append(f", latency and memory {section.scaled}", "yellow")
    console.print(text)


@dataclass(frozen=True)
class _Shown:
    """A column ready to print: its heading of one or two lines, and a cell for each variant."""

    heading: Text
    cells: Sequence[Text]
    justify: Literal["left", "right"]

    @property
    def width(self) -> int:
        return max(line.cell_len for text in (self.heading, *self.cells) for line in text.split())


def _measured(key: str, section: Section) -> bool:
    return section.has(COLUMNS["delta" if key == "interval" else key])


def _column(key: str, section: Section) -> _Shown:
    if key == "interval":
        return _Shown(Text.assemble("95 %\n", ("interval", "dim")), [_interval(variant) for variant in section.variants], "right")
    column = COLUMNS[key]
    unit = column_unit(column, section.variants)
    heading = Text.assemble(column.heading, f"\n{unit}" if unit else "")
    texts = [cell_text(column, variant, unit) for variant in section.variants]
    if key == "kernel":
        return _Shown(heading, [_kernel(text, variant) for text, variant in zip(texts, section.variants, strict=True)], "left")
    words = column.kind in ("text", "verdict")
    return _Shown(heading, [Text(text, _COLOURS.get(text, "")) for text in texts], "left" if words else "right")


def _operator_columns(section: Section) -> list[_Shown]:
    columns = []
    for heading, field in OPERATORS.values():
        figures = [lookup(variant, f"latency/operators/{field}") for variant in section.variants]
        columns.append(_Shown(Text(heading.replace(" ", "\n")), [Text(format_figure(figure, "ms")) for figure in figures], "right"))
    return columns


def _labels(section: Section) -> _Shown:
    return _Shown(Text("Variant"), [Text(variant["variant"]["label"]) for variant in section.variants], "left")


def _chunks(section: Section, columns: Sequence[_Shown], width: int) -> Iterator[list[_Shown]]:
    """The columns in as few tables as fit `width`, in their order; a single column wider than that stands alone."""
    labels = _labels(section).width
    chunk: list[_Shown] = []
    for column in columns:
        if chunk and labels + sum(_GAP + shown.width for shown in [*chunk, column]) > width:
            yield chunk
            chunk = []
        chunk.append(column)
    if chunk:
        yield chunk


def _print_columns(title: str, section: Section, columns: Sequence[_Shown], console: Console) -> None:
    for index, chunk in enumerate(_chunks(section, columns, console.width)):
        console.print()
        if title:
            console.print(Text(title.capitalize() + (", continued" if index else ""), "bold dim"))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
        shown = [_labels(section), *chunk]
        for column in shown:
            table.add_column(column.heading, justify=column.justify, vertical="bottom", overflow="fold")
        for row in zip(*(column.cells for column in shown), strict=True):
            table.add_row(*row)
        console.print(table)


def _kernel(text: str, variant: Mapping[str, Any]) -> Text:
    fused = all(use["fused"] for use in variant["kernels"])
    return Text(text) if fused else Text.assemble(text, (" (unfused)", "yellow"))


def _interval(variant: Mapping[str, Any]) -> Text:
    low, high = (format_figure(lookup(variant, f"quality/perplexity_delta_percent/{end}"), "percent") for end in ("low", "high"))
    return Text(f"{low.removesuffix(' %')}\u2026{high.removesuffix(' %')}", "dim")


def _print_notes(document: Mapping[str, Any], console: Console) -> None:
    """What the figures above rest on, in a few lines."""
    machine, protocol, noise = document["machine"], document["protocol"], document["noise_floor"]
    memory = document["variants"][0]["memory"]
    lines = [
        f"Machine: reads {format_figure(machine['read_bandwidth_gb_s'], 'gb_s')} GB/s, {machine['gemm_dtype']} GEMM "
        f"{format_figure(machine['gemm_gflop_s'], 'gb_s')} GFLOP/s, measured in this run. 1 MB = 1e6 bytes.",
        f"Sequences that fit: contexts of {format_figure(memory['kv_context_tokens'], 'count')} tokens in "
        f"{format_figure(memory['memory_budget_bytes'], 'bytes')} beside the weights.",
        "Speed-up: each variant in turns with BF16, so it holds while the machine's milliseconds drift from row to row.",
    ]
    if protocol:
        lines.append(
            f"Quality: {protocol['corpus']}, protocol {protocol['name']} "
            f"(context {protocol['context_length']}, stride {protocol['stride']}), "
            f"{format_figure(protocol['scored_tokens'], 'count')} tokens; changes are paired, with 95 % intervals."
        )
    threshold = next((variant["quality"]["threshold_percent"] for variant in document["variants"] if variant["quality"]), None)
    if threshold is not None:
        lines.append(f"Pass: perplexity changes by at most {format_figure(threshold, 'percent')}.")
    if noise:
        lines.append(
            f"Noise floor, BF16 against itself: perplexity {format_figure(noise['perplexity_delta_percent'], 'percent')}, KL "
            f"{format_figure(noise['kl_divergence_nats'], 'nats')} nats, flips {format_figure(noise['flip_share'], 'share')}."
        )
    console.print()
    for line in lines:
        console.print(Text(line, "dim"))


def _print_passed_over(document: Mapping[str, Any], console: Console) -> None:
    """Each reason once, with the rows that it holds for."""
    rows: dict[tuple[str, str], list[str]] = {}
    for section in sections(document):
        for variant in section.variants:
            reason = (variant.get("latency") or {}).get("runtime_reason")
            if reason:
                labels = rows.setdefault(("the engine", reason), [])
                labels += [] if variant["variant"]["label"] in labels else [variant["variant"]["label"]]
            for use in variant["kernels"]:
                for passed in use["passed_over"]:
                    labels = rows.setdefault((passed["kernel"], passed["reason"]), [])
                    if variant["variant"]["label"] not in labels:
                        labels.append(variant["variant"]["label"])
    _print_list(
        "What would be faster and did not run", [f"{', '.join(v)}: {kernel}: {why}" for (kernel, why), v in rows.items()], console, "bold"
    )


def _print_list(title: str, items: Sequence[str], console: Console, style: str) -> None:
    if not items:
        return
    console.print()
    console.print(Text(title, style))
    for item in items:
        grid = Table.grid(padding=(0, 1))
        grid.add_row("\u2022", Text(item))
        console.print(Padding(grid, (0, 0, 0, 1)))
