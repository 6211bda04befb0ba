"""The figure of a plan: memory against context, one line per batch, with the line of the device's capacity.

Where a line crosses the capacity is the longest context at that batch. Without a device the lines have weights, cache and workspace, and
there is nothing to cross.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fewbit.decide.memory import memory_need
from fewbit.formats.spec import Scheme
from fewbit.models.inventory import Inventory
from fewbit.predict.hardware import Hardware, get_hardware
from fewbit.report.figures import RenderedFigure
from fewbit.report.label_layout import place_labels
from fewbit.report.svg_style import BAD, FUSED, INK, MUTED, NEUTRAL, drawing, finish_svg

__all__ = ["memory_figure"]

_BATCHES = (1, 4, 16, 64)
_STEPS = 48
_MOST_CONTEXT = 131072


def memory_figure(
    inventory: Inventory, scheme: Scheme, cached: Scheme | None, hardware: Hardware | None, *, batch: int, context: int
) -> RenderedFigure:
    """Draw it.

    Args:
        cached: whose cache formats; None for BF16.
        batch: gets a line of its own, in colour. context: what the axis surely reaches.
    """
    most = min(inventory.max_context or _MOST_CONTEXT, max(_MOST_CONTEXT // 4, 2 * context))
    contexts = [most * step / _STEPS for step in range(1, _STEPS + 1)]
    batches = sorted({*_BATCHES, batch})
    any_device = hardware or get_hardware("h100-sxm")  # only its reserved bytes would be read, which are left out below

    def gigabytes(count: int, tokens: float) -> float:
        need = memory_need(inventory, scheme, cached, any_device, batch=count, context=round(tokens))
        return (need.total if hardware is not None else need.total - need.reserved) / 1e9

    with drawing():
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        lines = {count: [gigabytes(count, tokens) for tokens in contexts] for count in batches}
        top = _top(list(lines.values()), hardware)
        for count, heights in lines.items():
            axes.plot(contexts, heights, color=FUSED if count == batch else NEUTRAL, linewidth=2.0 if count == batch else 1.2)
        axes.set_xlim(0, 1.3 * most)
        axes.set_ylim(0, top)
        axes.set_xlabel("tokens of each sequence")
        axes.set_ylabel("memory (GB)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:g}K"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks([most * share for share in (0.25, 0.5, 0.75, 1.0)])
        heights_of_lines = []
        if hardware is not None:
            capacity = hardware.memory_bytes / 1e9
            axes.plot([0, most], [capacity, capacity], color=BAD, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(f"{hardware.label}, {capacity:.3g} GB", (0, capacity), (4, 3), textcoords="offset points", color=BAD, va="bottom")
            heights_of_lines.append(capacity)
        points = [_end(contexts, heights, top) for heights in lines.values()]
        labels = [f"batch {count}" for count in batches]
        along = [point for heights in lines.values() for point in zip(contexts, heights, strict=True) if point[1] <= top]
        place_labels(figure, axes, points, labels, colour=INK, leader_colour=MUTED, lines=heights_of_lines, avoid=along)
        cache_name = "BF16" if cached is None or cached.kv_keys is None else cached.name
        title = f"Memory of {inventory.name} in {scheme.name}, cache {cache_name}"
        caption = "Weights, cache and workspace, with what the system needs where a device is named, against the context of each sequence."
        return RenderedFigure("memory", title, caption, finish_svg(figure, "memory", title, caption))


def _top(lines: Sequence[Sequence[float]], hardware: Hardware | None) -> float:
    """A little above the highest line, but not so far above the capacity that everything below it is flat."""
    highest = max(max(heights) for heights in lines)
    if hardware is None:
        return 1.1 * highest
    return 1.1 * max(1.1 * hardware.memory_bytes / 1e9, min(highest, 2.5 * hardware.memory_bytes / 1e9))


def _end(contexts: Sequence[float], heights: Sequence[float], top: float) -> tuple[float, float]:
    """The last point of a line that is inside of the axes."""
    inside = [(x, y) for x, y in zip(contexts, heights, strict=True) if y <= top]
    return inside[-1] if inside else (contexts[0], top)
