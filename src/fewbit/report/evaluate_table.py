"""The table of `fewbit evaluate`: each figure with its 95 % interval and, where one applies, the noise floor."""

from __future__ import annotations

from rich.table import Table

from fewbit.results import EvaluateResults, Interval, ProtocolInfo

__all__ = ["evaluate_table"]


def evaluate_table(results: EvaluateResults) -> Table:
    """The table that a person reads; the caption says how it was measured."""
    table = Table(
        title=f"{results.model} in {results.scheme}", caption=_caption(results.protocol), title_justify="left", caption_justify="left"
    )
    table.add_column("quality")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("noise floor", justify="right")
    _row(table, "perplexity", results.perplexity, "{:,.4g}")
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
    span = f"{form.format(interval.low)} … {form.format(interval.high)}"
    table.add_row(name, form.format(interval.value), span, "" if floor is None else (floor_form or form).format(floor))


def _caption(protocol: ProtocolInfo) -> str:
    lines = [
        f"{protocol.name} on {protocol.corpus}: {protocol.windows} windows of {protocol.context_length} tokens, stride {protocol.stride}, "
        f"{protocol.scored_tokens:,} tokens scored; text {protocol.text_sha256[:12]}, Python {protocol.python}, seed {protocol.seed}"
    ]
    return "\n".join([*lines, protocol.note] if protocol.note else lines)
