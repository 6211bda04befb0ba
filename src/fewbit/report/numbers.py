"""How a measured number becomes text: one function for the terminal, the page and the figures.

Three significant digits are what a latency measurement carries; more would be noise that looks like knowledge. Bytes count in powers of ten
(1 MB = 1e6 bytes, 1 GB = 1e9 bytes), as memory bandwidth does, so that bytes divided by GB/s give seconds without a factor in between.
A column of bytes has one unit for all its rows (`byte_unit`), because rows are compared with each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

__all__ = ["BYTE_UNITS", "MISSING", "Kind", "byte_unit", "format_figure"]

Kind = Literal["ms", "bytes", "bits", "percent", "share", "ratio", "gb_s", "nats", "perplexity", "count", "text", "verdict"]

MISSING = "\u2013"
_MINUS = "\u2212"
BYTE_UNITS: dict[str, float] = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def byte_unit(values: Iterable[object]) -> str:
    """The largest unit in which the largest of `values` (bytes; None allowed) is at least 1; `B` for none."""
    largest = max((float(v) for v in values if isinstance(v, int | float)), default=0.0)
    return max((unit for unit, size in BYTE_UNITS.items() if largest >= size), key=BYTE_UNITS.__getitem__, default="B")


def _significant(value: float, digits: int = 3) -> str:
    """At least `digits` significant digits, no exponent from 1e-4 to 1e7, thousands separated by commas."""
    if value == 0.0:
        return "0"
    magnitude = abs(value)
    if magnitude < 1e-4 or magnitude >= 1e7:
        mantissa, _, exponent = f"{magnitude:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    # The exponent after rounding, so that 9.999 becomes 10.0 and not 10.00.
    exponent_10 = int(f"{magnitude:.{digits - 1}e}".partition("e")[2])
    return f"{magnitude:,.{max(0, digits - 1 - exponent_10)}f}"


def _signed(value: float, text: str) -> str:
    return f"{_MINUS}{text}" if value < 0 else text


def format_figure(value: object, kind: Kind, unit: str = "") -> str:
    """The text of one value of a results file, without its unit except for `%` and the multiplication sign.

    Args:
        value: what stands in the file; None is "not measured".
        kind: what it is. `percent` is a signed difference in percent, `share` a fraction from 0 to 1 (shown in percent).
        unit: for `bytes`: the unit to count in; empty chooses one and appends it.
    """
    if value is None:
        return MISSING
    if kind == "text":
        return str(value)
    if kind == "verdict":
        return "pass" if value else "fail"
    number = float(cast(float, value))
    if kind == "bytes":
        if unit:
            return _signed(number, _significant(number / BYTE_UNITS[unit]))
        unit = byte_unit([abs(number)])
        return f"{_signed(number, _significant(number / BYTE_UNITS[unit]))} {unit}"
    if kind == "count":
        return f"{number:,.0f}"
    if kind == "percent":
        # Two decimals below 10 %: a difference of 0.00 % is an answer, 0.00123 % is not more of one.
        text = f"{abs(number):.2f}" if abs(number) < 9.995 else _significant(number)
        sign = "" if float(text.replace(",", "")) == 0 else ("+" if number > 0 else _MINUS)
        return f"{sign}{text} %"
    if kind == "share":
        percent = abs(100 * number)
        text = _significant(percent, 3 if percent >= 99.5 else 2) if percent >= 1 else f"{percent:.2f}"
        return f"{_signed(number, text)} %"
    if kind == "ratio":
        return f"{number:,.2f}\u00d7"
    if kind in ("bits", "perplexity"):
        return _signed(number, _significant(number, 4))
    if kind == "nats":
        return _signed(number, _significant(number, 2))
    return _signed(number, _significant(number))
