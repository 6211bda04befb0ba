"""Three figures of `fewbit formats`: where the code points lie, what a finer scale buys, and what it costs in bits."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fewbit.report.figures import RenderedFigure, write_figures
from fewbit.report.svg_style import BAD, FUSED, INK, MUTED, NEUTRAL, UNFUSED, drawing, finish_svg
from fewbit.results import FormatData, FormatErrors, FormatsResult

__all__ = ["render_format_figures", "write_format_figures"]

_POINT_ROWS = ("int8", "fp8_e4m3", "fp8_e5m2", "int4", "nf4", "fp4_e2m1", "int3", "int2")
_LINES = {"INT8": NEUTRAL, "FP8 E4M3": BAD, "INT4": FUSED, "NF4": UNFUSED, "INT3": INK}
_SQUARES = {"MXFP4": "s", "NVFP4": "D"}
_NEAR = 1 / 32


def render_format_figures(result: FormatsResult) -> list[RenderedFigure]:
    """The three figures as SVG documents; only `result` is read."""
    with drawing():
        return [_code_points(result), _error_by_bits(result), _error_by_group(result)]


def write_format_figures(result: FormatsResult, directory: Path) -> list[Path]:
    """Write each figure as NAME.svg.

    Raises:
        OutputError: the directory cannot be written.
    """
    return write_figures(render_format_figures(result), directory)


def _finish(figure: Figure, name: str, title: str, caption: str) -> RenderedFigure:
    return RenderedFigure(name, title, caption, finish_svg(figure, name, title, caption))


def _code_points(result: FormatsResult) -> RenderedFigure:
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    whole, near = figure.subplots(1, 2, sharey=True)
    formats = {info.name: info for info in result.formats}
    rows = [formats[name] for name in _POINT_ROWS]
    for axes, limit, title in ((whole, 1.0, "the whole range"), (near, _NEAR, "32 times closer")):
        for y, info in enumerate(rows):
            largest = max(abs(p) for p in info.code_points)
            shown = [p / largest for p in info.code_points if abs(p / largest) <= limit]
            axes.vlines(shown, y - 0.32, y + 0.32, color=FUSED if info.name.startswith("int") else UNFUSED, linewidth=0.7)
        axes.set_xlim(-1.03 * limit, 1.03 * limit)
        axes.set_title(title, fontsize=9, color=MUTED)
        axes.set_xlabel("value / largest value")
        axes.xaxis.set_major_locator(FixedLocator([-limit, 0, limit]))
        axes.xaxis.set_major_formatter(FuncFormatter(_position))
        axes.tick_params(left=False)
        axes.spines["left"].set_visible(False)
    whole.set_yticks(range(len(rows)), [info.label for info in rows])
    whole.invert_yaxis()
    caption = (
        "Each stroke is a number the format can hold, divided by its largest. Integers are evenly spaced; floats and NF4 are densest "
        "around zero, where most weights are, and pay for it at the ends."
    )
    return _finish(figure, "code-points", "Where the code points lie", caption)


def _position(x: float, _: int) -> str:
    size = f"1/{round(1 / abs(x))}" if 0 < abs(x) < 1 else f"{abs(x):g}"
    return f"\N{MINUS SIGN}{size}" if x < 0 else size


def _panels(result: FormatsResult, height: float) -> tuple[Figure, list[tuple[Axes, FormatData]]]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True).flat
    panels = list(zip(axes, result.data, strict=True))
    for panel, data in panels:
        panel.set_title(data.name, fontsize=9, color=INK)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(FixedLocator([0.5, 1, 2, 5, 10, 20, 50, 100]))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
        panel.grid(axis="y")
    return figure, panels


def _of(data: FormatData, name: str) -> list[FormatErrors]:
    return [entry for entry in data.errors if entry.format == name]


def _error_by_bits(result: FormatsResult) -> RenderedFigure:
    figure, panels = _panels(result, 5.2)
    for panel, data in panels:
        for name, colour in _LINES.items():
            entries = _of(data, name)
            bits, errors = [e.effective_bits for e in entries], [100 * e.relative_error for e in entries]
            panel.plot(bits, errors, color=colour, linewidth=1.2, marker="o", markersize=2.5, label=name)
        for name, marker in _SQUARES.items():
            entries = _of(data, name)
            bits, errors = [e.effective_bits for e in entries], [100 * e.relative_error for e in entries]
            panel.plot(bits, errors, color=MUTED, linestyle="none", marker=marker, markersize=4.5, label=name)
    for panel, _ in panels[2:]:
        panel.set_xlabel("effective bits per weight")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8.5)
    figure.supylabel("relative error", fontsize=9, color=MUTED)
    caption = (
        "Each line goes from one scale per tensor (left, fewest bits) over one per channel to one for 16 values (right). A finer "
        "scale buys little on Gaussian numbers and a great deal where values of different size meet."
    )
    return _finish(figure, "error-by-bits", "What a finer scale buys, and what it costs in bits", caption)


def _bits(overhead: float) -> str:
    return f"{overhead:.3g}" if overhead >= 1e-3 else "0"


def _error_by_group(result: FormatsResult) -> RenderedFigure:
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    overheads: dict[str, float] = {}
    for data in result.data:
        for entry in _of(data, "INT4"):
            overheads.setdefault(entry.granularity, entry.overhead_bits)
    positions = {granularity: i for i, granularity in enumerate(overheads)}
    colours = {"gaussian": NEUTRAL, "heavy-tailed": UNFUSED, "outliers": BAD}
    for data in result.data:
        entries = _of(data, "INT4")
        where, errors = [positions[e.granularity] for e in entries], [100 * e.relative_error for e in entries]
        axes.plot(where, errors, color=colours.get(data.name, FUSED), linewidth=1.4, marker="o", markersize=3.5, label=data.name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([5, 10, 20, 50, 100]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(positions.values()), [f"{granularity}\n+{_bits(overheads[granularity])} bit" for granularity in positions])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("relative error of INT4")
    axes.grid(axis="y")
    axes.legend(frameon=False, fontsize=8.5)
    caption = (
        "INT4 with BF16 scales. Down to groups of 128 the error falls for an eighth of a bit; every further halving of the group doubles "
        "the added bits. That is why group 128 is the usual choice, and 32 the one for numbers with outliers."
    )
    return _finish(figure, "error-by-group", "Why group 128", caption)
