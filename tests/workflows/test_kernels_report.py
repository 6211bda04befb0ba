"""`fewbit kernels`: the report and its terminal page."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from fewbit.errors import UsageError
from fewbit.formats.spec import SCHEMES
from fewbit.kernels.dispatch import KERNELS
from fewbit.report.kernel_tables import render_kernels
from fewbit.results import KernelsReport
from fewbit.workflows.kernels import list_kernels


def text_of(report: KernelsReport, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    render_kernels(report, console)
    return console.export_text()


def test_every_scheme_and_kernel_is_listed() -> None:
    report = list_kernels()
    assert [row.scheme for row in report.schemes] == [scheme.name for scheme in SCHEMES.values() if scheme.weights]
    assert [kernel.name for kernel in report.kernels] == [kernel.name for kernel in KERNELS]
    for row in report.schemes:
        assert {entry.kernel for entry in row.refused} | {row.kernel} == {kernel.name for kernel in KERNELS}
    adapter = TypeAdapter(KernelsReport)
    assert adapter.validate_json(adapter.dump_json(report)) == report


def test_the_reason_for_a_slow_path_is_shown_with_its_number() -> None:
    text = " ".join(text_of(list_kernels((40, 200)), 300).split())
    assert "cpu-int4-exact: needs in_features divisible by the group size, 128, not 200" in text


def test_a_slow_path_names_the_fused_kernels_that_could_not_run_or_says_that_there_are_none() -> None:
    report = list_kernels()
    row = next(row for row in report.schemes if row.scheme == "FP8")
    assert not row.fused, "FP8 has a fused kernel on the CPU now: take another scheme here"
    assert "triton-w8a8: runs on NVIDIA GPUs" in text_of(replace(report, schemes=[row]), 300)
    # Every preset has a fused kernel somewhere by now; a format that comes without one says so.
    lacking = replace(row, fused_candidates=[])
    assert "no fused kernel for this format yet" in text_of(replace(report, schemes=[lacking]), 300)


def test_shape_must_be_positive() -> None:
    with pytest.raises(UsageError, match="0x4096"):
        list_kernels((0, 4096))
