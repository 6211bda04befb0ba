from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.report.numbers import MISSING, Kind, byte_unit, format_figure


@pytest.mark.parametrize(
    ("value", "kind", "unit", "text"),
    [
        (0.51234, "ms", "", "0.512"),
        (9.996, "ms", "", "10.0"),
        (1234.6, "ms", "", "1,235"),
        (0.0, "ms", "", "0"),
        (1_543_000_000, "bytes", "", "1.54 GB"),
        (1_543_000_000, "bytes", "MB", "1,543"),
        (999, "bytes", "", "999 B"),
        (0.04, "percent", "", "+0.04 %"),
        (-6.94, "percent", "", "\u22126.94 %"),
        (-0.001, "percent", "", "0.00 %"),
        (12345.6, "percent", "", "+12,346 %"),
        (0.0091, "share", "", "0.91 %"),
        (0.62, "share", "", "62 %"),
        (1.0, "share", "", "100 %"),
        (2.786, "ratio", "", "2.79\u00d7"),
        (4.125, "bits", "", "4.125"),
        (1.9e-5, "nats", "", "1.9e-5"),
        (634, "count", "", "634"),
        (12345, "count", "", "12,345"),
        (True, "verdict", "", "pass"),
        (False, "verdict", "", "fail"),
        (None, "ms", "", MISSING),
        (7.8423, "perplexity", "", "7.842"),
    ],
)
def test_examples(value: object, kind: Kind, unit: str, text: str) -> None:
    assert format_figure(value, kind, unit) == text


@given(st.floats(1e-4, 9e6))
def test_three_significant_digits_keep_the_value(value: float) -> None:
    assert float(format_figure(value, "ms").replace(",", "")) == pytest.approx(value, rel=0.0051)


def test_a_column_has_the_unit_of_its_largest_value() -> None:
    assert byte_unit([None, 3_072, 12_589_568]) == "MB"
    assert byte_unit([None]) == "B"
