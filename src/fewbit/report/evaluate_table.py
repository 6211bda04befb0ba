"""The table of `fewbit evaluate`: each figure with its 95 % interval and, where one applies, the noise floor."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fewbit.results import EvaluateResults, Interval, KernelUse

__all__ = ["render_evaluate"]


def render_evaluate(results: EvaluateResults, console: Console) -> None:
    """Print the table that a person reads and, below it, how it was measured."""
    console.print(_table(results))
    protocol = results.protocol
    console.print(
        f"{protocol.name} on {protocol.corpus}: {protocol.windows} windows of {protocol.context_length} tokens, stride {protocol.stride}, "
        f"{protocol.scored_tokens:,} tokens scored; text {protocol.text_sha256[:12]}, Python {protocol.python}, seed {protocol.seed}",
        style="dim",
        highlight=False,
    )
    for note in filter(None, (protocol.note, *(_kernel_note(use) for use in results.kernels))):
        console.print(note, style="dim", highlight=False, markup=False)


def _kernel_note(use: KernelUse) -> str:
    return f"{use.linears} linears on {use.kernel}{'' if use.fused else ' (unfused)'}"


def _table(results: EvaluateResults) -> Table:
    table = Table(title=Text(f"{results.model} in {results.scheme}"), title_justify="left")
    table.add_column("quality")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("noise floor", justify="right")
    _row(table, "perplexity", results.perplexity, "{:,.2f}")
    _row(table, "bits per byte", results.bits_per_byte, "{:.4f}")
    quality, floor = results.quality, results.noise_floor
    if quality is not None:
        floors = (floor.perplexity_delta_percent, floor.kl_divergence_nats, floor.flip_share) if floor is not None else (None, None, None)
        _row(table, "perplexity against BF16, %", quality.perplexity_delta_percent, "{:+,.3f}", floors[0], "{:.3f}")
        _row(table, "KL(BF16 || variant), nats", quality.kl_divergence_nats, "{:.5f}", floors[1])
        _row(table, "top-1 tokens that flip", quality.flip_share, "{:.2%}", floors[2])
        style = "green" if quality.passed else "red"
        verdict = "pass" if quality.passed else "fail"
        table.add_row(f"threshold +{quality.threshold_percent:g} %", f"[bold {style}]{verdict}[/]", "", "")
    return table


def _row(table: Table, name: str, interval: Interval, form: str, floor: float | None = None, floor_form: str | None = None) -> None:
    span = f"{form.format(interval.low)} to {form.format(interval.high)}"
    table.add_row(name, form.format(interval.value), span, "" if floor is None else (floor_form or form).format(floor))
