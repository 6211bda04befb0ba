"""Predictions follow from the physics: bytes for decode, operations for prefill, and measured points narrow them."""

from __future__ import annotations

import pytest

from fewbit.errors import UsageError
from fewbit.models.inventory_sources import read_inventory
from fewbit.predict.hardware import HARDWARE, get_hardware, read_hardware
from fewbit.predict.outline import outline_of, outline_of_count
from fewbit.predict.prediction import MeasuredPoint, StepPoint
from fewbit.predict.predictor import Predictor


def test_measured_points_narrow_the_interval() -> None:
    hardware, outline = get_hardware("agx-orin-64gb"), outline_of_count(7e9)
    wanted = StepPoint(scheme="W4A16")

    def width(points: list[MeasuredPoint]) -> float:
        ms = Predictor(hardware, outline, points).predict(wanted).milliseconds
        return ms.high / ms.low

    first = [MeasuredPoint(StepPoint(), 94.0)]
    second = [*first, MeasuredPoint(StepPoint(scheme="W8A16"), 52.0)]
    assert width([]) > width(first) > width(second) > 1.0


def test_terms_add_up() -> None:
    predictor = Predictor(get_hardware("h100-sxm"), outline_of(read_inventory("qwen2.5-7b")))
    for point in (StepPoint(scheme="W4A16", batch=8, context=1024), StepPoint("prefill", "FP8", context=512)):
        prediction = predictor.predict(point)
        assert sum(term.milliseconds for term in prediction.terms) == pytest.approx(prediction.milliseconds.value)
        assert prediction.floor_milliseconds < prediction.milliseconds.value


def test_unfused_is_slower_than_bf16() -> None:
    predictor = Predictor(get_hardware("a10g"), outline_of(read_inventory("llama-2-7b")))
    assert predictor.predict(StepPoint(scheme="W4A16", path="unfused")).speedup_over_bf16.value < 1.0


def test_weight_only_does_not_speed_prefill() -> None:
    predictor = Predictor(get_hardware("h100-sxm"), outline_of(read_inventory("llama-3-8b")))
    assert predictor.predict(StepPoint("prefill", "W4A16", batch=4, context=2048)).speedup_over_bf16.value <= 1.0
    assert predictor.predict(StepPoint("prefill", "FP8", batch=4, context=2048)).speedup_over_bf16.value > 1.2


def test_unknown_hardware_names_near_ones() -> None:
    with pytest.raises(UsageError, match="h100-sxm"):
        get_hardware("h100-")


def test_every_device_has_sources_and_no_sparse_rate() -> None:
    for device in HARDWARE.values():
        assert device.sources, device.name
    assert get_hardware("h100-sxm").dense_tflop_s == {"bf16": 989.0, "int8": 1979.0, "fp8": 1979.0}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[x\n", "not TOML"),
        ("[x]\nlabel='x'\n", "lacks"),
        ("[x]\nlabel='x'\nkind='toaster'\nmemory_gib=1\nbandwidth=1\ndense={bf16=1}\nsources=['s']", "unknown kind"),
        ("[x]\nlabel='x'\nkind='cpu'\nmemory_gib=1\nbandwidth=-1\ndense={bf16=1}\nsources=['s']", "bandwidth is -1"),
        ("[x]\nlabel='x'\nkind='cpu'\nmemory_gib=1\nbandwidth=1\ndense={bf16=1}\nsources=['s']\nwings=2", "unknown fields"),
    ],
)
def test_a_wrong_hardware_file_says_where(text: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        read_hardware(text, "mine.toml")
