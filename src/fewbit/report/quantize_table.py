"""What `fewbit quantize` tells a person at the end."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fewbit.report.verify_table import render_verify
from fewbit.results import GateResult, Interval, LayerReport, QuantizeEstimate, QuantizeResult

__all__ = ["estimate_text", "gate_text", "layers_table", "quantize_table", "render_quantize"]

_WORST = 8


def quantize_table(result: QuantizeResult) -> Table:
    """Two columns: what, and its value."""
    table = Table(title=f"{result.model} in {result.scheme}", title_justify="left", show_header=False)
    table.add_column("what", style="dim")
    table.add_column("value", overflow="fold")
    ignored = ", ".join(result.ignored_linears[:4]) + (
        f" and {len(result.ignored_linears) - 4} more" if len(result.ignored_linears) > 4 else ""
    )
    saved = 1 - result.checkpoint_bytes / result.source_bytes
    rows = [
        ("weights", result.weights),
        ("input activations", result.input_activations),
        ("method", f"{result.method}, scales by {result.observer}"),
    ]
    if result.calibration is not None:
        c = result.calibration
        rows.append(("calibration", f"{c.source}: {c.samples} windows of {c.sequence_length} tokens, {c.held_back} held back"))
    rows += [
        ("quantized", f"{result.quantized_linears} linears, {result.quantized_parameters:,} of {result.parameters:,} parameters"),
        ("as in the source", f"{result.kept_tensors} tensors; linears left out: {ignored or 'none'}"),
        (
            "effective bits",
            f"{result.effective_bits_per_weight:.3f} per quantized weight, {result.effective_bits_per_parameter:.3f} per parameter",
        ),
        ("bytes", f"{result.checkpoint_bytes:,} (source {result.source_bytes:,}, {saved:.1%} saved)"),
        ("layout", f"{result.layout}, {result.layout_format}"),
        ("gate", gate_text(result.gate)),
        *([("estimated", estimate_text(result.estimate))] if result.estimate is not None else []),
        ("time", _time_text(result)),
        ("directory", result.out),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def estimate_text(estimate: QuantizeEstimate) -> str:
    """One line, with ranges."""
    parts = [f"memory {_bytes_text(estimate.peak_memory_bytes)}", f"disk {_bytes_text(estimate.disk_bytes)}"]
    if estimate.duration_s is not None:
        low, high = (_duration_text(value) for value in (estimate.duration_s.low, estimate.duration_s.high))
        parts.append(f"time {_duration_text(estimate.duration_s.value)} ({low} to {high})")
    return ", ".join(parts)


def _bytes_text(size: Interval) -> str:
    unit, name = (2**30, "GiB") if size.value >= 2**30 else (2**20, "MiB")
    return f"{size.value / unit:.3g} {name} ({size.low / unit:.3g} to {size.high / unit:.3g})"


def _duration_text(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def gate_text(gate: GateResult | None) -> str:
    """The gate's outcome in one line."""
    if gate is None or gate.kl_nats is None or gate.threshold_nats is None:
        return "skipped: nobody has compared this model with the one in high precision"
    kl = gate.kl_nats
    return (
        f"{gate.outcome}: KL {kl.value:.4g} nats per token ({kl.low:.4g} to {kl.high:.4g}), threshold {gate.threshold_nats:g}; perplexity "
        f"{gate.reference_perplexity:.4g} -> {gate.perplexity:.4g}, {gate.flip_share:.1%} of top-1 tokens differ; "
        f"{gate.tokens:,} tokens of {gate.text}"
    )


def layers_table(layers: list[LayerReport], title: str) -> Table:
    """One row per linear."""
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("shape", "bits", "error, RTN", "error", "kernel", "method"):
        table.add_column(name, justify="left" if name in ("kernel", "method") else "right", overflow="fold")
    for layer in layers:
        notes = f" ({'; '.join(layer.notes)})" if layer.notes else ""
        table.add_row(
            layer.name,
            f"{layer.rows} x {layer.columns}",
            f"{layer.bits:.3g}",
            _share(layer.rtn_error),
            _share(layer.error),
            layer.kernel,
            layer.method + notes,
        )
    return table


def render_quantize(result: QuantizeResult, console: Console, *, verbose: bool = False) -> None:
    """Print the layers (all, or the worst and those that fell back), the summary and how to go on."""
    chosen = result.layers if verbose else _worth_showing(result.layers)
    if chosen:
        title = "Layers" if verbose else f"Layers with the largest errors and those with notes, {len(chosen)} of {len(result.layers)}"
        console.print(layers_table(chosen, title))
    for note in result.notes:
        console.print(f"Note: {note}", highlight=False, soft_wrap=True)
    console.print(quantize_table(result))
    if result.verify is not None:
        render_verify(result.verify, console)
    console.print(f"Quality on more text: fewbit evaluate {result.out}", style="dim", highlight=False, soft_wrap=True)


def _worth_showing(layers: list[LayerReport]) -> list[LayerReport]:
    """Those with notes first of all, then the largest errors, in the model's order."""
    measured = sorted((layer for layer in layers if layer.error is not None), key=lambda layer: -(layer.error or 0.0))
    names = {layer.name for layer in measured[:_WORST]} | {layer.name for layer in [layer for layer in layers if layer.notes][:_WORST]}
    return [layer for layer in layers if layer.name in names]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _time_text(result: QuantizeResult) -> str:
    resumed = sum(block.resumed for block in result.blocks)
    text = f"{result.duration_s:.1f} s"
    if resumed:
        text += f", {resumed} of {len(result.blocks)} blocks were finished by an earlier run"
    return text + (f"; peak memory {result.peak_rss_bytes / 2**20:,.0f} MiB" if result.peak_rss_bytes else "")
