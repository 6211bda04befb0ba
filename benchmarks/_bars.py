"""The harness of every script in this folder: figures with a threshold, one line each.

    bars = [Bar("int8-perplexity-delta", lambda: measure(), "<=", 0.5, "percent against BF16")]
    run_bars(bars, description=__doc__)

prints `bar: NAME VALUE OP THRESHOLD pass|fail`, one line per bar, and ends with exit code 1 when one fails. `--list` prints the names and
measures nothing; `--json FILE` writes the outcomes as well. A bar that cannot be measured (a peer that does not install, too much noise)
raises `NotMeasuredError`: its line has `-` for the value, `fail` and the reason. Nothing counts as passed that was not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Bar", "NotMeasuredError", "Outcome", "add_arguments", "measure", "run_bars"]

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}


class NotMeasuredError(Exception):
    """A bar that could not be measured; the message is the reason, one line."""


@dataclass(frozen=True)
class Bar:
    """A figure that must hold.

    Attributes:
        name: unique in its script, words joined by hyphens.
        value: measures the figure; raises NotMeasuredError with the reason when it cannot.
        op: one of < <= > >= ==, read as VALUE OP THRESHOLD.
        threshold: the figure to hold against.
        note: unit and meaning, for `--list` and the JSON file.
    """

    name: str
    value: Callable[[], float]
    op: str
    threshold: float
    note: str = ""

    def __post_init__(self) -> None:
        if self.op not in _OPERATORS:
            raise ValueError(f"bar {self.name}: operator '{self.op}' is not one of {' '.join(_OPERATORS)}")
        if not self.name or any(character.isspace() for character in self.name):
            raise ValueError(f"bar name '{self.name}' must be one word")


@dataclass(frozen=True)
class Outcome:
    """A measured bar; `value` is None when it could not be measured, and `reason` says why."""

    name: str
    value: float | None
    op: str
    threshold: float
    passed: bool
    note: str
    reason: str = ""

    def line(self) -> str:
        """`bar: NAME VALUE OP THRESHOLD pass|fail`, and the reason when there is no value."""
        value = "-" if self.value is None else f"{self.value:.6g}"
        reason = f" ({self.reason})" if self.reason else ""
        return f"bar: {self.name} {value} {self.op} {self.threshold:.6g} {'pass' if self.passed else 'fail'}{reason}"


def measure(bar: Bar) -> Outcome:
    """Measure one bar. A value that is NaN or infinite is no measurement."""
    try:
        value = float(bar.value())
    except NotMeasuredError as error:
        return Outcome(bar.name, None, bar.op, bar.threshold, False, bar.note, " ".join(str(error).split()))
    if not math.isfinite(value):
        return Outcome(bar.name, None, bar.op, bar.threshold, False, bar.note, f"measured {value}")
    return Outcome(bar.name, value, bar.op, bar.threshold, _OPERATORS[bar.op](value, bar.threshold), bar.note)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every script in this folder has."""
    parser.add_argument("--list", action="store_true", help="print every bar's name and measure nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the outcomes as JSON")


def run_bars(bars: Sequence[Bar], *, list_only: bool = False, json_file: Path | None = None) -> int:
    """Print one line per bar and return the exit code: 1 when a bar failed, else 0.

    Args:
        list_only: print names, operators and thresholds only.
        json_file: also write `[{name, value, op, threshold, passed, note, reason}, ...]`.
    """
    names = [bar.name for bar in bars]
    if len(set(names)) != len(names):
        raise ValueError(f"bar names are not unique: {sorted(names)}")
    if list_only:
        for bar in bars:
            print(f"{bar.name} {bar.op} {bar.threshold:.6g}{f'  {bar.note}' if bar.note else ''}")
        return 0
    outcomes = []
    for bar in bars:
        outcomes.append(measure(bar))
        print(outcomes[-1].line(), flush=True)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n", encoding="utf-8")
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} bars pass", file=sys.stderr)
    return 1 if failed else 0
