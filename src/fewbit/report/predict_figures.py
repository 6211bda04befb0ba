"""Figures of a prediction.

1. `latency-bytes`: time of a decode step against the weight bytes that it reads, one point per scheme with its 90 % interval, and the line
   that nothing can be below: bytes over bandwidth.
2. `roofline`: the operators of the predicted steps under the device's two roofs. Left of the ridge bytes decide, right of it operations.
   (Williams, Waterman, Patterson, CACM 52(4), 2009.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fewbit.predict.prediction import Prediction, PredictResults, Term
from fewbit.report.figures import RenderedFigure
from fewbit.report.files import write_text
from fewbit.report.label_layout import place_labels
from fewbit.report.svg_style import BAD, FUSED, INK, MUTED, NEUTRAL, UNFUSED, drawing, finish_svg

__all__ = ["predict_figures", "write_predict_figures"]

_WIDTH, _HEIGHT = 4.8, 3.2
_COLOURS = {"dense": NEUTRAL, "fused": FUSED, "native": FUSED, "unfused": UNFUSED}
_STEPS = 3  # in the roofline
_ALONG = 16  # points of a line that labels stay clear of


def predict_figures(results: PredictResults) -> list[RenderedFigure]:
    """The figures of a prediction; the first only with decode steps, the second only for the full model."""
    figures = []
    decode = [p for p in results.predictions if p.point.phase == "decode"]
    if decode:
        first = decode[0].point
        same = [p for p in decode if (p.point.batch, p.point.context, p.point.kv) == (first.batch, first.context, first.kv)]
        figures.append(_latency(results, same))
    if results.dense_tflop_s:
        figures.append(_roofline(results, _apart(results.predictions)))
    return figures


def write_predict_figures(results: PredictResults, directory: Path) -> list[Path]:
    """Write them as SVG files.

    Raises:
        OutputError: the directory cannot be written to.
    """
    return [write_text(directory / f"{one.name}.svg", one.svg) for one in predict_figures(results)]


def _where(results: PredictResults) -> str:
    used = sum(step.used for step in results.measured)
    return f"{results.model.name} on {results.hardware}, {used} measured point{'' if used == 1 else 's'}."


def _latency(results: PredictResults, steps: Sequence[Prediction]) -> RenderedFigure:
    with drawing():
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        for one in steps:
            x, colour = one.weight_bytes / 1e9, _COLOURS[one.path]
            axes.plot([x, x], [one.milliseconds.low, one.milliseconds.high], color=colour, linewidth=1.2)
            axes.plot([x], [one.milliseconds.value], "s" if one.path == "unfused" else "o", color=colour, markersize=6, markeredgewidth=0)
        longest = 1.15 * max(one.weight_bytes / 1e9 for one in steps)
        axes.plot([0, longest], [0, longest / results.bandwidth_gb_s * 1e3], color=BAD, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, longest)
        axes.set_ylim(0, 1.1 * max(one.milliseconds.high for one in steps))
        axes.grid(axis="y")
        axes.set_xlabel("weights that a step reads (GB)")
        axes.set_ylabel("decode, ms per step")
        points = [(one.weight_bytes / 1e9, one.milliseconds.value) for one in steps]
        ends = [(one.weight_bytes / 1e9, one.milliseconds.low, one.milliseconds.high) for one in steps]
        along = [(x, low + share * (high - low)) for x, low, high in ends for share in np.linspace(0, 1, _ALONG)]
        along += [(x, x / results.bandwidth_gb_s * 1e3) for x in np.linspace(0, longest, _ALONG)]
        place_labels(figure, axes, points, [one.point.scheme for one in steps], colour=INK, leader_colour=MUTED, avoid=along)
        point = steps[0].point
        title = "What fewer bytes buy in time"
        caption = (
            f"{_where(results)} Decode of {point.batch} sequence{'' if point.batch == 1 else 's'} at {point.context:,} cached tokens, with "
            f"90 % intervals. Dashed: bytes over {results.bandwidth_gb_s:,g} GB/s, below which no step can be."
        )
        return RenderedFigure("latency-bytes", title, caption, finish_svg(figure, "latency-bytes", title, caption))


def _apart(predictions: Sequence[Prediction]) -> list[Prediction]:
    """A few steps that lie apart: the first of each phase in BF16, and the first of another path."""
    chosen: dict[tuple[str, str], Prediction] = {}
    for one in predictions:
        chosen.setdefault((one.point.phase, "dense" if one.path == "dense" else "other"), one)
    return list(chosen.values())[:_STEPS]


def _intensity(term: Term) -> float:
    return term.operations / term.bytes


def _roofline(results: PredictResults, steps: Sequence[Prediction]) -> RenderedFigure:
    markers = ("o", "s", "D")
    with drawing():
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        points, labels, along = [], [], []
        for marker, step in zip(markers, steps, strict=False):
            done = [term for term in step.terms if term.operations and term.bytes and term.milliseconds]
            for term in done:
                rate = term.operations / (term.milliseconds * 1e9)
                along.append((_intensity(term), rate))
                axes.plot([_intensity(term)], [rate], marker, color=_COLOURS[step.path], markersize=5, markeredgewidth=0, alpha=0.8)
            largest = max(done, key=lambda term: term.milliseconds)
            points.append((_intensity(largest), largest.operations / (largest.milliseconds * 1e9)))
            labels.append(f"{step.point.scheme} {step.point.phase}, batch {step.point.batch}")
        top = max(results.dense_tflop_s.values())
        x = np.geomspace(min(0.5, *(p[0] for p in points)) / 2, max(4e3 * top / results.bandwidth_gb_s, *(2 * p[0] for p in points)), 200)
        along += [(at, min(at * results.bandwidth_gb_s / 1e3, top)) for at in np.geomspace(x[0], x[-1], 2 * _ALONG)]
        for name, peak in results.dense_tflop_s.items():
            axes.plot(x, np.minimum(x * results.bandwidth_gb_s / 1e3, peak), color=MUTED, linewidth=1)
            axes.annotate(f"{name} {peak:,g}", (x[-1], peak), (-2, 2), textcoords="offset points", ha="right", va="bottom", color=MUTED)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(x[0], x[-1])
        axes.set_ylim(min(p[1] for p in points) / 4, 3 * top)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("operations per byte")
        axes.set_ylabel("TFLOP/s")
        place_labels(figure, axes, points, labels, colour=INK, leader_colour=MUTED, avoid=along)
        title = "Bytes or operations: the operators under the roofs"
        caption = (
            f"{_where(results)} One mark per kind of operator, at the rate that the prediction gives it; each step's largest is named. "
            f"Slope: {results.bandwidth_gb_s:,g} GB/s; flat: dense peaks in TFLOP/s."
        )
        return RenderedFigure("roofline", title, caption, finish_svg(figure, "roofline", title, caption))
