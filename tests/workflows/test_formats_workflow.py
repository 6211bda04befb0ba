"""`describe_formats`: the figures agree with theory, the conclusions with the figures, and bad tensors are named."""

from __future__ import annotations

import io
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from pydantic import TypeAdapter
from rich.console import Console
from safetensors.torch import save_file

from fewbit.errors import CheckpointError, FewbitError, FormatError, ModelNotFoundError, UsageError
from fewbit.report.format_figures import render_format_figures, write_format_figures
from fewbit.report.format_tables import render_formats
from fewbit.results import FormatsResult
from fewbit.workflows.formats import describe_formats


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("formats") / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    damaged = torch.ones(4, 64)
    damaged[1, 2] = math.nan
    save_file(
        {
            "good.weight": torch.randn(64, 192, generator=generator).bfloat16(),
            "norm.weight": torch.ones(64),
            "ids": torch.zeros(4, 4, dtype=torch.int64),
            "nan.weight": damaged,
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def result(file: Path) -> FormatsResult:
    return describe_formats(f"{file}:good.weight")


def test_every_finer_granularity_errs_less_and_costs_more(result: FormatsResult) -> None:
    for data in result.data:
        for name in ("INT8", "INT4", "NF4", "INT3"):
            entries = [entry for entry in data.errors if entry.format == name]
            assert [e.granularity for e in entries][:2] == ["tensor", "channel"]
            errors, bits = [e.relative_error for e in entries], [e.effective_bits for e in entries]
            assert errors == sorted(errors, reverse=True) and bits == sorted(bits)


def test_gaussian_int8_per_tensor_errs_as_uniform_noise_of_one_step(result: FormatsResult) -> None:
    """Error of uniform rounding is step / sqrt(12); the step is set by the largest of 262,144 normal values, about 4.5 to 5.2 sigma."""
    gaussian = next(data for data in result.data if data.name == "gaussian")
    entry = next(e for e in gaussian.errors if (e.format, e.granularity) == ("INT8", "tensor"))
    low, high = (largest / 127.5 / math.sqrt(12) for largest in (4.3, 5.4))
    assert low < entry.relative_error < high
    assert entry.sqnr_db == pytest.approx(-20 * math.log10(entry.relative_error))


def test_groups_that_do_not_divide_are_left_out(result: FormatsResult) -> None:
    real = result.data[-1]
    assert {e.granularity for e in real.errors if e.format == "INT4"} == {"tensor", "channel", "group 64", "group 32", "group 16"}
    assert "good.weight" in real.description


def test_the_default_is_a_weight_of_the_bundled_model() -> None:
    result = describe_formats()
    assert "down_proj" in result.data[-1].description
    assert len(result.conclusions) == 3


def test_the_result_survives_json(result: FormatsResult) -> None:
    adapter = TypeAdapter(FormatsResult)
    assert adapter.validate_json(adapter.dump_json(result)) == result


@pytest.mark.parametrize("width", [80, 140])
def test_the_tables_fit_the_terminal(result: FormatsResult, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    render_formats(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line) for line in text.splitlines()) <= width
    for word in ("FP8 E4M3", "NVFP4", "g128", "storage only", "Blackwell", "Why per channel"):
        assert word in text


def test_the_figures_are_well_formed_and_write_like_any_figure(result: FormatsResult, tmp_path: Path) -> None:
    figures = render_format_figures(result)
    assert [f.name for f in figures] == ["code-points", "error-by-bits", "error-by-group"]
    for figure in figures:
        ElementTree.fromstring(figure.svg)
        assert "prefers-color-scheme:dark" in figure.svg
    assert [path.name for path in write_format_figures(result, tmp_path / "out")] == [f"{f.name}.svg" for f in figures]


@pytest.mark.parametrize(
    ("tensor", "error", "words"),
    [
        ("{file}", UsageError, "FILE:NAME"),
        ("{file}.missing:a", ModelNotFoundError, "no file"),
        ("{file}:absent", CheckpointError, "good.weight"),
        ("{file}:norm.weight", FormatError, r"shape \[64\]"),
        ("{file}:ids", FormatError, "int64"),
        ("{file}:nan.weight", FormatError, r"\[1, 2\]"),
    ],
)
def test_bad_tensors_are_named(file: Path, tensor: str, error: type[FewbitError], words: str) -> None:
    with pytest.raises(error, match=words):
        describe_formats(tensor.format(file=file))


def test_a_damaged_file_is_named(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        describe_formats(f"{cut}:good.weight")
