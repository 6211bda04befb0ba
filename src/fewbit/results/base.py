"""What all result types share: how they are frozen, the version of the file format, and the interval."""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

__all__ = ["FROZEN", "SCHEMA_VERSION", "Interval"]

SCHEMA_VERSION = 1
FROZEN = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=FROZEN)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float
