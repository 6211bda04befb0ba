"""The terminal page of `fewbit decide`, and its CSV: one row per cell, then the candidates of each with their reasons."""

from __future__ import annotations

import csv
import io

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fewbit.decide.decision import Candidate, Cell, DecideResults
from fewbit.predict.prediction import Estimate
from fewbit.report.numbers import MISSING, format_figure

__all__ = ["decide_csv", "loss_text", "render_decide"]

_COLUMNS = (
    *("model", "hardware", "verdict", "candidate", "weights", "kv_cache", "status", "acceptable", "pareto"),
    *("total_bytes", "weights_bytes", "cache_bytes", "capacity_bytes", "fits", "largest_batch"),
    *("ttft_ms", "ms_per_token", "ms_per_token_low", "ms_per_token_high", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"),
    *("speedup_over_bf16", "speedup_low", "speedup_high", "bound", "device_s_per_million_tokens", "cost_per_million_tokens"),
    *("loss_percent", "loss_low", "loss_high", "quality_probability", "quality_verdict", "quality_measured"),
    *("runtime", "kernel", "path", "cache_option", "command", "reason"),
)
_MARKS = {"chosen": "chosen", "undecided": "undecided", "rejected": ""}


def render_decide(results: DecideResults, console: Console, *, verbose: bool = False) -> None:
    """Print the decision table, and for each cell the reason, the candidates, the command and the next measurement.

    Args:
        verbose: every candidate; else those that fit and run.
    """
    work = results.workload
    limits = work.limits
    kept = [f"quality loss at most {limits.max_quality_loss_percent:g} %"]
    kept += [f"{limits.max_ms_per_token:g} ms per token"] if limits.max_ms_per_token is not None else []
    kept += [f"{limits.max_ttft_ms:g} ms to the first token"] if limits.max_ttft_ms is not None else []
    console.print(
        f"Workload {work.name}: {work.batch} x ({work.prompt:,} + {work.new_tokens:,}) tokens, best {work.goal}; {', '.join(kept)}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_decisions(results))
    for cell in results.cells:
        _render_cell(cell, console, verbose=verbose)
    for warning in results.warnings:
        console.print(f"Warning: {warning}", highlight=False, soft_wrap=True)


def _table(title: str, *headings: str, left: tuple[str, ...]) -> Table:
    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    return table


def _decisions(results: DecideResults) -> Table:
    left = ("model", "device", "verdict", "choice", "binding")
    table = _table("Decisions", "model", "device", "verdict", "choice", "binding", "memory", "ms/token", "tokens/s", "vs BF16", left=left)
    for cell in results.cells:
        chosen = cell.chosen
        figures = _figures(chosen) if chosen is not None else [MISSING] * 4
        table.add_row(cell.model, cell.label, cell.verdict, cell.choice or MISSING, cell.binding, *figures)
    return table


def _figures(one: Candidate) -> list[str]:
    memory = format_figure(one.memory.total_bytes, "bytes")
    if one.time is None:
        return [memory, MISSING, MISSING, MISSING]
    time = one.time
    return [memory, _range(time.ms_per_token), _range(time.tokens_per_s), _range(time.speedup_over_bf16)]


def loss_text(percent: float) -> str:
    """A loss in percent with two digits: +0.05, +2.4, +100."""
    return f"{percent:+.0f}" if abs(percent) >= 10 else f"{percent:+.2g}"


def _range(estimate: Estimate) -> str:
    value, low, high = (format_figure(one, "ms") for one in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _render_cell(cell: Cell, console: Console, *, verbose: bool) -> None:
    console.print()
    console.print(Text(f"{cell.model} on {cell.label}: {cell.verdict}", style="bold"))
    console.print(cell.reason, highlight=False, markup=False, soft_wrap=True)
    console.print(_candidates(cell, verbose=verbose))
    chosen = cell.chosen
    if chosen is not None:
        console.print(f"Run it with: {chosen.runtime}, {chosen.kernel} ({chosen.path})", highlight=False, markup=False, soft_wrap=True)
        console.print(f"Make it with: {chosen.command}", highlight=False, markup=False, soft_wrap=True)
        if chosen.time is not None:
            cost = chosen.time.cost_per_million_tokens
            money = "" if cost is None else f", {cost:.3g} at {cell.price_per_hour:g} per hour"
            seconds = chosen.time.device_s_per_million_tokens
            console.print(f"Cost: {seconds:,.3g} device seconds per million output tokens{money}", highlight=False, soft_wrap=True)
    if cell.next_measurement is not None:
        ask = cell.next_measurement
        console.print(f"Measure next: {ask.what}: {ask.reason}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"  {ask.command}", highlight=False, markup=False, soft_wrap=True)
    for note in cell.notes:
        console.print(f"Note: {note}", highlight=False, markup=False, soft_wrap=True)


def _candidates(cell: Cell, *, verbose: bool) -> Table:
    left = ("candidate", "runs on", "", "reason")
    headings = ("candidate", "", "memory", "TTFT ms", "ms/token", "tokens/s", "vs BF16", "loss %", "runs on", "reason")
    table = _table("Candidates", *headings, left=left)
    hidden = 0
    for one in cell.candidates:
        if not verbose and (one.time is None or not one.memory.fits):
            hidden += 1
            continue
        time = one.time
        memory, *speeds = _figures(one)
        loss = one.quality.loss_percent
        text = "0" if loss.value == 0 else loss_text(loss.value) + ("" if one.quality.measured else " (prior)")
        path = f"{one.runtime}, {one.path}" if one.runtime else MISSING
        ttft = MISSING if time is None else format_figure(time.ttft_ms.value, "ms")
        mark = " ".join(filter(None, [_MARKS[one.status], "pareto" if one.pareto else ""]))
        table.add_row(one.name, mark, memory, ttft, *speeds, text, path, one.reason)
    if hidden:
        table.caption = Text(f"{hidden} more do not fit or have nothing that runs them: --verbose")
        table.caption_justify = "left"
    return table


def decide_csv(results: DecideResults) -> str:
    """One row per candidate of every cell; units in the headings, empty where something is unknown."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for cell in results.cells:
        for one in cell.candidates:
            writer.writerow([cell.model, cell.hardware, cell.verdict, *_csv_row(one)])
    return buffer.getvalue()


def _csv_row(one: Candidate) -> list[object]:
    memory, quality, time = one.memory, one.quality, one.time
    row: list[object] = [one.name, one.weights, one.kv_cache, one.status, one.acceptable, one.pareto, memory.total_bytes]
    row += [memory.weights_bytes, memory.cache_bytes, memory.capacity_bytes, memory.fits, _blank(memory.largest_batch)]
    if time is None:
        row += [""] * 13
    else:
        row.append(time.ttft_ms.value)
        for estimate in (time.ms_per_token, time.tokens_per_s, time.speedup_over_bf16):
            row += [estimate.value, estimate.low, estimate.high]
        row += [time.bound, time.device_s_per_million_tokens, _blank(time.cost_per_million_tokens)]
    loss = quality.loss_percent
    row += [loss.value, loss.low, loss.high, quality.probability, quality.verdict, quality.measured]
    return [*row, one.runtime, one.kernel, one.path, one.cache_option, one.command, one.reason]


def _blank(value: object) -> object:
    return "" if value is None else value
