"""Figures that follow the reader's light or dark mode.

matplotlib draws fixed colours. Here it draws sentinel colours instead, one for each role (`INK`, `FUSED`, ...), and `finish_svg` replaces
each by a CSS variable, `var(--fb-ink)`. A style sheet inside the figure gives the variables a value for light and for dark, so that the
file reads well on its own and, inlined into a page, follows the page. Text stays text (`svg.fonttype: none`): it can be selected and read
aloud, and it takes the system's font. Output is deterministic: no date, a fixed salt for the identifiers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["BAD", "FUSED", "GRID", "INK", "MUTED", "NEUTRAL", "PALETTE_CSS", "PAPER", "UNFUSED", "drawing", "finish_svg"]

INK, MUTED, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
NEUTRAL, FUSED, UNFUSED, BAD = "#010207", "#010208", "#010209", "#01020a"
_ROLES = {"ink": INK, "muted": MUTED, "grid": GRID, "paper": PAPER, "neutral": NEUTRAL, "fused": FUSED, "unfused": UNFUSED, "bad": BAD}
_LIGHT = {
    "ink": "#1c1f23",
    "muted": "#5c646e",
    "grid": "#e3e5e8",
    "paper": "#ffffff",
    "neutral": "#7d8590",
    "fused": "#0f7b6c",
    "unfused": "#c4650a",
    "bad": "#c0362c",
}
_DARK = {
    "ink": "#e8eaed",
    "muted": "#a0a7b0",
    "grid": "#30353c",
    "paper": "#14171a",
    "neutral": "#8b939d",
    "fused": "#3fbfa9",
    "unfused": "#f0984a",
    "bad": "#f0776c",
}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--fb-{role}:{colour};" for role, colour in colours.items())


PALETTE_CSS = f":root{{{_variables(_LIGHT)}}}@media (prefers-color-scheme:dark){{:root{{{_variables(_DARK)}}}}}"
"""The same colours for a page; a printer gets the light ones through its own media rules."""


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's settings while a figure is drawn and saved."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fewbit",
        "font.family": ["DejaVu Sans"],  # measured with, wider than the system fonts that a reader has: nothing overlaps there
        "font.size": 9.5,
        "axes.labelsize": 9,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.facecolor": "none",
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings):
        yield


def finish_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an SVG document with CSS variables for its colours; call it inside `drawing()`.

    Args:
        name: prefix of every identifier, so that several figures can stand in one page.
        title, description: what a screen reader says.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration and the DOCTYPE that names a DTD on the network
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    for role, colour in _ROLES.items():
        svg = svg.replace(colour, f"var(--fb-{role})")
    svg = re.sub(r"'DejaVu Sans'(, sans-serif)?", "var(--fb-font)", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    head, _, body = svg.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head).replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    style = (
        f".fewbit-figure{{--fb-font:{_FONT};{_variables(_LIGHT)}font-variant-numeric:tabular-nums}}"
        f"@media (prefers-color-scheme:dark){{.fewbit-figure{{{_variables(_DARK)}}}}}"
        f"@media print{{.fewbit-figure{{{_variables(_LIGHT)}}}}}"
        "svg.fewbit-figure:root{background:var(--fb-paper)}"
    )
    body = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    return (
        f'{head} class="fewbit-figure" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
        f"<style>*{{stroke-linejoin:round;stroke-linecap:butt}}{style}</style>{body}"
    ).replace("<style>*{", "<style>.fewbit-figure *{")
