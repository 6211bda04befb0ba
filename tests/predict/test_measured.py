"""Measurements in words and files, and those that cannot be true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewbit.errors import UsageError
from fewbit.predict.hardware import get_hardware
from fewbit.predict.measured import parse_measured, read_measured
from fewbit.predict.outline import outline_of_count
from fewbit.predict.plausible import examine
from fewbit.predict.prediction import MeasuredPoint, StepPoint


@pytest.mark.parametrize(
    ("text", "point", "milliseconds"),
    [
        ("bf16 decode 94 ms", StepPoint(), 94.0),
        ("INT4 decode batch 8 context 1024 18.2ms", StepPoint(scheme="W4A16", batch=8, context=1024), 18.2),
        ("bf16 prefill 16 x 1024 13.38 s", StepPoint("prefill", batch=16, context=1024), 13380.0),
        ("fp8, decode, 50 tok/s, batch=4", StepPoint(scheme="FP8", batch=4), 80.0),
        ("W8A16 decode kv kv-int8 context 100 1e3 us", StepPoint(scheme="W8A16", kv="KV-INT8", context=100), 1.0),
    ],
)
def test_words(text: str, point: StepPoint, milliseconds: float) -> None:
    measured = parse_measured(text)
    assert measured.point == point
    assert measured.milliseconds == pytest.approx(milliseconds)


def test_a_size_is_the_bytes_of_the_weights() -> None:
    assert parse_measured("int4 decode 4.58 GiB 8.7 ms").weight_bytes == pytest.approx(4.58 * 2**30)


@pytest.mark.parametrize(
    "text",
    ["bf16 decode", "bf16 decode 94", "bf16 decode -3 ms", "bf16 decode 0 ms", "bf16 decode 94 ms 10 tok/s", "bf16 swim 94 ms",
     "94 parsecs", "prefill 90 ms", "W5A16 decode 9 ms", "bf16 decode 2 x 8 batch 4 9 ms", "", "bf16 decode 1e999 ms"],
)  # fmt: skip
def test_words_that_mean_nothing(text: str) -> None:
    with pytest.raises(UsageError):
        parse_measured(text)


def test_files(tmp_path: Path) -> None:
    fields = {"scheme": "W4A16", "phase": "decode", "batch": 2, "context": 64, "ms": 20.5}
    wanted = [MeasuredPoint(StepPoint(scheme="W4A16", batch=2, context=64), 20.5)]
    (tmp_path / "a.json").write_text(json.dumps([fields]))
    (tmp_path / "a.csv").write_text("scheme,phase,batch,context,ms,kv\nW4A16,decode,2,64,20.5,\n")
    (tmp_path / "a.txt").write_text("# mine\n\nW4A16 decode 2 x 64 20.5 ms\n")
    for name in ("a.json", "a.csv", "a.txt"):
        found = read_measured(str(tmp_path / name))
        assert [(m.point, m.milliseconds) for m in found] == [(m.point, m.milliseconds) for m in wanted], name


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "[3]", r"a.json\[0\]"),
        ("a.json", "[]", "no measured step"),
        ("a.json", '[{"scheme": "BF16"}]', "no time"),
        ("a.json", '[{"ms": 3, "wings": 2}]', "wings"),
        ("a.json", '[{"ms": NaN}]', "not positive"),
        ("a.json", '{"rows": [{"variant": {}}]}', "not of fewbit's results"),
        ("a.csv", "scheme,ms\nBF16,fast\n", "a.csv:2"),
        ("a.txt", "bf16 decode 3 ms\nhello\n", "a.txt:2"),
    ],
)
def test_damaged_files_say_where(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said):
        read_measured(str(tmp_path / name))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_measured("no-such-file.json")


def test_impossible_times_are_not_used() -> None:
    device, outline = get_hardware("agx-orin-64gb"), outline_of_count(7e9)
    step = examine(device, outline, MeasuredPoint(StepPoint(), 40.0))
    assert not step.used and "impossible" in step.problem and "GB/s" in step.problem
    prefill = examine(device, outline, MeasuredPoint(StepPoint("prefill", batch=16, context=1024), 1000.0))
    assert not prefill.used and "TFLOP/s" in prefill.problem
    assert examine(device, outline, MeasuredPoint(StepPoint(), 94.0)).problem == ""
    slow = examine(device, outline, MeasuredPoint(StepPoint(), 94_000.0))
    assert slow.used and "check the unit" in slow.problem
