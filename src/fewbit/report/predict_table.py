"""The terminal page of `fewbit predict`, and its CSV."""

from __future__ import annotations

import csv
import io

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fewbit.predict.prediction import Estimate, Prediction, PredictResults
from fewbit.report.numbers import MISSING, format_figure

__all__ = ["predict_csv", "render_predict"]


def render_predict(results: PredictResults, console: Console, *, explain: bool = False) -> None:
    """Print the predicted steps, what follows from them, what was measured, and what to measure next.

    Args:
        explain: also every term of every step, and the factors that calibration arrived at.
    """
    console.print(_steps_table(results))
    if explain:
        for prediction in results.predictions:
            console.print(_terms_table(prediction))
        if results.factors:
            console.print(_factors_table(results))
    for title, lines in (("What follows", results.conclusions), ("Where decode turns", results.bounds)):
        if lines:
            console.print(Text(f"\n{title}", style="bold"))
            for line in lines:
                console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    if results.suggestion is not None:
        console.print(Text("\nMeasure next", style="bold"))
        console.print(f"  {results.suggestion.reason};\n  {results.suggestion.command}", highlight=False, soft_wrap=True, markup=False)
    notes = dict.fromkeys([*results.model.assumed, *(note for p in results.predictions for note in p.notes)])
    for note in notes:
        console.print(f"Note: {note}", highlight=False, soft_wrap=True, markup=False)
    for warning in results.warnings:
        console.print(Text(f"Warning: {warning}", style="yellow"), soft_wrap=True)


def _ms(estimate: Estimate) -> str:
    return format_figure(estimate.value, "ms")


def _interval(estimate: Estimate, kind: str = "ms") -> str:
    figures = [format_figure(value, "ratio" if kind == "ratio" else "ms") for value in (estimate.low, estimate.high)]
    return f"{figures[0]} to {figures[1]}"


def _title(results: PredictResults) -> str:
    scale = "" if results.calibration_scale is None else f", measured over predicted {results.calibration_scale:.2f}"
    used = sum(step.used for step in results.measured)
    points = f"{used} measured point{'s' if used != 1 else ''}{scale}" if used else "no measured point"
    estimator = "" if results.estimator == "model" else "; estimate from nominal bits over the bandwidth"
    return f"{results.model.name} on {results.hardware}, {results.bandwidth_gb_s:,g} GB/s; {points}{estimator}"


def _steps_table(results: PredictResults) -> Table:
    table = Table(title=Text(_title(results)), title_justify="left", show_edge=False, pad_edge=False)
    headings = ("phase", "scheme", "weights", "cache", "batch", "context", "path", "ms", "90 % interval", "tokens/s", "over BF16")
    for heading in (*headings, "90 % interval", "bound"):
        table.add_column(heading, justify="left" if heading in ("phase", "scheme", "weights", "cache", "path", "bound") else "right")
    for p in results.predictions:
        point = p.point
        context = f"{point.context:,}" if point.context else MISSING
        table.add_row(
            *(point.phase, point.scheme, p.format, point.kv, f"{point.batch:,}", context, p.path),
            *(_ms(p.milliseconds), _interval(p.milliseconds), _ms(p.tokens_per_s)),
            *(format_figure(p.speedup_over_bf16.value, "ratio"), _interval(p.speedup_over_bf16, "ratio"), p.bound),
        )
    return table


def _terms_table(prediction: Prediction) -> Table:
    point = prediction.point
    title = f"{point.scheme} {point.phase}, batch {point.batch}, context {point.context:,}: {_ms(prediction.milliseconds)} ms"
    floor = f"; floor of bytes and operations {format_figure(prediction.floor_milliseconds, 'ms')} ms"
    table = Table(title=Text(f"\n{title}{floor}"), title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("term", "ms", "share", "bytes", "operations", "launches", "how"):
        table.add_column(heading, justify="left" if heading in ("term", "how") else "right", overflow="fold")
    for term in prediction.terms:
        share = format_figure(term.milliseconds / prediction.milliseconds.value, "share")
        figures = (format_figure(term.bytes, "bytes"), f"{term.operations:.3g}", f"{term.operators:,}", term.explanation)
        table.add_row(term.name, format_figure(term.milliseconds, "ms"), share, *figures)
    return table


_FACTOR_MEANING = {
    "memory": "share of the bandwidth that reading 16-bit weights reaches",
    "operator_us": "microseconds that each launch costs besides its work",
    "read_8": "speed of reading fused 8-bit weights, relative to 16-bit ones",
    "read_4": "speed of reading fused 4-bit weights, relative to 16-bit ones",
    "cache": "share of the bandwidth that reading keys and values reaches",
    "compute": "share of the 16-bit peak that large products reach",
    "native": "the same of a low-precision peak, relative to it",
    "unpack": "share of the vector rate that unpacking inside a product reaches",
    "copy": "share of the bandwidth that separate passes over memory reach",
}


def _factors_table(results: PredictResults) -> Table:
    table = Table(title=Text("\nFactors after calibration"), title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("factor", "value", "90 % interval", "meaning"):
        table.add_column(heading, justify="left" if heading in ("factor", "meaning") else "right", overflow="fold")
    for name, estimate in results.factors.items():
        table.add_row(name, _ms(estimate), _interval(estimate), _FACTOR_MEANING.get(name, ""))
    return table


_CSV_COLUMNS = (
    *("phase", "scheme", "format", "kv", "batch", "context", "path", "ms", "ms_low", "ms_high", "tokens_per_s"),
    *("speedup_over_bf16", "speedup_low", "speedup_high", "bound", "floor_ms", "weight_bytes", "kv_bytes", "operations", "calibrated_from"),
)


def predict_csv(results: PredictResults) -> str:
    """One row per predicted step."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for p in results.predictions:
        point, ms, speed = p.point, p.milliseconds, p.speedup_over_bf16
        step = (point.phase, point.scheme, p.format, point.kv, point.batch, point.context, p.path)
        time = (ms.value, ms.low, ms.high, p.tokens_per_s.value, speed.value, speed.low, speed.high)
        writer.writerow((*step, *time, p.bound, p.floor_milliseconds, p.weight_bytes, p.kv_bytes, p.operations, p.calibrated_from))
    return buffer.getvalue()
