"""Three figures, each with one thing to say, drawn from a results file alone.

1. `kernel-decides`: rows of equal bits, opposite speed: what differs is the kernel.
2. `memory-latency`: what the saved bytes buy in time.
3. `quality-bits`: what they cost in quality.

Speed is taken from the shapes section when the run has one, because a small model is bound by overhead. KV-cache rows keep BF16 weights,
so they are left out of figures 2 and 3, whose axes are about weights; they stand in the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fewbit.report.columns import Section, kernel_text, sections
from fewbit.report.files import write_text
from fewbit.report.label_layout import place_labels
from fewbit.report.numbers import BYTE_UNITS, byte_unit, format_figure
from fewbit.report.results_file import to_document
from fewbit.report.svg_style import BAD, FUSED, INK, MUTED, NEUTRAL, UNFUSED, drawing, finish_svg
from fewbit.results import CompareResults

__all__ = ["FIGURES", "RenderedFigure", "render_figures", "write_figures"]

Variant = Mapping[str, Any]
_WIDTH, _HEIGHT = 4.8, 3.2  # inches; small, so that the text is still large enough on a phone


@dataclass(frozen=True)
class RenderedFigure:
    """A figure and its words.

    Attributes:
        name: file name without `.svg`.
        title: what it says, in a few words.
        caption: how to read it.
        svg: the document.
    """

    name: str
    title: str
    caption: str
    svg: str


def _is_baseline(variant: Variant) -> bool:
    return bool(variant["variant"]["weights"] == "BF16" and variant["variant"]["kv_cache"] == "BF16")


def _keeps_weights(variant: Variant) -> bool:
    """KV-cache rows: another cache, the same weights."""
    return bool(variant["variant"]["weights"] == "BF16" and variant["variant"]["kv_cache"] != "BF16")


def _fused(variant: Variant) -> bool:
    return all(use["fused"] for use in variant["kernels"])


def _colour(variant: Variant) -> str:
    return NEUTRAL if _is_baseline(variant) else (FUSED if _fused(variant) else UNFUSED)


def _speed_section(document: Mapping[str, Any]) -> Section | None:
    """The section to take speed from: the shapes, else the model, if it was timed."""
    return next((section for section in reversed(sections(document)) if section.has_part("latency")), None)


def _where(section: Section) -> str:
    if section.key == "model":
        return f"Measured on {section.model['source']}."
    scaled = f", {section.scaled}" if section.scaled else ""
    return f"Measured in the shapes of {section.model['source'].removeprefix('shapes:')}{scaled}."


def _empty(figure: Figure, text: str) -> None:
    figure.text(0.5, 0.5, text, ha="center", va="center", color=MUTED)


def _new_figure() -> Figure:
    return Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")


def _equal_bits(variants: Sequence[Variant]) -> list[Variant]:
    """Timed weight variants of the bit width at which the speeds lie furthest apart; all when no width has two."""
    timed = [variant for variant in variants if variant["latency"] and not _is_baseline(variant) and not _keeps_weights(variant)]

    def spread(bits: float) -> float:
        speeds = [_speedup(variant)["value"] for variant in timed if variant["variant"]["bits_nominal"] == bits]
        return max(speeds) / min(speeds) if len(speeds) > 1 else 0.0

    best = max({variant["variant"]["bits_nominal"] for variant in timed}, key=lambda bits: (spread(bits), -bits), default=0.0)
    return [variant for variant in timed if variant["variant"]["bits_nominal"] == best] if spread(best) else timed


def _speedup(variant: Variant) -> Mapping[str, float]:
    interval: Mapping[str, float] = variant["latency"]["speedup_over_bf16"]
    return interval


def _draw_kernel_decides(figure: Figure, document: Mapping[str, Any]) -> str:
    section = _speed_section(document)
    rows = _equal_bits(section.variants) if section else []
    if section is None or not rows:
        _empty(figure, "Latency was not measured in this run.")
        return ""
    rows = sorted(rows, key=lambda variant: _speedup(variant)["value"])
    axes = figure.subplots()
    for y, variant in enumerate(rows):
        speed = _speedup(variant)
        axes.barh(y, speed["value"], height=0.5, color=_colour(variant))
        axes.plot([speed["low"], speed["high"]], [y, y], color=INK, linewidth=1.2, solid_capstyle="butt")
        text = format_figure(speed["value"], "ratio")
        axes.annotate(
            text, (max(speed["value"], speed["high"]), y), (5, 0), textcoords="offset points", va="center", color=INK, fontweight="bold"
        )
    top = len(rows) - 0.5
    axes.plot([1.0, 1.0], [-0.6, top], color=NEUTRAL, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("BF16", (1.0, top), ha="center", va="bottom", color=MUTED)
    axes.set_yticks(range(len(rows)), [_bar_label(variant) for variant in rows], color=INK)
    axes.set_xlim(0, 1.22 * max(1.0, *(_speedup(variant)["high"] for variant in rows)))
    axes.set_ylim(-0.6, len(rows) - 0.2)
    axes.set_xlabel("decode speed-up over BF16 (\u00d7)")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return _where(section)


def _bar_label(variant: Variant) -> str:
    kernel = kernel_text(variant["kernels"])
    return f"{variant['variant']['label']}\n{kernel}, {'fused' if _fused(variant) else 'unfused'}"


def _draw_memory_latency(figure: Figure, document: Mapping[str, Any]) -> str:
    section = _speed_section(document)
    rows = [variant for variant in section.variants if variant["latency"] and not _keeps_weights(variant)] if section else []
    if section is None or not rows:
        _empty(figure, "Latency was not measured in this run.")
        return ""
    unit = byte_unit(variant["memory"]["resident_weight_bytes"] for variant in rows)
    axes = figure.subplots()
    points = [(v["memory"]["resident_weight_bytes"] / BYTE_UNITS[unit], v["latency"]["decode_ms_p50"]) for v in rows]
    axes.set_xlim(0, 1.25 * max(x for x, _ in points))
    _log_scale(axes, [y for _, y in points])
    axes.set_xlabel(f"weights in memory ({unit})")
    axes.set_ylabel("decode, ms per token (log)")
    _scatter(figure, axes, rows, points)
    return _where(section)


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.6, high * 1.6)
    ticks = [mantissa * 10.0**power for power in range(-6, 10) for mantissa in (1, 2, 5)]
    axes.set_yticks([tick for tick in ticks if low / 1.6 <= tick <= high * 1.6])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")


def _scatter(figure: Figure, axes: Axes, rows: Sequence[Variant], points: Sequence[tuple[float, float]]) -> None:
    """Points with labels that do not overlap; circles are fused, squares unfused, so that colour is not needed."""
    for variant, (x, y) in zip(rows, points, strict=True):
        marker = "o" if _is_baseline(variant) or _fused(variant) else "s"
        axes.plot([x], [y], marker, color=_colour(variant), markersize=6.5, markeredgewidth=0)
    place_labels(figure, axes, points, [variant["variant"]["label"] for variant in rows], colour=INK, leader_colour=MUTED)


def _draw_quality_bits(figure: Figure, document: Mapping[str, Any]) -> str:
    section = sections(document)[0]
    rows = [variant for variant in section.variants if variant["quality"] and not _keeps_weights(variant)]
    if not rows:
        _empty(figure, "Quality was not measured in this run.")
        return ""
    rows = _same_values_once(rows)
    axes = figure.subplots()
    deltas = [variant["quality"]["perplexity_delta_percent"] for variant in rows]
    points = [
        (variant["memory"]["effective_bits_per_weight"] or variant["variant"]["bits_nominal"], d["value"])
        for variant, d in zip(rows, deltas, strict=True)
    ]
    threshold = rows[0]["quality"]["threshold_percent"]
    highest = max(threshold, *(delta["high"] for delta in deltas))
    axes.set_xlim(0, 18.5)
    axes.set_xticks([0, 2, 4, 8, 12, 16])
    if highest > 8 * max(threshold, 1.0):
        axes.set_yscale("symlog", linthresh=max(threshold, 1.0), linscale=1.0)
        axes.set_ylim(-max(threshold, 1.0) * 0.6, highest * 2.5)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(min(-0.1 * highest, *(delta["low"] for delta in deltas)), highest * 1.18)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+,g}" if value else "0"))
    axes.axhline(threshold, color=BAD, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"threshold {format_figure(threshold, 'percent')}", (18.5, threshold), (0, 3), textcoords="offset points", ha="right", color=BAD
    )
    axes.axhline(0, color=MUTED, linewidth=0.6)
    for (x, _), delta in zip(points, deltas, strict=True):
        axes.plot([x, x], [delta["low"], delta["high"]], color=INK, linewidth=1)
    axes.set_xlabel("effective bits per weight")
    axes.set_ylabel("perplexity against BF16 (%)")
    axes.grid(axis="y")
    for variant, (x, y) in zip(rows, points, strict=True):
        axes.plot([x], [y], "o" if variant["quality"]["passed"] else "X", color=_quality_colour(variant), markersize=6.5, markeredgewidth=0)
    place_labels(
        figure, axes, points, [_short_label(variant, rows) for variant in rows], colour=INK, leader_colour=MUTED, lines=(0.0, threshold)
    )
    return f"Measured on {section.model['source']}, 95 % intervals; a cross fails the threshold."


def _quality_colour(variant: Variant) -> str:
    return NEUTRAL if _is_baseline(variant) else (FUSED if variant["quality"]["passed"] else BAD)


def _same_values_once(rows: Sequence[Variant]) -> list[Variant]:
    """Without rows that hold the integers of an earlier row and differ in the kernel only: they are one point."""
    seen: dict[tuple[str, str, float], Variant] = {}
    for variant in rows:
        about = variant["variant"]
        seen.setdefault((about["weights"], about["input_activations"], variant["quality"]["perplexity_delta_percent"]["value"]), variant)
    return list(seen.values())


def _short_label(variant: Variant, rows: Sequence[Variant]) -> str:
    """The kernel does not matter for quality, so `, unfused` is left off where that stays unique."""
    label: str = variant["variant"]["label"].removesuffix(", unfused")
    others = [row["variant"]["label"] for row in rows if row is not variant]
    return variant["variant"]["label"] if label in others else label


FIGURES: Mapping[str, tuple[str, str, Callable[[Figure, Mapping[str, Any]], str]]] = {
    "kernel-decides": (
        "Same bits, opposite speed: the kernel decides",
        "Decode speed-up over BF16 of the variants with equal bits. A fused kernel (green) reads the few bits and multiplies; "
        "an unfused one (orange) writes a BF16 copy first, so the saved bytes are read and written again.",
        _draw_kernel_decides,
    ),
    "memory-latency": (
        "Memory against latency",
        "Weights in memory against the median decode step; lower left is better. "
        "Green circles ran a fused kernel, orange squares an unfused one, grey is BF16. "
        "KV-cache variants keep BF16 weights and stand in the tables.",
        _draw_memory_latency,
    ),
    "quality-bits": (
        "Quality against bits per weight",
        "Change of perplexity against BF16 over the effective bits per weight; lower is better. "
        "KV-cache variants keep BF16 weights and stand in the tables.",
        _draw_quality_bits,
    ),
}


def render_figures(results: CompareResults) -> list[RenderedFigure]:
    """All figures, also for runs without latency or quality: these say so.

    Raises:
        MeasurementError: a figure of the results is not finite.
    """
    document = to_document(results)
    rendered = []
    for name, (title, caption, draw) in FIGURES.items():
        with drawing():
            figure = _new_figure()
            where = draw(figure, document)
            words = f"{caption} {where}".strip()
            rendered.append(RenderedFigure(name, title, words, finish_svg(figure, name, title, words)))
    return rendered


def write_figures(figures: Sequence[RenderedFigure], directory: Path) -> list[Path]:
    """Write each figure as NAME.svg.

    Raises:
        OutputError: the directory cannot be written.
    """
    return [write_text(directory / f"{figure.name}.svg", figure.svg) for figure in figures]
