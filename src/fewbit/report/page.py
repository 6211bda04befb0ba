"""report.html: one file that opens from disk, without a network, without a script.

The page is made from the document of results.json by JSON pointers, so every measured number in it is a `<data>` element that says where
in the file it stands (`data-pointer`), as what it is shown (`data-kind`) and with its full value (`value`); the document itself is
embedded, and a test compares the three. Layout and tables are a Jinja template with autoescaping; the content security policy forbids
every request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fewbit.report.columns import COLUMNS, GROUPS, HEADLINE, OPERATORS, Column, Section, cell_text, column_unit, lookup, sections
from fewbit.report.figures import RenderedFigure, render_figures
from fewbit.report.files import write_text
from fewbit.report.numbers import Kind, format_figure
from fewbit.report.results_file import to_document
from fewbit.report.svg_style import PALETTE_CSS
from fewbit.results import CompareResults

__all__ = ["PAGE_NAME", "render_page", "write_page"]

PAGE_NAME = "report.html"
_BARS = {"weights", "kv", "p50", "speedup"}
"""Columns with a bar of magnitude in the overview."""


def write_page(results: CompareResults, directory: Path, figures: Sequence[RenderedFigure] | None = None) -> Path:
    """Write report.html; `figures` saves drawing them again.

    Raises:
        MeasurementError: a figure of the results is not finite.
        OutputError: the directory cannot be written.
    """
    return write_text(directory / PAGE_NAME, render_page(results, figures))


def render_page(results: CompareResults, figures: Sequence[RenderedFigure] | None = None) -> str:
    """The page as text.

    Raises:
        MeasurementError: a figure of the results is not finite.
    """
    document = to_document(results)
    environment = Environment(
        loader=PackageLoader("fewbit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css, _, _ = environment.loader.get_source(environment, "report.css")  # type: ignore[union-attr]
    return environment.get_template("report.html.j2").render(
        document=document,
        embedded=_embedded(document),
        css=Markup(PALETTE_CSS + css),
        figures=[(figure, Markup(figure.svg)) for figure in (render_figures(results) if figures is None else figures)],
        sections=[_SectionView(section, document) for section in sections(document)],
        number=lambda pointer, kind, unit="": _number(document, pointer, kind, unit),
        passed_over=_passed_over(document),
        definitions=[(" ".join(_words(column)), column.meaning) for column in COLUMNS.values()],
        counters=_counters(document),
        threshold=next((f"/variants/{i}/quality/threshold_percent" for i, v in enumerate(document["variants"]) if v["quality"]), ""),
    )


def _embedded(document: Mapping[str, Any]) -> Markup:
    """The document for a `<script type="application/json">`; `<` is escaped, so that no text in it can end the element."""
    return Markup(json.dumps(document, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def _number(document: Mapping[str, Any], pointer: str, kind: Kind, unit: str = "") -> Markup:
    value = lookup(document, pointer)
    text = format_figure(value, kind, unit)
    if value is None:
        return Markup('<span class="missing" title="not measured">{}</span>').format(text)
    return Markup('<data value="{}" data-pointer="{}" data-kind="{}" data-unit="{}">{}</data>').format(
        json.dumps(value) if not isinstance(value, str) else value, pointer, kind, unit, text
    )


def _words(column: Column) -> list[str]:
    """Heading and unit in one line, for the cards and the definitions."""
    return [column.heading, f"({column.unit})"] if column.unit else [column.heading]


@dataclass(frozen=True)
class _Cell:
    """A table cell.

    Attributes:
        html: its figure or words.
        words: left aligned text, not a figure.
        tag: a remark after it.
        state: `pass`, `fail` or the bound, for its style.
        interval: ends of its confidence interval.
        bar: length of the bar of magnitude in percent; empty for none.
    """

    html: Markup
    words: bool = False
    tag: str = ""
    state: str = ""
    interval: tuple[Markup, Markup] | None = None
    bar: str = ""


class _SectionView:
    """What the template asks of a section."""

    def __init__(self, section: Section, document: Mapping[str, Any]) -> None:
        self.section = section
        self._document = document
        self.name = section.model["source"].removeprefix("shapes:")
        self.has_latency = section.has_part("latency")
        self.overview = self._table(HEADLINE)
        self.details = [(title, table) for title, keys in GROUPS.items() if (table := self._table(keys))["columns"]]
        self.operators = list(OPERATORS.items())
        self.operator_rows = [self._operator_row(index) for index in range(len(section.variants))] if self.has_latency else []

    def _table(self, keys: Sequence[str]) -> dict[str, Any]:
        """Columns that were measured, each with its unit and its cells."""
        shown = [COLUMNS[key] for key in keys if self.section.has(COLUMNS[key])]
        units = [column_unit(column, self.section.variants) for column in shown]
        rows = [
            {
                "label": variant["variant"]["label"],
                "about": variant["variant"],
                "cells": [self._cell(index, column, unit) for column, unit in zip(shown, units, strict=True)],
            }
            for index, variant in enumerate(self.section.variants)
        ]
        return {"columns": list(zip(shown, units, strict=True)), "rows": rows}

    def _cell(self, index: int, column: Column, unit: str) -> _Cell:
        variant = self.section.variants[index]
        if column.key == "kernel":
            fused = all(use["fused"] for use in variant["kernels"])
            return _Cell(escape(cell_text(column, variant, unit)), words=True, tag="" if fused else "unfused")
        pointer = f"{self.section.pointer}/{index}/{column.path}"
        words = column.kind in ("text", "verdict")
        return _Cell(
            _number(self._document, pointer + ("/value" if column.interval else ""), column.kind, unit if column.kind == "bytes" else ""),
            words=words,
            state=format_figure(lookup(variant, column.value_path), column.kind) if words else "",
            interval=self._interval(pointer, column) if column.interval and lookup(variant, column.path) is not None else None,
            bar=self._bar(column, variant) if column.key in _BARS else "",
        )

    def _interval(self, pointer: str, column: Column) -> tuple[Markup, Markup]:
        return _number(self._document, f"{pointer}/low", column.kind), _number(self._document, f"{pointer}/high", column.kind)

    def _bar(self, column: Column, variant: Mapping[str, Any]) -> str:
        """Length of the bar in percent of the longest; a decoration, the number stands beside it."""
        values = [lookup(row, column.value_path) for row in self.section.variants]
        longest = max((value for value in values if value is not None), default=0)
        value = lookup(variant, column.value_path)
        return f"{100 * value / longest:.1f}" if value and longest else "0"

    def _operator_row(self, index: int) -> dict[str, Any]:
        """A stacked bar: every class as a share of the longest row's sum, and its milliseconds."""
        variants = self.section.variants
        fields = [field for _, field in OPERATORS.values()]
        sums = [sum(lookup(row, f"latency/operators/{field}") or 0.0 for field in fields) for row in variants]
        base = "latency/operators/{}"
        return {
            "label": variants[index]["variant"]["label"],
            "parts": [
                {
                    "key": key.replace("_", "-"),
                    "width": f"{100 * (lookup(variants[index], base.format(field)) or 0.0) / (max(sums) or 1.0):.2f}",
                    "html": _number(self._document, f"{self.section.pointer}/{index}/latency/operators/{field}", "ms"),
                }
                for key, (_, field) in OPERATORS.items()
            ],
        }


def _passed_over(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry per row, with its kernels and the faster ones that did not run; rows that agree are joined."""
    entries: dict[str, dict[str, Any]] = {}
    for section in sections(document):
        for variant in section.variants:
            key = json.dumps([[use["kernel"], use["fused"], use["passed_over"]] for use in variant["kernels"]])
            entry = entries.setdefault(key, {"labels": [], "kernels": variant["kernels"]})
            if variant["variant"]["label"] not in entry["labels"]:
                entry["labels"].append(variant["variant"]["label"])
    return list(entries.values())


def _counters(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hardware counters of the rows that have any."""
    rows = []
    for section in sections(document):
        for index, variant in enumerate(section.variants):
            counted = lookup(variant, "latency/counters")
            if counted and counted["values"]:
                pointer = f"{section.pointer}/{index}/latency/counters/values"
                values = [(name, _number(document, f"{pointer}/{name}", "count")) for name in counted["values"]]
                rows.append({"label": variant["variant"]["label"], "tool": counted["tool"], "values": values})
    return rows
