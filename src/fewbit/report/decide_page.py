"""decide.html: the decision table as one file, with a part that decides again while a reader moves batch, context, bandwidth and cache.

The page opens from disk, without a network. It holds one script, which its content security policy names by its hash, and two JSON
documents: the results, and the scene (`decide.scene`) that the script computes from.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import TypeAdapter

import fewbit
from fewbit.decide.decision import Candidate, Cell, DecideResults
from fewbit.decide.scene import SCENE_CONSTANTS
from fewbit.predict.prediction import Estimate
from fewbit.report.decide_figures import decide_figures
from fewbit.report.decide_table import decide_csv, loss_text
from fewbit.report.figures import RenderedFigure
from fewbit.report.files import write_text
from fewbit.report.numbers import MISSING, format_figure
from fewbit.report.svg_style import PALETTE_CSS

__all__ = ["DECIDE_PAGE_NAME", "render_decide_page", "write_decide"]

DECIDE_PAGE_NAME = "decide.html"


def write_decide(results: DecideResults, scenes: Sequence[Mapping[str, Any]], directory: Path) -> Path:
    """Write decide.html, decide.json, decide.csv and the figures.

    Args:
        scenes: of `decide.scene.scene_of`, one for each cell.

    Raises:
        OutputError: the directory cannot be written.
    """
    figures = [decide_figures(cell, scene) for cell, scene in zip(results.cells, scenes, strict=True)]
    write_text(directory / "decide.json", TypeAdapter(DecideResults).dump_json(results, indent=2).decode() + "\n")
    write_text(directory / "decide.csv", decide_csv(results))
    for cell, drawn in zip(results.cells, figures, strict=True):
        for figure in drawn:
            write_text(directory / f"{figure.name}-{_slug(cell)}.svg", figure.svg + "\n")
    return write_text(directory / DECIDE_PAGE_NAME, render_decide_page(results, scenes, figures))


def _slug(cell: Cell) -> str:
    text = f"{cell.model.rstrip('/').rpartition('/')[2]}-{cell.hardware}".lower()
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in text)


@dataclass(frozen=True)
class _Figure:
    """A number of a table with the ends of its interval."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class _Row:
    candidate: Candidate
    figures: list[_Figure]


class _View:
    """What the template asks of a cell."""

    def __init__(self, cell: Cell, figures: Sequence[RenderedFigure]) -> None:
        self.cell, self.chosen = cell, cell.chosen
        self.headline = [_Figure(MISSING)] * 4 if self.chosen is None else [_memory(self.chosen), *_times(self.chosen)[1:]]
        self.rows = [_Row(one, [_memory(one), *_times(one), _loss(one)]) for one in cell.candidates]
        self.figures = [(figure, Markup(figure.svg)) for figure in figures]
        self.sources = "; ".join(dict.fromkeys(one.quality.source for one in cell.candidates if one.kv_cache == "BF16"))


def _memory(one: Candidate) -> _Figure:
    return _Figure(format_figure(one.memory.total_bytes, "bytes"))


def _estimate(estimate: Estimate) -> _Figure:
    value, low, high = (format_figure(one, "ms") for one in (estimate.value, estimate.low, estimate.high))
    return _Figure(value, f"{low} to {high}")


def _times(one: Candidate) -> list[_Figure]:
    """First token, per token, tokens per second, against BF16."""
    if one.time is None:
        return [_Figure(MISSING)] * 4
    time = one.time
    return [_estimate(each) for each in (time.ttft_ms, time.ms_per_token, time.tokens_per_s, time.speedup_over_bf16)]


def _loss(one: Candidate) -> _Figure:
    loss = one.quality.loss_percent
    if loss.value == 0:
        return _Figure("0")
    low, high = loss_text(loss.low), loss_text(loss.high)
    return _Figure(loss_text(loss.value), f"{low} to {high}{'' if one.quality.measured else ', prior'}")


def render_decide_page(
    results: DecideResults, scenes: Sequence[Mapping[str, Any]], figures: Sequence[Sequence[RenderedFigure]] | None = None
) -> str:
    """The page as text.

    Args:
        figures: of each cell, when they are drawn already.
    """
    environment = Environment(
        loader=PackageLoader("fewbit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def source(name: str) -> str:
        return environment.loader.get_source(environment, name)[0]  # type: ignore[union-attr]

    script = source("decide.js")
    drawn = figures or [decide_figures(cell, scene) for cell, scene in zip(results.cells, scenes, strict=True)]
    document = TypeAdapter(DecideResults).dump_python(results, mode="json")
    return environment.get_template("decide.html.j2").render(
        results=results,
        workload=results.workload,
        cells=[_View(cell, each) for cell, each in zip(results.cells, drawn, strict=True)],
        css=Markup(PALETTE_CSS + source("report.css") + source("decide.css")),
        version=fewbit.__version__,
        embedded=_embedded(document),
        scene=_embedded({"constants": SCENE_CONSTANTS, "scenes": list(scenes)}),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _embedded(document: Any) -> Markup:
    """JSON for a `<script type="application/json">`; `<` is escaped, so that no text in it can end the element."""
    return Markup(json.dumps(document, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
