"""Measured rates replace the data sheet: times follow them between and beyond what was measured, and calibration moves what has changed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fewbit.models.inventory_sources import read_inventory
from fewbit.predict.hardware import Hardware, measured_hardware
from fewbit.predict.outline import outline_of
from fewbit.predict.plausible import examine
from fewbit.predict.prediction import MeasuredPoint, StepPoint
from fewbit.predict.predictor import Predictor
from fewbit.predict.rates import Rates
from fewbit.results import AttentionRate, EngineRates, KernelRate, MachineResult

BANDWIDTH = 40.0
MEMORY_PS = {"BF16": 16 / 8 * 1e3 / BANDWIDTH, "W8A16": 8 / 8 * 1e3 / BANDWIDTH, "W4A16": 4.125 / 8 * 1e3 / BANDWIDTH}


def kernel(scheme: str, bits: float, memory_ps: float, row_ps: float, compute: str = "exact") -> KernelRate:
    tokens = [1, 8, 64]
    return KernelRate(scheme, compute, f"cpu-{scheme}", bits, 1024, tokens, [max(memory_ps, row_ps * m) for m in tokens])


RATES = EngineRates(
    read_bandwidth_gb_s=BANDWIDTH,
    threads=2,
    kernels=[
        kernel("BF16", 16.0, MEMORY_PS["BF16"], 20.0),
        kernel("W8A16", 8.0, MEMORY_PS["W8A16"], 12.0),
        kernel("W4A16", 4.125, MEMORY_PS["W4A16"], 14.0),
        kernel("W4A16", 4.125, MEMORY_PS["W4A16"], 4.0, "int8-activations"),
        kernel("W8A8", 8.0, MEMORY_PS["W8A16"], 4.0),
    ],
    attention=[
        AttentionRate("decode", "BF16", 64, 1, 40.0),
        AttentionRate("decode", "BF16", 64, 8, 110.0),
        AttentionRate("decode", "BF16", 128, 1, 80.0),
        AttentionRate("decode", "BF16", 128, 8, 220.0),
        AttentionRate("decode", "KV-INT8", 64, 1, 55.0),
        AttentionRate("decode", "KV-INT8", 128, 1, 110.0),
        AttentionRate("prefill", "BF16", 64, 1, 30.0),
        AttentionRate("prefill", "BF16", 64, 8, 90.0),
    ],
    operator_us=1.5,
    ns_per_activation=0.5,
)
MACHINE = MachineResult(BANDWIDTH, "test", 60.0, "bfloat16", 1.0, RATES)
MODEL = "qwen2.5-0.5b"


def hardware(compute: str = "exact", machine: MachineResult = MACHINE) -> Hardware:
    return measured_hardware(machine, 24 << 30, compute=compute)


def predictor(compute: str = "exact", *points: MeasuredPoint) -> Predictor:
    return Predictor(hardware(compute), outline_of(read_inventory(MODEL)), points)


def test_a_decode_step_is_the_sum_of_the_rates() -> None:
    ours = predictor()
    terms = {term.name: term.milliseconds for term in ours.predict(StepPoint(scheme="W4A16", batch=8, context=1023)).terms}
    rows = 8 * 1024 * 24 * 2  # tokens x layers x key heads
    group_7 = 40.0 + (110.0 - 40.0) * 6 / 7
    assert terms["attention"] == pytest.approx(rows * group_7 / 1e6 + 24 * 1.5e-3)
    head = 151936 * 896
    between = 8 * (151936 + 896) * 0.5e-6
    assert terms["lm_head"] == pytest.approx(head * 160.0 / 1e9 + between + 1.5e-3, rel=1e-6)  # 8 rows x 20 ps
    gate = 24 * 4864 * 896
    assert terms["gate_proj"] == pytest.approx(gate * 112.0 / 1e9 + 24 * 8 * (4864 + 896) * 0.5e-6 + 24 * 1.5e-3, rel=1e-6)


def test_memory_limits_one_token_and_arithmetic_many() -> None:
    ours = predictor()
    assert ours.time(StepPoint(context=1)).bound == "bandwidth"
    assert ours.time(StepPoint(batch=32, context=1)).bound == "compute"
    one, many = (ours.predict(StepPoint(scheme="W4A16", batch=batch, context=1)).speedup_over_bf16.value for batch in (1, 64))
    assert one > 1.5 > many  # the head stays in 16 bit


def test_int8_inputs_are_another_kernel() -> None:
    point = StepPoint(scheme="W4A16", batch=32, context=128)
    exact, dots = predictor().predict(point), predictor("int8-activations").predict(point)
    assert dots.milliseconds.value < 0.8 * exact.milliseconds.value
    eight = StepPoint(scheme="W8A16", batch=32, context=128)  # only exact products were measured of it
    assert predictor().predict(eight).milliseconds == predictor("int8-activations").predict(eight).milliseconds
    assert predictor().predict(StepPoint(scheme="W8A8", batch=32, context=128)).path == "native"


def test_rates_are_interpolated_in_the_logarithms_and_grow_beyond_the_last() -> None:
    rates = Rates(RATES)
    rate = rates.kernel("W4A16")

    def whole(tokens: float) -> float:
        return math.hypot(*rates.split(rate, tokens, 1024))

    assert whole(1) == pytest.approx(14.0)
    assert whole(8 * 8**0.5) == pytest.approx((112 * 896) ** 0.5)
    assert whole(640) == pytest.approx(8960.0)
    assert rates.peak_tera(rate) == pytest.approx(2 / 14)


def test_columns_weigh_in_by_what_is_done_once_per_result() -> None:
    wide = [replace(rate, columns=4096, ps_per_weight=[ps / 2 for ps in rate.ps_per_weight]) for rate in RATES.kernels]
    rates = Rates(replace(RATES, kernels=[*RATES.kernels, *wide]))
    rate = rates.kernel("BF16")

    def whole(columns: int) -> float:
        return math.hypot(*rates.split(rate, 8, columns))

    assert [one.columns for one in rate] == [1024, 4096]
    assert whole(1024) == pytest.approx(160.0)
    assert whole(4096) == pytest.approx(80.0)
    assert whole(2048) == pytest.approx(80.0 + 80.0 / 3)
    assert whole(512) == pytest.approx(160.0 + 80.0 * 4 / 3)
    assert whole(10**9) == pytest.approx(0.8 * 80.0)  # never far below what was seen


def test_attention_between_heads_and_dimensions() -> None:
    rates = Rates(RATES)
    assert rates.attention_ns("decode", "BF16", 64, 8) == pytest.approx(110.0)
    assert rates.attention_ns("decode", "BF16", 96, 8) == pytest.approx(165.0)
    assert rates.attention_ns("decode", "BF16", 64, 15) == pytest.approx(180.0)
    assert rates.attention_ns("decode", "KV-INT8", 64, 8) == pytest.approx(125.0)
    assert rates.attention_ns("prefill", "BF16", 64, 1) == pytest.approx(30.0)
    assert Rates(replace(RATES, attention=[])).attention_ns("decode", "BF16", 64, 1) is None


def test_a_format_nobody_measured_falls_back_to_its_bytes() -> None:
    rates = Rates(RATES)
    assert rates.kernel("W2A16") == ()
    assert [rate.scheme for rate in rates.kernel("W4A16-G32")] == ["W4A16"]
    few, more = (predictor().predict(StepPoint(scheme=scheme, context=1)).milliseconds.value for scheme in ("W2A16", "W8A16"))
    assert 0 < few < more


def test_one_slower_point_slows_what_memory_limits_and_not_the_rest() -> None:
    plain = predictor()
    anchor = StepPoint(context=128)
    slower = predictor("exact", MeasuredPoint(anchor, 1.3 * plain.predict(anchor).milliseconds.value))

    def ratio(point: StepPoint) -> float:
        return slower.predict(point).milliseconds.value / plain.predict(point).milliseconds.value

    assert ratio(anchor) > 1.2
    assert ratio(StepPoint(scheme="W4A16", context=128)) > 1.15
    assert ratio(StepPoint(batch=32, context=4096)) < 1.1


def test_a_time_that_the_kernels_reach_is_not_called_impossible() -> None:
    point = StepPoint("prefill", context=512)
    outline = outline_of(read_inventory(MODEL))
    fast = 1.05 * predictor().predict(point).milliseconds.value
    assert examine(hardware(), outline, MeasuredPoint(point, fast)).used
    assert not examine(hardware(), outline, MeasuredPoint(point, fast / 4)).used


def test_without_rates_the_machine_is_a_data_sheet() -> None:
    plain = hardware(machine=replace(MACHINE, rates=None))
    assert plain.rates is None
    assert plain.dense_tflop_s == {"bf16": 0.06}
    assert hardware().dense_tflop_s == {"bf16": pytest.approx(0.1), "int8": pytest.approx(0.5)}
