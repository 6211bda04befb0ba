"""results.json and results.csv: what `fewbit compare` leaves behind, and what everything else in this layer is built from.

`results.json` is the whole of it, in the order of the fields in `results/`; its JSON Schema is generated from these fields and kept
beside this file (`python -m fewbit.report.results_file` writes it anew). JSON has no NaN and no infinity: a figure that is not finite is
refused when it is written, by name, rather than found by whoever reads it. `results.csv` is the same flat: one row per variant, one
column per field, the columns named by their path (`memory.disk_bytes`, `quality.perplexity.low`), the variants of the shapes section
below those of the model.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fewbit.errors import CheckpointError, FewbitError, MeasurementError, UsageError
from fewbit.report.files import write_text
from fewbit.results import SCHEMA_VERSION, CompareResults, VariantResult

__all__ = [
    "CSV_NAME",
    "RESULTS_NAME",
    "SCHEMA_FILE",
    "csv_text",
    "json_text",
    "read_results",
    "results_schema",
    "to_document",
    "write_csv",
    "write_results",
]

RESULTS_NAME = "results.json"
CSV_NAME = "results.csv"
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")
_ADAPTER: TypeAdapter[CompareResults] = TypeAdapter(CompareResults)


def to_document(results: CompareResults) -> dict[str, Any]:
    """The JSON document as Python objects.

    Raises:
        MeasurementError: a figure is NaN or infinite; JSON cannot hold it.
    """
    document: dict[str, Any] = _ADAPTER.dump_python(results, mode="json")
    for where, value in _leaves(document):
        if isinstance(value, float) and not math.isfinite(value):
            raise MeasurementError(f"{where} is {value}, which a results file cannot hold", "leave the variant out, or report it as a bug")
    return document


def _leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a container, with its path, for example `variants[3].latency.prefill_ms`."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{where}[{index}]")
    else:
        yield where, node


def json_text(results: CompareResults) -> str:
    """results.json as text: fields in their declared order, two spaces of indent, final newline."""
    return json.dumps(to_document(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_results(results: CompareResults, directory: Path) -> Path:
    """Write results.json and results.csv into `directory` and return the path of results.json.

    Raises:
        MeasurementError: a figure is not finite.
        OutputError: the directory cannot be written.
    """
    text = json_text(results)
    path = write_text(directory / RESULTS_NAME, text)
    write_csv(results, directory)
    return path


def write_csv(results: CompareResults, directory: Path) -> Path:
    """Write results.csv into `directory`.

    Raises:
        OutputError: the directory cannot be written.
    """
    return write_text(directory / CSV_NAME, csv_text(results))


def csv_text(results: CompareResults) -> str:
    """results.csv as text. The header is the same for every results file; an empty cell is "not measured"."""
    columns = ["section", "run_id", "model", *_columns(VariantResult)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    sections = [("model", results.model, results.variants)]
    if results.shapes is not None:
        sections.append(("shapes", results.shapes.model, results.shapes.variants))
    for section, model, variants in sections:
        for variant in variants:
            row = {column: _csv_value(variant, column) for column in columns[3:]}
            writer.writerow({"section": section, "run_id": results.run_id, "model": model.source, **row})
    return buffer.getvalue()


def _columns(cls: type, prefix: str = "") -> Iterator[str]:
    """Paths of the fields of `cls`, nested dataclasses (optional ones too) flattened."""
    for name, hint in get_type_hints(cls).items():
        nested = hint
        if get_origin(hint) in (Union, types.UnionType):
            nested = next((part for part in get_args(hint) if dataclasses.is_dataclass(part)), hint)
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            yield from _columns(nested, f"{prefix}{name}.")
        else:
            yield prefix + name


def _csv_value(variant: VariantResult, column: str) -> object:
    value: Any = variant
    for part in column.split("."):
        value = getattr(value, part) if value is not None else None
    if column == "kernels":
        return "; ".join(f"{use.kernel} ({'fused' if use.fused else 'unfused'}, {use.linears} linears)" for use in variant.kernels)
    return json.dumps(value) if isinstance(value, dict) else value


def read_results(path: Path) -> CompareResults:
    """Read a results file, or the results.json of a directory.

    Raises:
        UsageError: there is no such file.
        CheckpointError: the file is not JSON, or its fields are not those of a results file (the first three wrong ones are named).
        MeasurementError: the file was written by a newer fewbit.
    """
    file = path / RESULTS_NAME if path.is_dir() else path
    remedy = "name the directory that `fewbit compare --out DIR` wrote"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"there is no results file {file}", remedy) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}", remedy) from error
    return _parse(text, file)


def _parse(text: str, file: Path) -> CompareResults:
    rerun = "run `fewbit compare` again to write it anew"
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}", rerun) from error
    if not isinstance(document, dict) or not isinstance(document.get("schema_version"), int):
        raise CheckpointError(f"{file} is not a results file: it has no schema_version", rerun)
    version = document["schema_version"]
    if version > SCHEMA_VERSION:
        raise MeasurementError(
            f"{file} has schema_version {version}, this fewbit reads up to {SCHEMA_VERSION}",
            "update fewbit to read it: pip install -U fewbit",
        )
    try:
        return _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        raise _field_problems(error, file, rerun) from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _field_problems(error: ValidationError, file: Path, remedy: str) -> FewbitError:
    problems = error.errors(include_url=False)
    shown = [f"{'.'.join(map(str, problem['loc'])) or 'the document'}: {problem['msg']}" for problem in problems[:3]]
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return CheckpointError(f"{file} is not a valid results file: {'; '.join(shown)}{more}", remedy)


def results_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of results.json."""
    schema = _ADAPTER.json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _write_schema() -> None:
    write_text(SCHEMA_FILE, json.dumps(results_schema(), indent=2) + "\n")


if __name__ == "__main__":
    _write_schema()
