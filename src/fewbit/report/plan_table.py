"""The terminal page of `fewbit plan`, and its CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import fields

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fewbit.decide.plan import PlanResults, PlanRow
from fewbit.report.numbers import BYTE_UNITS, MISSING, byte_unit, format_figure

__all__ = ["plan_csv", "render_plan"]


def render_plan(plan: PlanResults, console: Console, *, verbose: bool = False) -> None:
    """Print the classes of tensors, the formats side by side, the cache, and what fits."""
    console.print(_summary(plan))
    console.print(_rows_table(plan, verbose=verbose))
    console.print(_kernels_table(plan))
    console.print(_formats_table(plan))
    if plan.caches:
        console.print(_caches_table(plan))
    for note in plan.notes:
        console.print(f"Note: {note}", highlight=False, soft_wrap=True)


def _bytes(value: float) -> str:
    return format_figure(value, "bytes")


def _plain(title: str, *headings: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    return table


def _summary(plan: PlanResults) -> Table:
    table = Table(title=f"{plan.model} in {plan.scheme}, KV cache {plan.kv_cache}", title_justify="left", show_header=False)
    table.add_column("what", style="dim")
    table.add_column("value", overflow="fold")
    extra = f", and {plan.extra_parameters:,} stored beside them" if plan.extra_parameters else ""
    table.add_row("parameters", f"{plan.parameters:,}{extra}; {plan.active_parameters:,} per token; from {plan.source}")
    table.add_row("quantized", f"{plan.quantized_parameters:,} ({plan.quantized_parameters / plan.parameters:.1%})")
    kept = ", ".join(f"{role} {count:,}" for role, count in plan.kept.items())
    table.add_row("high precision", kept or "nothing")
    saved = 1 - plan.weights_bytes_after / plan.weights_bytes_before
    table.add_row(
        "weights", f"{_bytes(plan.weights_bytes_before)} in BF16, {_bytes(plan.weights_bytes_after)} in {plan.scheme} ({saved:.1%} saved)"
    )
    per_weight = "" if plan.effective_bits_per_weight is None else f"{plan.effective_bits_per_weight:.3f} per quantized weight, "
    table.add_row("effective bits", f"{per_weight}{plan.effective_bits_per_parameter:.3f} per parameter")
    if plan.caches:
        before, after = _bytes(plan.deployed_bytes_before), _bytes(plan.deployed_bytes_after)
        table.add_row("with cache", f"{before} to {after} for {plan.batch} x {plan.context:,} tokens")
    if plan.memory is not None:
        m = plan.memory
        parts = f"workspace {_bytes(m.workspace_bytes)}, system {_bytes(m.reserved_bytes)} (rules of thumb)"
        verdict = "fits" if m.fits else "does not fit"
        table.add_row("memory", f"{_bytes(m.total_bytes)} of {_bytes(m.capacity_bytes)} on {plan.hardware}: {verdict}; {parts}")
    if plan.cost is not None:
        from fewbit.report.quantize_table import estimate_text

        table.add_row("cost of making it", f"{estimate_text(plan.cost)} ({plan.cost_note})")
    else:
        table.add_row("cost of making it", plan.cost_note or "add --cost (imports torch and measures this machine for two seconds)")
    return table


def _rows_table(plan: PlanResults, *, verbose: bool) -> Table:
    unit = byte_unit([row.bytes_before for row in plan.rows])
    headings = ("target", "tensors", "count x shape", "format", "scales", "bits", f"before, {unit}", f"after, {unit}")
    table = _plain("Classes of tensors", *headings, left=("target", "tensors", "format", "scales"))
    for row in plan.rows:
        small = row.target == "high precision" and (len(row.shape) < 2 or row.role == "vision")
        if small and not verbose and row.role != "other":
            continue
        kept = row.bytes_before > 0 and row.target != "KV cache"
        sizes = [f"{value / BYTE_UNITS[unit]:.4g}" if kept else _small(value) for value in (row.bytes_before, row.bytes_after)]
        name = row.tensors.removeprefix("model.").removeprefix("layers.*.").removesuffix(".weight")
        table.add_row(row.target, name, _shape(row), row.format, row.scales, f"{row.effective_bits:.4g}", *sizes)
    return table


def _kernels_table(plan: PlanResults) -> Table:
    """By target and role, because all linears of a role share them."""
    kernels = bool(plan.hardware)
    headings = ["target", "role", *(["kernel", "falls back to"] if kernels else []), "risk"]
    table = _plain("What runs it, and what can go wrong", *headings, left=tuple(headings))
    seen = set()
    for row in plan.rows:
        key = (row.target, row.role, row.format)
        if key in seen or row.role == "norm" or (row.target == "high precision" and len(row.shape) < 2):
            continue
        seen.add(key)
        table.add_row(row.target, row.role, *([row.kernel, row.fallback] if kernels else []), row.risk)
    return table


def _small(value: float) -> str:
    return f"{_bytes(value)}/token" if value else MISSING


def _shape(row: PlanRow) -> str:
    size = " x ".join("tokens" if n < 0 else f"{n:,}" for n in row.shape)
    return size if row.target in ("input activations", "KV cache") else f"{row.count:,} x [{size}]"


def _formats_table(plan: PlanResults) -> Table:
    table = _plain("The whole model, side by side", "format", "nominal", "effective", "bits per parameter", "note", left=("format", "note"))
    for one in plan.formats:
        effective = MISSING if one.effective_bytes is None else _bytes(one.effective_bytes)
        bits = MISSING if one.effective_bits is None else f"{one.effective_bits:.3f}"
        table.add_row(one.format, _bytes(one.nominal_bytes), effective, bits, one.note)
    return table


def _caches_table(plan: PlanResults) -> Table:
    context = plan.caches[0].context
    headings = ["cache", "per token", f"per sequence of {context:,}"]
    headings += [f"largest batch at {context:,}", f"largest context at batch {plan.batch}", "switched on by"] if plan.hardware else []
    table = _plain("KV cache", *headings, left=("cache", "switched on by"))
    for one in plan.caches:
        cells = [one.format, _kib(one.bytes_per_token), _bytes(one.bytes_per_sequence)]
        if plan.hardware:
            cells += [*(MISSING if n is None else f"{n:,}" for n in (one.largest_batch, one.largest_context)), one.option]
        table.add_row(*cells)
    return table


def _kib(value: float) -> str:
    return f"{value / 1024:.4g} KiB"


def plan_csv(plan: PlanResults) -> str:
    """One row per class of tensors."""
    buffer = io.StringIO()
    names = [field.name for field in fields(PlanRow)]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for row in plan.rows:
        writer.writerow(["x".join(map(str, value)) if name == "shape" else value for name in names for value in (getattr(row, name),)])
    return buffer.getvalue()
