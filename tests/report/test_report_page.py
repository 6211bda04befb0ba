from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fewbit.report.columns import lookup
from fewbit.report.numbers import format_figure
from fewbit.report.page import render_page
from fewbit.report.results_file import to_document, write_results
from fewbit.results import CompareResults
from fewbit.workflows.report import build_report


class _Page(HTMLParser):
    """Collects the `<data>` elements, the embedded document, tags and text outside of figures and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.embedded = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "data":
            self.figures.append((dict(attrs), ""))
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "data":
            attributes, text = self.figures[-1]
            self.figures[-1] = (attributes, text + data)
        elif self._open and self._open[-1] == "script":
            self.embedded += data
        elif "td" in self._open:
            self.cells[-1] += data


def test_every_figure_is_in_the_results_file(any_results: CompareResults) -> None:
    page = _Page(render_page(any_results))
    document = json.loads(page.embedded)
    assert document == json.loads(json.dumps(to_document(any_results)))
    assert len(page.figures) > 10
    for attributes, text in page.figures:
        pointer, kind, value = attributes["data-pointer"], attributes["data-kind"], attributes["value"]
        assert pointer is not None and value is not None
        stored = lookup(document, pointer)
        assert value == (stored if isinstance(stored, str) else json.dumps(stored)), pointer
        assert text == format_figure(stored, kind, attributes["data-unit"] or ""), pointer  # type: ignore[arg-type]


def test_cells_hold_no_number_of_their_own(example: CompareResults) -> None:
    kernels = {use.kernel for row in example.variants for use in row.kernels}
    for cell in _Page(render_page(example)).cells:
        rest = re.sub("|".join(kernels), "", cell)
        assert not re.search(r"(?<!BF)\d", re.sub(r"vs BF16|/weight|/param|top-1", "", rest)), cell


def test_every_variant_is_there_in_every_section(example: CompareResults) -> None:
    pointers = {attributes["data-pointer"] for attributes, _ in _Page(render_page(example)).figures}
    for prefix in ("/variants", "/shapes/variants"):
        for index in range(len(example.variants)):
            assert f"{prefix}/{index}/memory/resident_weight_bytes" in pointers
            assert f"{prefix}/{index}/latency/operators/ffn_projections_ms" in pointers


def test_hostile_names_stay_text(example: CompareResults) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    results = dataclasses.replace(example, model=dataclasses.replace(example.model, source=evil), conclusions=[evil], command=evil)
    page = _Page(render_page(results))
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == ["application/json"]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert json.loads(page.embedded)["command"] == evil


def test_tables_have_scoped_headers_and_captions(example: CompareResults) -> None:
    tags = _Page(render_page(example)).tags
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags)


def test_build_report_needs_nothing_but_the_results_file(example: CompareResults, tmp_path: Path) -> None:
    write_results(example, tmp_path)
    (tmp_path / "results.csv").unlink()
    page = build_report(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "results.csv", "report.html", "kernel-decides.svg", "memory-latency.svg", "quality-bits.svg"}
    first = page.read_bytes()
    assert build_report(tmp_path).read_bytes() == first


@pytest.fixture(scope="module")
def page(any_results: CompareResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("page")
    write_results(any_results, directory)
    return build_report(directory)


@pytest.mark.browser
class TestInChromium:
    """The page as a browser sees it."""

    def test_renders_without_a_request_or_a_complaint(self, browser: Any, page: Path) -> None:
        browser.open(page)
        assert browser.requested_urls() == [page.resolve().as_uri()]
        assert browser.complaints() == []
        sizes = browser.evaluate("[...document.querySelectorAll('figure svg')].map(s => [s.clientWidth, s.clientHeight])")
        assert len(sizes) == 3 and all(width > 300 and height > 150 for width, height in sizes)
        assert "JSON" not in browser.evaluate("document.body.innerText.slice(0, 200)")

    @pytest.mark.parametrize("width", [390, 820, 1280])
    def test_nothing_is_wider_than_the_screen(self, browser: Any, page: Path, width: int) -> None:
        browser.open(page, width=width)
        browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate("[...document.querySelectorAll('.overview')].every(t => t.getBoundingClientRect().right <= innerWidth)")

    def test_text_in_figures_does_not_overlap(self, browser: Any, page: Path) -> None:
        browser.open(page)
        overlaps = browser.evaluate(
            """[...document.querySelectorAll('figure svg')].flatMap(svg => {
                const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
                return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
                    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 2 && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 5)
                    .map(([b]) => a + ' / ' + b)) })"""
        )
        assert overlaps == []

    def test_dark_mode_changes_page_and_figures_and_keeps_the_contrast(self, browser: Any, page: Path) -> None:
        seen = {}
        for dark in (False, True):
            browser.open(page, dark=dark)
            seen[dark] = browser.evaluate(
                "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.note, .facts')).color,"
                " getComputedStyle(document.querySelector('figure svg text')).fill]"
            )
        assert all(light != dark for light, dark in zip(seen[False], seen[True], strict=True))
        for background, muted, text in seen.values():
            assert _contrast(background, muted) >= 4.5 and _contrast(background, text) >= 4.5


def _contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two CSS rgb() colours."""

    def luminance(colour: str) -> float:
        channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
