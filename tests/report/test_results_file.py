from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import jsonschema
import pytest

from fewbit.errors import CheckpointError, MeasurementError, OutputError, UsageError
from fewbit.report.results_file import CSV_NAME, RESULTS_NAME, SCHEMA_FILE, read_results, results_schema, write_results
from fewbit.results import SCHEMA_VERSION, CompareResults, Interval


def _edited(results: CompareResults, directory: Path, **changes: object) -> Path:
    path = write_results(results, directory)
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))
    return path


def test_round_trip_through_file_and_directory(any_results: CompareResults, tmp_path: Path) -> None:
    path = write_results(any_results, tmp_path / "new" / "out")
    assert path == tmp_path / "new" / "out" / RESULTS_NAME
    assert read_results(path) == any_results
    assert read_results(path.parent) == any_results


def test_nothing_but_the_two_files_is_left_and_bytes_are_stable(example: CompareResults, tmp_path: Path) -> None:
    first = write_results(example, tmp_path).read_bytes()
    assert write_results(read_results(tmp_path), tmp_path).read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {RESULTS_NAME, CSV_NAME}


def test_kept_schema_is_the_generated_one() -> None:
    assert json.loads(SCHEMA_FILE.read_text()) == json.loads(json.dumps(results_schema())), "run python -m fewbit.report.results_file"


def test_example_validates_and_a_wrong_one_does_not(any_results: CompareResults, tmp_path: Path) -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    document = json.loads(write_results(any_results, tmp_path).read_text())
    jsonschema.validate(document, schema)
    document["variants"][0]["memory"]["resident_weight_bytes"] = "many"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_refused_by_name(example: CompareResults, tmp_path: Path, value: float) -> None:
    row = example.variants[2]
    assert row.quality is not None
    broken = dataclasses.replace(row, quality=dataclasses.replace(row.quality, perplexity=Interval(value, 1.0, 2.0)))
    results = dataclasses.replace(example, variants=[example.variants[0], broken])
    with pytest.raises(MeasurementError, match=r"variants\[1\]\.quality\.perplexity\.value"):
        write_results(results, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_csv_has_a_row_per_variant_and_every_figure(example: CompareResults, tmp_path: Path) -> None:
    write_results(example, tmp_path)
    with (tmp_path / CSV_NAME).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert example.shapes is not None
    assert [row["section"] for row in rows] == ["model"] * len(example.variants) + ["shapes"] * len(example.shapes.variants)
    for row, variant in zip(rows, [*example.variants, *example.shapes.variants], strict=True):
        assert row["variant.name"] == variant.variant.name
        assert int(row["memory.resident_weight_bytes"]) == variant.memory.resident_weight_bytes
        assert variant.latency is not None
        assert float(row["latency.decode_ms_p50"]) == variant.latency.decode_ms_p50
        assert float(row["latency.operators.lm_head_ms"]) == variant.latency.operators.lm_head_ms
        assert row["latency.decode_ms_p99"] == ("" if variant.latency.decode_ms_p99 is None else str(variant.latency.decode_ms_p99))
        assert row["quality.perplexity.low"] == ("" if variant.quality is None else str(variant.quality.perplexity.low))
        assert row["kernels"].startswith(variant.kernels[0].kernel)


def test_csv_header_does_not_depend_on_what_was_measured(example: CompareResults, minimal: CompareResults, tmp_path: Path) -> None:
    headers = []
    for name, results in (("full", example), ("minimal", minimal)):
        write_results(results, tmp_path / name)
        headers.append((tmp_path / name / CSV_NAME).read_text().splitlines()[0])
    assert headers[0] == headers[1]


def test_missing_file_names_it_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"results\.json.*fewbit compare"):
        read_results(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": NaN}', "\x00"])
def test_what_is_not_json_is_said_to_be_so(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULTS_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="not JSON"):
        read_results(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema_version": "1"}'])
def test_other_json_is_not_a_results_file(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULTS_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="schema_version"):
        read_results(tmp_path)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / RESULTS_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_results(tmp_path)


def test_newer_schema_asks_for_an_update(example: CompareResults, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=rf"schema_version {SCHEMA_VERSION + 1}.*update"):
        read_results(_edited(example, tmp_path, schema_version=SCHEMA_VERSION + 1, brand_new_field=1))


def test_wrong_fields_are_named(example: CompareResults, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="duration_s") as caught:
        read_results(_edited(example, tmp_path, duration_s="long", unheard_of=1))
    assert "unheard_of" in str(caught.value) and "\n" not in str(caught.value)


def test_directory_that_cannot_be_made(example: CompareResults, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_results(example, tmp_path / "file" / "out")


def test_failed_write_keeps_the_old_file(example: CompareResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_results(example, tmp_path).read_bytes()

    def no_space(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(OutputError, match="No space left"):
        write_results(example, tmp_path)
    assert (tmp_path / RESULTS_NAME).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {RESULTS_NAME, CSV_NAME}
