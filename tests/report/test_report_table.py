from __future__ import annotations

import dataclasses
import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from fewbit.report.table import render_results
from fewbit.results import CompareResults


def _render(results: CompareResults, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False, legacy_windows=False)
    render_results(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_fits_the_width_and_cuts_nothing(any_results: CompareResults, width: int) -> None:
    text = _render(any_results, width)
    assert max(map(cell_len, text.splitlines())) <= width
    for row in any_results.variants:
        assert any(line.startswith(row.variant.label) for line in text.splitlines())
    for value in ("12.6", "4.125"):
        assert value in text


def test_wide_is_one_table_with_every_question(example: CompareResults) -> None:
    lines = _render(example, 140).splitlines()
    row = next(line for line in lines if line.startswith("INT4 g128 (W4A16)"))
    for cell in ("4.125", "4.81", "2.02", "1.14\u00d7", "overhead", "8.383", "+6.90 %", "fail", "torch-int4pack"):
        assert cell in row.split("  ") or cell in row


def test_narrow_stacks_one_table_for_each_question(example: CompareResults) -> None:
    lines = [line.strip() for line in _render(example, 80).splitlines()]
    titles = ["Memory", "Latency", "Bottleneck", "Quality", "Kernel"]
    positions = [lines.index(title) for title in titles]
    assert positions == sorted(positions)
    assert not any("continued" in line for line in lines)


@pytest.mark.parametrize("width", [80, 140])
def test_shapes_say_that_they_are_scaled_and_conclusions_come_last(example: CompareResults, width: int) -> None:
    text = " ".join(_render(example, width).split())
    assert "scaled from 4 of 28 layers" in text
    assert text.index("scaled from") < text.index("Conclusions") < text.index("Warnings")
    for conclusion in example.conclusions:
        assert conclusion[:40] in text


def test_every_kernel_passed_over_comes_with_its_reason(example: CompareResults) -> None:
    text = " ".join(_render(example, 140).split())
    for row in example.variants:
        for use in row.kernels:
            for passed in use.passed_over:
                assert f"{passed.kernel}: {passed.reason}" in text


def test_markup_in_names_is_not_interpreted(minimal: CompareResults) -> None:
    results = dataclasses.replace(
        minimal, conclusions=["see [red]this[/red]"], model=dataclasses.replace(minimal.model, source="dir/[bold]m")
    )
    text = _render(results, 80)
    assert "[red]this[/red]" in text and "dir/[bold]m" in text


def test_what_was_not_measured_has_no_column(minimal: CompareResults) -> None:
    text = _render(minimal, 80)
    assert "Latency" not in text and "Perplexity" not in text
