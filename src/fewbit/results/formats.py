"""What `fewbit formats` shows: each number format, and its error on data."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN, SCHEMA_VERSION

__all__ = ["FormatData", "FormatErrors", "FormatInfo", "FormatsResult", "HardwareSupport"]


@dataclass(frozen=True, config=FROZEN)
class HardwareSupport:
    """Hardware that multiplies a number format without converting it first, and the document that says so."""

    hardware: str
    source: str


@dataclass(frozen=True, config=FROZEN)
class FormatInfo:
    """One number format, before any scale.

    Attributes:
        smallest: smallest positive value.
        epsilon: distance from 1 to the next larger value of a float; None for the other types.
        code_points: all finite values in ascending order; empty for 16 bits and more.
        points_near_zero: the smallest positive values.
        native: empty: no hardware multiplies it, it is a format for storage.
    """

    name: str
    label: str
    bits: int
    minimum: float
    maximum: float
    smallest: float
    epsilon: float | None
    code_points: list[float]
    points_near_zero: list[float]
    native: list[HardwareSupport]


@dataclass(frozen=True, config=FROZEN)
class FormatErrors:
    """What one format and granularity cost on one set of numbers.

    Attributes:
        granularity: `tensor`, `channel` or `group N`.
        effective_bits: per weight, scales counted.
        overhead_bits: effective bits without the bits of the value.
        relative_error: norm of the difference over the norm of the numbers.
        sqnr_db: signal to quantization noise, -20 log10 of it.
    """

    format: str
    granularity: str
    effective_bits: float
    overhead_bits: float
    relative_error: float
    sqnr_db: float


@dataclass(frozen=True, config=FROZEN)
class FormatData:
    """A set of numbers [rows, columns] and what the formats cost on it; formats whose group does not divide the columns are left out."""

    name: str
    description: str
    rows: int
    columns: int
    errors: list[FormatErrors]


@dataclass(frozen=True, config=FROZEN)
class FormatsResult:
    """What `fewbit formats` shows; `conclusions` are read off `data`."""

    formats: list[FormatInfo]
    data: list[FormatData]
    conclusions: list[str]
    schema_version: int = SCHEMA_VERSION
