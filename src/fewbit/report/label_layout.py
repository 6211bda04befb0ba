"""Labels beside points that overlap neither each other nor the points.

Exact label placement is NP-hard (Marks and Shieber 1991); for a dozen points a greedy choice is enough: each label, crowded points first,
takes the first free place of a fixed list that goes round the point at growing distance. A label that ends up away from its point gets a
leader line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

__all__ = ["place_labels"]

_ANGLES = (0, 180, 90, 270, 35, 325, 145, 215, 60, 300, 120, 240)  # degrees; beside first, then above and below
_DISTANCES = (7.0, 15.0, 25.0, 37.0, 52.0)  # points of 1/72 inch
_LEADER_FROM = 15.0


def place_labels(
    figure: Figure,
    axes: Axes,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    *,
    colour: str,
    leader_colour: str,
    lines: Sequence[float] = (),
    avoid: Sequence[tuple[float, float]] = (),
) -> None:
    """Annotate `points` (data coordinates) with `labels`; call it last, when limits and other artists are set.

    Args:
        lines: heights (data coordinates) of horizontal lines to stay clear of.
        avoid: further points to stay clear of, such as points along curves.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]  # settles the layout: only now is it known where a point lies on the canvas
    scale = figure.dpi / 72
    inside = axes.get_window_extent()
    spots = [tuple(axes.transData.transform(point)) for point in points]
    taken = [Bbox.from_extents(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in spots]
    taken += [text.get_window_extent() for text in axes.texts]
    marks = [axes.transData.transform(point) for point in avoid]
    taken += [Bbox.from_extents(x - 2 * scale, y - 2 * scale, x + 2 * scale, y + 2 * scale) for x, y in marks]
    for height in lines:
        y = axes.transData.transform((0, height))[1]
        taken.append(Bbox.from_extents(inside.x0, y - scale, inside.x1, y + scale))
    crowding = [sum(math.dist(spot, other) < 60 * scale for other in spots) for spot in spots]
    for index in sorted(range(len(points)), key=lambda i: (-crowding[i], spots[i])):
        probe = figure.text(0, 0, labels[index])
        extent = probe.get_window_extent()
        probe.remove()
        box, distance = _free_place(spots[index], (extent.width, extent.height), inside, taken, scale)
        taken.append(box)
        x, y = spots[index]
        anchor_x, anchor_y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
        leader = (
            {"arrowstyle": "-", "color": leader_colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4} if distance >= _LEADER_FROM else None
        )
        axes.annotate(
            labels[index],
            points[index],
            ((anchor_x - x) / scale, (anchor_y - y) / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            color=colour,
            arrowprops=leader,
        )


def _free_place(spot: Sequence[float], size: tuple[float, float], inside: Bbox, taken: Sequence[Bbox], scale: float) -> tuple[Bbox, float]:
    """The first place free of `taken` and inside the axes; else the one that overlaps least."""
    best: tuple[float, Bbox, float] | None = None
    for distance in _DISTANCES:
        for angle in _ANGLES:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            centre_x = spot[0] + dx * (distance * scale + size[0] / 2)
            centre_y = spot[1] + dy * (distance * scale + size[1] / 2)
            box = Bbox.from_extents(centre_x - size[0] / 2, centre_y - size[1] / 2, centre_x + size[0] / 2, centre_y + size[1] / 2)
            outside = box.width * box.height - _overlap(box, inside)
            overlap = outside * 4 + sum(_overlap(box, other) for other in taken)
            if overlap <= 1e-6:
                return box, distance
            if best is None or overlap < best[0]:
                best = (overlap, box, distance)
    assert best is not None  # the lists above are not empty
    return best[1], best[2]


def _overlap(one: Bbox, other: Bbox) -> float:
    """Shared area in square pixels."""
    common = Bbox.intersection(one, other)
    return float(common.width * common.height) if common is not None else 0.0
