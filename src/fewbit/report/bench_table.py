"""The tables of `fewbit bench`: one line per figure, one column per row of the results, so that it fits any terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from fewbit.report.numbers import Kind, format_figure
from fewbit.results import BenchResults, EngineRates, LatencyResult, MachineResult, MemoryResult, VariantResult

__all__ = ["render_bench", "render_machine"]

_LATENCY: tuple[tuple[str, Callable[[LatencyResult], object], Kind], ...] = (
    ("run by", lambda r: r.runtime, "text"),
    ("prefill, ms", lambda r: r.prefill_ms, "ms"),
    ("prefill over BF16", lambda r: r.prefill_speedup_over_bf16, "ratio"),
    ("prefill bound by", lambda r: r.prefill_bound, "text"),
    ("decode p50, ms", lambda r: r.decode_ms_p50, "ms"),
    ("decode p95, ms", lambda r: r.decode_ms_p95, "ms"),
    ("decode p99, ms", lambda r: r.decode_ms_p99, "ms"),
    ("steps (n)", lambda r: r.decode_n, "count"),
    ("32 tokens, ms", lambda r: r.generate_32_ms, "ms"),
    ("decode over BF16", lambda r: r.speedup_over_bf16.value, "ratio"),
    ("  95 % interval", lambda r: f"{r.speedup_over_bf16.low:.2f} to {r.speedup_over_bf16.high:.2f}", "text"),
    ("weights read, GB/s", lambda r: r.achieved_weight_gb_s, "gb_s"),
    ("traffic, of the bandwidth", lambda r: r.bandwidth_share, "share"),
    ("operations, of the GEMM rate", lambda r: r.compute_share, "share"),
    ("overhead, of the step", lambda r: r.overhead_share, "share"),
    ("decode bound by", lambda r: r.bound, "text"),
    ("  FFN projections, ms", lambda r: r.operators.ffn_projections_ms, "ms"),
    ("  attention projections, ms", lambda r: r.operators.attention_projections_ms, "ms"),
    ("  attention, ms", lambda r: r.operators.attention_ms, "ms"),
    ("  lm_head, ms", lambda r: r.operators.lm_head_ms, "ms"),
    ("  the rest, ms", lambda r: r.operators.rest_ms, "ms"),
)
_MEMORY: tuple[tuple[str, Callable[[MemoryResult], object], Kind], ...] = (
    ("weights resident", lambda r: r.resident_weight_bytes, "bytes"),
    ("bits per quantized weight", lambda r: r.effective_bits_per_weight, "bits"),
    ("bits per parameter", lambda r: r.effective_bits_per_parameter, "bits"),
    ("peak", lambda r: r.peak_rss_bytes, "bytes"),
    ("KV cache per token", lambda r: r.kv_bytes_per_token, "bytes"),
    ("sequences that fit", lambda r: r.kv_sequences_that_fit, "count"),
)


def render_machine(machine: MachineResult, console: Console) -> None:
    """What the machine can do."""
    table = Table(title="This machine", title_justify="left", show_header=False)
    table.add_row("read bandwidth, GB/s", format_figure(machine.read_bandwidth_gb_s, "gb_s"), machine.bandwidth_method)
    table.add_row("GEMM, GFLOP/s", format_figure(machine.gemm_gflop_s, "gb_s"), machine.gemm_dtype)
    table.add_row("time per operator, us", format_figure(machine.time_per_null_op_us, "ms"), "smallest tensor operation")
    console.print(table)
    if machine.rates is not None:
        _render_rates(machine.rates, console)


def _render_rates(rates: EngineRates, console: Console) -> None:
    """Of the kernels, by tokens; of attention, by head dimension and query heads per key head."""
    tokens = rates.kernels[0].tokens if rates.kernels else []
    caption = f"weights from memory at {rates.read_bandwidth_gb_s:.3g} GB/s, {rates.threads} threads; BF16 read at full speed: "
    caption += f"{16 / 8 * 1e3 / rates.read_bandwidth_gb_s:.3g}"
    table = Table(title="Picoseconds per weight and product", caption=caption, title_justify="left", caption_justify="left")
    table.add_column("kernel")
    table.add_column("scheme")
    table.add_column("columns", justify="right")
    for count in tokens:
        table.add_column(f"{count} token{'s' if count > 1 else ''}", justify="right")
    for rate in rates.kernels:
        table.add_row(rate.kernel, rate.scheme, str(rate.columns), *(f"{ps:.3g}" for ps in rate.ps_per_weight))
    console.print(table)
    title = "Nanoseconds of attention per cached token and key head (prefill: per pair of tokens)"
    caption = f"besides, {rates.operator_us:.3g} us per operator and {rates.ns_per_activation:.3g} ns per activation"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    groups = sorted({rate.group for rate in rates.attention})
    for name in ("phase", "cache", "head dimension", *(f"{group} queries" if group > 1 else "1 query" for group in groups)):
        table.add_column(name, justify="right")
    for phase, cache, dim in dict.fromkeys((rate.phase, rate.cache, rate.head_dim) for rate in rates.attention):
        found = {rate.group: rate.ns for rate in rates.attention if (rate.phase, rate.cache, rate.head_dim) == (phase, cache, dim)}
        table.add_row(phase, cache, str(dim), *(f"{found[group]:.3g}" if group in found else "" for group in groups))
    console.print(table)


def render_bench(results: BenchResults, console: Console) -> None:
    """Machine, latency and memory of BF16 and the scheme, side by side, with the kernels that ran and those that did not."""
    render_machine(results.machine, console)
    first = results.rows[0]
    table = Table(title=results.model.source, caption=_caption(results, first), title_justify="left", caption_justify="left")
    table.add_column("")
    for row in results.rows:
        table.add_column(row.variant.label, justify="right")
    for name, latency_figure, kind in _LATENCY:
        table.add_row(name, *(format_figure(latency_figure(row.latency), kind) if row.latency else "" for row in results.rows))
    table.add_section()
    for name, memory_figure, kind in _MEMORY:
        table.add_row(name, *(format_figure(memory_figure(row.memory), kind) for row in results.rows))
    console.print(table)
    for row in results.rows:
        _print_kernels(row, console)


def _caption(results: BenchResults, row: VariantResult) -> str:
    latency = row.latency
    lines = [results.note] if results.note else []
    if latency is not None:
        lines.append(f"prompt of {latency.prefill_tokens} tokens, decode at {latency.decode_context_tokens} tokens of context, batch 1")
    lines.append(f"sequences of {row.memory.kv_context_tokens:,} tokens in {format_figure(row.memory.memory_budget_bytes, 'bytes')}")
    return "\n".join(lines)


def _print_kernels(row: VariantResult, console: Console) -> None:
    for use in row.kernels:
        console.print(f"{row.variant.label}: {use.kernel} on {use.linears} linears ({use.description})", markup=False, highlight=False)
        for passed in use.passed_over:
            console.print(f"  not {passed.kernel}: {passed.reason}", markup=False, highlight=False)
    if row.latency is not None and row.latency.runtime_reason:
        console.print(f"  not the engine: {row.latency.runtime_reason}", markup=False, highlight=False)
    counters = row.latency.counters if row.latency else None
    if counters is not None:
        for name, value in counters.values.items():
            console.print(f"  {name} per step: {value:,.4g}", markup=False, highlight=False)
        if counters.note:
            console.print(f"  {counters.tool}: {counters.note}", markup=False, highlight=False)
