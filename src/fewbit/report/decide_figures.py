"""Figures of a decision: what bytes buy in time, and where memory ends.

1. `latency-bytes`: time per token against what a step reads, one point per candidate with its 90 % interval.
2. `memory-context`: memory against the context at the workload's batch, with the line of the device's capacity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fewbit.decide.decision import Candidate, Cell
from fewbit.report.figures import RenderedFigure
from fewbit.report.label_layout import place_labels
from fewbit.report.svg_style import BAD, FUSED, INK, MUTED, NEUTRAL, UNFUSED, drawing, finish_svg

__all__ = ["decide_figures", "memory_at"]

_WIDTH, _HEIGHT = 4.8, 3.2
_COLOURS = {"chosen": FUSED, "undecided": UNFUSED, "rejected": NEUTRAL}
_LINES = 4


def decide_figures(cell: Cell, scene: Mapping[str, Any]) -> list[RenderedFigure]:
    """The figures of a cell; without the first where nothing runs."""
    shown = [one for one in cell.candidates if one.time is not None and one.memory.fits]
    figures = []
    if shown:
        figures.append(_latency(cell, shown))
    if scene["kv"]:
        figures.append(_memory(cell, scene))
    return figures


def _latency(cell: Cell, shown: Sequence[Candidate]) -> RenderedFigure:
    """Only the front and the weights with a plain cache get labels: two dozen would hide the points."""
    named = [one for one in shown if one.status != "rejected" or one.kv_cache == "BF16"]
    with drawing():
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        points, labels = [], []
        for one in sorted(shown, key=lambda one: one.status != "rejected"):  # what matters is drawn last
            assert one.time is not None
            time, colour = one.time.ms_per_token, _COLOURS[one.status]
            x = (one.memory.weights_bytes + one.memory.cache_bytes) / 1e9
            axes.plot([x, x], [time.low, time.high], color=colour, linewidth=1.0, alpha=0.6)
            axes.plot(
                [x], [time.value], "o" if one.acceptable else "s", color=colour, markersize=6 if one in named else 4, markeredgewidth=0
            )
            if one in named:
                points.append((x, time.value))
                labels.append(one.name)
        axes.set_xlim(0, None)
        axes.set_ylim(0, None)
        axes.grid(axis="y")
        axes.set_xlabel("weights and full cache (GB)")
        axes.set_ylabel("ms per token")
        place_labels(figure, axes, points, labels, colour=INK, leader_colour=MUTED)
        title = f"What fewer bytes buy in time on {cell.label}"
        caption = (
            "Predicted time of a decode step at the workload's batch, with 90 % intervals, against bytes in memory. "
            "Green: the choice; orange: not to be told apart from it yet; squares break a limit."
        )
        svg = finish_svg(figure, _identifier("latency-bytes", cell), title, caption)
    return RenderedFigure("latency-bytes", title, caption, svg)


def memory_at(scene: Mapping[str, Any], option: Mapping[str, Any], batch: int, context: float) -> float:
    """Bytes that an option takes with so many tokens in each sequence."""
    cache, total = scene["caches"][option["cache"]], 0.0
    for layers, per_token, plain in zip(scene["kv"], cache["perToken"], cache["plain"], strict=True):
        kept = context if layers["window"] is None else min(context, layers["window"])
        newest = min(cache["recent"], kept)
        total += (kept - newest) * per_token + newest * plain
    at_once = max(batch, min(batch * context, 2048))
    work = at_once * scene["workspacePerToken"] + batch * scene["workspacePerSequence"]
    return float(option["weightBytes"] + batch * total + work + scene["reserved"])


def _memory(cell: Cell, scene: Mapping[str, Any]) -> RenderedFigure:
    """Lines for BF16, the choice, and what lies between."""
    options = {option["name"]: option for option in scene["options"]}
    wanted = ["BF16", cell.choice, "FP8", "W8A16", "W4A16", *(name for name in options if name.startswith("W4A16 +"))]
    names = [name for name in dict.fromkeys(wanted) if name in options][: _LINES + 1]
    batch, top = scene["workload"]["batch"], scene["maxContext"] or 131072
    start = scene["workload"]["prompt"] + scene["workload"]["newTokens"]
    most = max(256, min(top, 16 * start))
    contexts = [most * step / 40 for step in range(1, 41)]
    with drawing():
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        capacity = scene["capacity"] / 1e9
        ends = []
        for name in names:
            heights = [memory_at(scene, options[name], batch, context) / 1e9 for context in contexts]
            axes.plot(contexts, heights, color=FUSED if name == cell.choice else NEUTRAL, linewidth=2.0 if name == cell.choice else 1.2)
            ends.append((contexts[-1], heights[-1]))
        limit = 1.35 * max(capacity, min(4 * capacity, max(height for _, height in ends)))
        axes.plot([0, most], [capacity, capacity], color=BAD, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.plot([start, start], [0, limit], color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_xlim(0, 1.45 * most)
        axes.set_ylim(0, limit)
        axes.set_xlabel("tokens of each sequence")
        axes.set_ylabel("memory (GB)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:g}K" if value >= 1024 else f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks([most * share for share in (0.25, 0.5, 0.75, 1.0)])
        axes.annotate(f"capacity {capacity:.3g} GB", (0, capacity), (4, 3), textcoords="offset points", color=BAD, va="bottom")
        seen = [(x, y, name) for (x, y), name in zip(ends, names, strict=True) if y <= limit]
        place_labels(
            figure, axes, [(x, y) for x, y, _ in seen], [name for *_, name in seen], colour=INK, leader_colour=MUTED, lines=[capacity]
        )
        title = f"Where memory ends on {cell.label}"
        caption = f"Weights, cache of {batch:,} sequences, workspace and what the system needs. The dotted line is the workload's context."
        svg = finish_svg(figure, _identifier("memory-context", cell), title, caption)
    return RenderedFigure("memory-context", title, caption, svg)


def _identifier(name: str, cell: Cell) -> str:
    text = f"{name}-{cell.model}-{cell.hardware}"
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)
