"""What a person has measured, read from words or from a file, and whether it can be true.

    bf16 decode 94 ms
    W4A16 decode batch 8 context 1024 18.2 ms
    bf16 prefill 16 x 1024 13.38 s
    int4 decode 41.5 tok/s, 4.58 GB

    FILE.json   results of `fewbit bench --json`, `fewbit compare` or `fewbit predict --json`, or a list of objects with these fields
    FILE.csv    a header of field names: scheme, phase, batch, context, kv, ms, weight_bytes
    FILE.txt    one line of words per point; empty lines and lines that start with # are skipped

A point that is faster than the device's bandwidth or peak allows is not used: whatever followed from it would be a confident wrong number.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from fewbit.errors import UsageError
from fewbit.formats.spec import SCHEMES
from fewbit.predict.prediction import MeasuredPoint, StepPoint

__all__ = ["parse_measured", "read_measured", "scheme_name"]

_ALIASES = {
    "fp16": "BF16",
    "f16": "BF16",
    "int8": "W8A16",
    "int4": "W4A16",
    "int3": "W3A16",
    "int2": "W2A16",
    "q8_0": "W8A16",
    "q4_0": "W4A16-G32",
}
_FORM = "write for example 'bf16 decode 94 ms' or 'W4A16 prefill 16 x 1024 13.38 s'"
_MILLISECONDS = {"s": 1e3, "ms": 1.0, "us": 1e-3}
_TOKENS = ("tok/s", "tokens/s", "t/s")
_SIZES = {"gb": 1e9, "gib": 2.0**30, "mb": 1e6, "mib": 2.0**20, "bytes": 1.0}
_NUMBER = r"\d+(?:[.,]\d+)?(?:e[+-]?\d+)?"
_FIELDS = ("scheme", "phase", "batch", "context", "kv", "ms", "weight_bytes")
_LARGEST_FILE = 64 * 2**20


def scheme_name(text: str) -> str:
    """The preset that a word names: a preset itself, or `int4`, `fp16` and the like.

    Raises:
        UsageError: no such preset.
    """
    name = _ALIASES.get(text.lower(), text.upper())
    if name not in SCHEMES:
        raise UsageError(f"unknown number format '{text}'", f"choose one of {', '.join([*SCHEMES, *_ALIASES])}")
    return name


def parse_measured(text: str, source: str = "--measured") -> MeasuredPoint:
    """One measured step from words, in any order.

    Args:
        text: a format, a phase, a time or a rate; optionally `batch N`, `context N` or `N x N`, `kv NAME`, and the bytes of the weights.
        source: for messages.

    Raises:
        UsageError: words that mean nothing, or no time.
    """
    rest = f" {text.strip()} "
    where = f"{source} '{text.strip()}'"

    def take(pattern: str) -> re.Match[str] | None:
        nonlocal rest
        match = re.search(rf"(?<=[\s,])(?:{pattern})(?=[\s,])", rest, re.IGNORECASE)
        if match is not None:
            rest = rest[: match.start()] + " " + rest[match.end() :]
        return match

    grid = take(r"(\d+)\s*x\s*(\d+)")
    batch, context, kv = take(r"batch[\s=]*(\d+)"), take(r"(?:context|prompt)[\s=]*(\d+)"), take(r"kv[\s=]*([\w-]+)")
    size = take(rf"({_NUMBER})\s*({'|'.join(_SIZES)})")
    rate = take(rf"({_NUMBER})\s*({'|'.join(_TOKENS)})")
    time = take(rf"({_NUMBER})\s*(ms|us|s)")
    words = [word for word in re.split(r"[\s,]+", rest) if word]
    phases = [word.lower() for word in words if word.lower() in ("decode", "prefill")]
    formats = [word for word in words if word.lower() not in ("decode", "prefill")]
    if len(phases) > 1 or len(formats) > 1:
        raise UsageError(f"{where} has words that mean nothing here: {' '.join(formats[1:] or phases)}", _FORM)
    if (time is None) == (rate is None):
        raise UsageError(f"{where} gives {'both a time and a rate' if time else 'no time'}", _FORM)
    if grid and (batch or context):
        raise UsageError(f"{where} gives batch or context twice", _FORM)
    point = StepPoint(
        phase=cast(Literal["prefill", "decode"], phases[0] if phases else "decode"),
        scheme=scheme_name(formats[0]) if formats else "BF16",
        kv="BF16" if kv is None else kv[1].upper(),
        batch=int(grid[1] if grid else batch[1] if batch else 1),
        context=int(grid[2] if grid else context[1] if context else 0),
    )
    if point.phase == "prefill" and point.context < 1:
        raise UsageError(f"{where} does not say how long the prompts are", _FORM)
    if time is not None:
        milliseconds = _float(time[1]) * _MILLISECONDS[time[2].lower()]
    else:
        assert rate is not None
        tokens = point.batch * (point.context if point.phase == "prefill" else 1)
        milliseconds = 1e3 * tokens / (_float(rate[1]) or math.nan)
    return _checked(MeasuredPoint(point, milliseconds, _float(size[1]) * _SIZES[size[2].lower()] if size else None, text.strip()), where)


def _float(text: str) -> float:
    return float(text.replace(",", "."))


def _checked(measured: MeasuredPoint, where: str) -> MeasuredPoint:
    size = measured.weight_bytes
    if (
        not math.isfinite(measured.milliseconds)
        or measured.milliseconds <= 0
        or (size is not None and not (math.isfinite(size) and size > 0))
    ):
        raise UsageError(f"{where}: a time or size that is not positive cannot be measured", _FORM)
    if measured.point.batch < 1 or measured.point.context < 0:
        raise UsageError(f"{where}: batch {measured.point.batch} and context {measured.point.context} cannot be meant", _FORM)
    return measured


def read_measured(argument: str) -> list[MeasuredPoint]:
    """The points that an argument of --measured means: the words themselves, or those of a file of that name.

    Raises:
        UsageError: words or a file that cannot be understood; the message says where.
    """
    path = Path(argument)
    suffix = path.suffix.lower()
    if suffix not in (".json", ".csv", ".txt") and not path.is_file():
        return [parse_measured(argument)]
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UsageError(f"'{path}' is too large to be a list of measurements", _FORM)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the measurements of '{path}': {error}", "give a text such as 'bf16 decode 94 ms', or a file"
        ) from error
    points = _of_json(text, path) if suffix == ".json" else _of_csv(text, path) if suffix == ".csv" else _of_lines(text, path)
    if not points:
        raise UsageError(f"'{path}' holds no measured step", _FORM)
    return points


def _of_lines(text: str, path: Path) -> list[MeasuredPoint]:
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [parse_measured(line, f"{path}:{number}") for number, line in lines if line and not line.startswith("#")]


def _of_csv(text: str, path: Path) -> list[MeasuredPoint]:
    reader = csv.DictReader(text.splitlines())
    return [_of_fields(row, f"{path}:{number}") for number, row in enumerate(reader, 2)]


def _of_json(text: str, path: Path) -> list[MeasuredPoint]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"'{path}' is not JSON: {str(error)[:120]}", _FORM) from error
    if isinstance(document, dict):
        rows = document.get("rows", document.get("variants"))
        if isinstance(rows, list):
            return [point for row in rows for point in _of_row(row, str(path))]
        document = document.get("measured", [document])
    if not isinstance(document, list):
        raise UsageError(f"'{path}' holds no list of measurements", _FORM)
    return [_of_fields(entry, f"{path}[{index}]") for index, entry in enumerate(document)]


def _of_row(row: Any, where: str) -> list[MeasuredPoint]:
    """Prefill and decode of one row of `fewbit bench` or `fewbit compare`, where its kernels were fused or its weights dense."""
    try:
        latency, variant = row["latency"], row["variant"]
        if latency is None:
            return []
        name = f"{variant['name']} of {where}"
        if variant["scheme"].upper() not in SCHEMES or not all(use.get("fused", True) for use in row["kernels"]):
            return []
        keeps = SCHEMES[variant["scheme"].upper()].kv_keys is None
        scheme, kv = (variant["scheme"].upper(), "BF16") if keeps else ("BF16", variant["scheme"].upper())
        size = float(latency["weight_bytes_per_step"])
        decode = StepPoint("decode", scheme, kv, 1, int(latency["decode_context_tokens"]))
        prefill = StepPoint("prefill", scheme, kv, 1, int(latency["prefill_tokens"]))
        return [
            _checked(MeasuredPoint(decode, float(latency["decode_ms_p50"]), size, f"decode of {name}"), name),
            _checked(MeasuredPoint(prefill, float(latency["prefill_ms"]), None, f"prefill of {name}"), name),
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{where} has a row that is not of fewbit's results: {type(error).__name__} {error}", _FORM) from error


def _of_fields(entry: Any, where: str) -> MeasuredPoint:
    """One object or CSV row; also a measured step of `fewbit predict --json`."""
    if isinstance(entry, Mapping) and isinstance(entry.get("measured"), Mapping):
        entry = entry["measured"]
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} is no object", f"give the fields {', '.join(_FIELDS)}")
    fields = {**entry, **(entry["point"] if isinstance(entry.get("point"), Mapping) else {})}
    fields = {key: value for key, value in fields.items() if key not in ("point", "source", "path") and value not in (None, "")}
    fields["ms"] = fields.pop("milliseconds", fields.get("ms"))
    unknown = [str(key) for key in fields if key not in _FIELDS]
    if unknown or fields["ms"] is None:
        what = f"has unknown fields {', '.join(unknown)}" if unknown else "has no time"
        raise UsageError(f"{where} {what}", f"fields are {', '.join(_FIELDS)}")
    try:
        point = StepPoint(
            phase=cast(Literal["prefill", "decode"], str(fields.get("phase", "decode")).lower()),
            scheme=scheme_name(str(fields.get("scheme", "BF16"))),
            kv=str(fields.get("kv", "BF16")).upper(),
            batch=int(fields.get("batch", 1)),
            context=int(fields.get("context", 0)),
        )
        size = float(fields["weight_bytes"]) if "weight_bytes" in fields else None
        return _checked(MeasuredPoint(point, float(fields["ms"]), size, where), where)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} cannot be understood: {str(error).splitlines()[0]}", f"fields are {', '.join(_FIELDS)}") from error
