"""benchmarks/decode.py on made-up passes: which figures its bars compare."""

from __future__ import annotations

import contextlib

import decode
import pytest
from _bars import NotMeasuredError
from _interleaved import Series


def _series(seconds: float, **facts: object) -> Series:
    return Series(kept=[seconds] * 5, facts={"tokens": 8, "passes": 8, "bytes": 400_000_000, "head": "INT8", "version": "1", **facts})


class _Models(decode.Models):
    """Fewbit takes 80 ms for 8 tokens, llama.cpp 100 ms."""

    def __init__(self, bandwidth: float) -> None:
        super().__init__(2, 1, 1.0)
        self._bandwidth = bandwidth

    def phase(self, shapes: str, group: str, phase: str) -> decode.Measured:
        names = decode.GROUPS[group]
        series = {name: _series(0.08 if name.startswith("fewbit") else 0.1) for name in names if not name.startswith("openvino")}
        return decode.Measured(series, self._bandwidth, {"openvino-q4_0": "not installed"})


def _values(bandwidth: float, only: str = "") -> dict[str, float]:
    values = {}
    for bar in decode.bars(_Models(bandwidth), only):
        if bar.name != "memory-growth":
            try:
                values[bar.name] = bar.value()
            except NotMeasuredError:
                values[bar.name] = float("nan")
    return values


def test_decode_is_held_against_the_peer_or_against_memory() -> None:
    assert _values(1000.0)["qwen2.5-0.5b-int4-decode"] == pytest.approx(1.25 / 1.10)
    # 0.92 of 36 GB/s are 82.8 steps of 0.4 GB: less than 1.10 times the peer's 80 is asked for.
    assert _values(36.0)["qwen2.5-0.5b-int4-decode"] == pytest.approx(100 / 82.8)


def test_a_peer_that_is_missing_is_no_pass() -> None:
    values = _values(1000.0, "qwen2.5-1.5b-int4")
    assert set(values) == {f"qwen2.5-1.5b-int4-{what}" for what in ("decode", "head4-decode", "prefill128", "prefill512", "batch8")}
    assert values["qwen2.5-1.5b-int4-batch8"] == pytest.approx(1.25)
    assert str(values["qwen2.5-1.5b-int4-prefill128"]) == "nan"


def test_a_table_names_who_was_not_measured() -> None:
    lines = _Models(40.0).phase("qwen2.5-0.5b", "int4", "decode").lines("title")
    assert lines[0] == "title: reads 40.0 GB/s"
    assert any("llamacpp-q4_0" in line and "80.0 tokens/s" in line and "400 MB/token, head INT8" in line for line in lines)
    assert any("openvino-q4_0" in line and "not installed" in line for line in lines)


def test_kept_measurements_are_not_made_again(tmp_path) -> None:
    file = tmp_path / "decode.json"
    first = decode.Models(2, 1, 1.0, file)
    first._done["qwen2.5-0.5b int8 decode"] = _Models(36.0).phase("qwen2.5-0.5b", "int8", "decode")
    first._keep()
    kept = decode.Models(2, 1, 1.0, file).phase("qwen2.5-0.5b", "int8", "decode")
    assert (kept.bandwidth, kept.rate("fewbit-int8"), kept.rate("llamacpp-q8_0")) == (36.0, 100.0, 80.0)
    assert kept.series["fewbit-int8"].facts == _series(0.08).facts
    assert kept.reasons == {"openvino-q4_0": "not installed"}


def test_every_bar_has_its_phase() -> None:
    asked: set[tuple[str, str]] = set()

    class Asked(_Models):
        def phase(self, shapes: str, group: str, phase: str) -> decode.Measured:
            asked.add((group, phase))
            return super().phase(shapes, group, phase)

    for bar in decode.bars(Asked(40.0), "qwen2.5-0.5b"):
        with contextlib.suppress(NotMeasuredError):
            bar.value()
    assert asked == {(group, phase) for group, phases in decode.PHASES_OF.items() for phase in phases}


def test_a_pass_counts_by_what_it_waited_and_one_of_seconds_may_wait_longer():
    series = Series()
    for seconds, delay in ((0.5, 0.005), (0.5, 0.05), (2.0, 0.2), (2.0, 0.4)):
        series.add({"seconds": seconds, "delay": delay})
    assert series.kept == [0.5, 2.0] and series.dropped == 2 and series.fastest == 0.5
