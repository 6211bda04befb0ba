"""Decisions follow from bytes, rates, paths and losses: the rules that practice knows come out, and nothing is chosen that cannot be."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from rich.console import Console

from fewbit.decide.candidates import situation_of
from fewbit.decide.choose import decide_cell
from fewbit.decide.decision import Cell, DecideResults
from fewbit.decide.workload import Workload, get_workload, workload_names
from fewbit.errors import UsageError
from fewbit.models.inventory_sources import read_inventory
from fewbit.predict.efficiency import Factors, Prior
from fewbit.predict.hardware import get_hardware
from fewbit.predict.prediction import MeasuredPoint, StepPoint
from fewbit.predict.predictor import Predictor
from fewbit.report.decide_table import decide_csv, render_decide
from fewbit.workflows.decide import decide_deployment, parse_prices

EDGE_16 = Workload("edge", 16, 1024, 128, "latency")


@cache
def _cell(model: str, hardware: str, workload: str | Workload = "chat", perplexity: str | None = None) -> Cell:
    return decide_deployment([model], [hardware], workload=workload, perplexity=perplexity).cells[0]


def _speedup(cell: Cell, name: str) -> float:
    time = next(one for one in cell.candidates if one.name == name).time
    assert time is not None
    return time.speedup_over_bf16.value


# --------------------------------------------------------------------------------------------------- rules from the physics


def test_jetson_with_7b_at_batch_16_wants_w4_with_an_8_bit_cache() -> None:
    cell = _cell("qwen2.5-7b", "agx-orin-64gb", EDGE_16)
    assert (cell.verdict, cell.choice) == ("quantize", "W4A16 + KV-INT8")
    assert _speedup(cell, "W4A16 + KV-INT8") > 1.05 * _speedup(cell, "W4A16") > 1.5
    assert "bandwidth-bound" in cell.reason


def test_jetson_with_a_7b_whose_cache_is_four_times_as_large() -> None:
    # keys and values of all 32 heads are more bytes than the weights: W8A8, which loses less, is not far behind until something is measured
    guess = _cell("llama-2-7b", "agx-orin-64gb", EDGE_16)
    assert guess.choice == "W4A16 + KV-INT8" and set(guess.between) <= {"W4A16 + KV-INT8", "W8A8 + KV-INT8"}
    points = ["bf16 decode 90 ms", "W8A16 decode 50.4 ms", "W4A16 decode 30.6 ms"]
    cell = decide_deployment(["llama-2-7b"], ["agx-orin-64gb"], workload=EDGE_16, measured=points).cells[0]
    assert (cell.verdict, cell.choice) == ("quantize", "W4A16 + KV-INT8")
    assert "bandwidth-bound" in cell.reason


def test_h100_prefill_heavy_wants_fp8_and_w4_does_not_speed_prefill() -> None:
    cell = _cell("llama-3-8b", "h100-sxm", "prefill-heavy")
    assert cell.chosen is not None and cell.chosen.weights == "FP8" and cell.chosen.path == "native"
    assert cell.binding == "compute"
    times = {one.name: one.time for one in cell.candidates}
    fp8, w4, bf16 = (times[name] for name in ("FP8", "W4A16", "BF16"))
    assert fp8 is not None and w4 is not None and bf16 is not None
    assert fp8.ttft_ms.value < bf16.ttft_ms.value <= w4.ttft_ms.value


def test_a100_wants_w8a8_for_throughput_and_w4_for_one_stream() -> None:
    many, one = _cell("llama-3-8b", "a100-80gb", "batch"), _cell("llama-3-8b", "a100-80gb", "single-stream")
    assert many.chosen is not None and many.chosen.weights == "W8A8"
    assert "smooth" in many.chosen.command
    assert one.chosen is not None and one.chosen.weights == "W4A16"
    assert next(c for c in many.candidates if c.name == "FP8").path == "fused"  # Ampere multiplies no FP8


def test_small_model_on_a_large_gpu_is_overhead_bound_and_stays_as_it_is() -> None:
    cell = _cell("qwen2.5-0.5b", "h100-sxm", "single-stream")
    assert (cell.verdict, cell.choice, cell.binding) == ("do not quantize", "BF16", "overhead")
    assert "launches" in cell.reason


def test_w4_loses_to_fp8_and_bf16_at_high_batch() -> None:
    # NVIDIA's Model Optimizer, H200, TensorRT-LLM 0.15, Llama-3.1-8B, 2,048 + 128 tokens: FP8 1.41, 1.31, 1.30x and INT4-AWQ 1.33, 0.75,
    # 0.83x of BF16 at batch 1, 8, 64 (benchmarks/measurements/batched.csv)
    published = {1: (1.41, 1.33), 8: (1.31, 0.75), 64: (1.30, 0.83)}
    for batch, wanted in published.items():
        workload = Workload("published", batch, 2048, 128, "throughput")
        cell = decide_deployment(["llama-3-8b"], ["h200"], workload=workload, runtime="tensorrt-llm").cells[0]
        times = {one.name: one.time for one in cell.candidates}
        for name, speedup in zip(("FP8", "W4A16"), wanted, strict=True):
            time = times[name]
            assert time is not None and time.speedup_over_bf16.low < speedup < time.speedup_over_bf16.high, (batch, name)
        if batch > 1:
            assert _speedup(cell, "W4A16") < 1.0 < 1.15 < _speedup(cell, "FP8")
            assert cell.chosen is not None and cell.chosen.weights == "FP8"
    # kernels that unpack faster move the batch where it stops paying, and no more
    assert _speedup(_cell("llama-3-8b", "h200", Workload("published", 8, 2048, 128, "throughput")), "W4A16") < 1.2
    busy = _cell("llama-3-8b", "h200", "batch")
    assert _speedup(busy, "W4A16") < 1.0 < _speedup(busy, "FP8")


def test_one_runtime_alone() -> None:
    cell = decide_deployment(["llama-3-8b"], ["h200"], runtime="TensorRT-LLM").cells[0]
    assert {one.runtime for one in cell.candidates if one.time is not None} == {"TensorRT-LLM"}
    int2 = next(one for one in cell.candidates if one.name == "W2A16")
    assert int2.time is None and int2.reason == "TensorRT-LLM is not known to run W2A16 on this device"
    with pytest.raises(UsageError, match="runtime 'mlx' on H200"):
        decide_deployment(["llama-3-8b"], ["h200"], runtime="mlx")


def test_w4_gains_least_where_batches_are_large() -> None:
    gains = [_speedup(_cell("llama-3-8b", "a100-80gb", Workload("x", batch, 512, 256, "latency")), "W4A16") for batch in (1, 16, 256)]
    assert gains == sorted(gains, reverse=True) and gains[0] > 1.5


def test_hopper_has_no_4_bit_matrix_units_and_blackwell_has() -> None:
    def fp4(hardware: str) -> tuple[str, str]:
        one = next(c for c in _cell("llama-3-8b", hardware, "batch").candidates if c.name == "NVFP4")
        return one.runtime, one.reason

    assert "no 4-bit matrix units" in fp4("h100-sxm")[1]
    assert fp4("b200")[0] and "probability" in fp4("b200")[1]


# ------------------------------------------------------------------------------------------------------ memory and limits


def test_what_does_not_fit_is_never_chosen() -> None:
    cell = _cell("llama-3-70b", "h100-sxm", "batch")
    assert cell.binding == "memory" and cell.chosen is not None and cell.chosen.memory.fits
    assert "if it fitted" in cell.reason
    assert all(one.memory.fits for one in cell.candidates if one.acceptable)
    assert {one.reason for one in cell.candidates if one.name == "BF16"} == {"does not fit: needs 197 GB of 85.9 GB"}


def test_not_feasible_says_by_how_much() -> None:
    cell = _cell("llama-3-70b", "jetson-orin-nano-8gb", "edge")
    assert (cell.verdict, cell.choice, cell.next_measurement) == ("not feasible", None, None)
    assert "Nothing fits" in cell.reason and "of 8.59 GB" in cell.reason


def test_a_limit_below_the_bandwidth_floor_is_not_feasible() -> None:
    results = decide_deployment(["llama-3-8b"], ["l4"], workload="single-stream", max_ms_per_token=1.0)
    cell = results.cells[0]
    assert (cell.verdict, cell.binding) == ("not feasible", "latency")
    assert "even at the data sheet's full rates" in cell.reason


def test_a_limit_of_latency_decides() -> None:
    free = _cell("llama-3-8b", "l4", "single-stream")
    strict = decide_deployment(["llama-3-8b"], ["l4"], workload="single-stream", max_ms_per_token=50.0, max_quality_loss=20).cells[0]
    assert strict.binding == "latency" and strict.chosen is not None and strict.chosen.weights == "W4A16"
    bf16 = next(one for one in strict.candidates if one.name == "BF16")
    assert not bf16.acceptable and "break the limit: time per token" in bf16.reason
    assert free.binding != "latency"


# ---------------------------------------------------------------------------------------------------------------- quality


def test_measured_perplexities_fail_nf4_and_pass_int8() -> None:
    cell = _cell("7e9", "agx-orin-64gb", "single-stream", "bf16=10.0,int8=10.063,nf4=10.80")
    found = {one.name: one for one in cell.candidates}
    nf4, int8 = found["NF4"], found["W8A16"]
    assert nf4.quality.verdict == "fail" and not nf4.acceptable
    assert nf4.reason == "fails in quality: +8.00 % perplexity, measured, allowed 5 %"
    assert int8.quality.verdict == "pass" and int8.acceptable
    assert int8.quality.loss_percent.value == pytest.approx(0.63) and int8.quality.measured


def test_a_faster_format_of_unknown_quality_is_what_to_measure_next() -> None:
    cell = _cell("llama-3-8b", "b200", "batch")
    assert cell.next_measurement is not None
    assert cell.next_measurement.kind == "quality" and "NVFP4" in cell.next_measurement.what
    assert "fewbit compare meta-llama/Meta-Llama-3-8B" in cell.next_measurement.command
    settled = _cell("llama-3-8b", "b200", "batch", "bf16=6.1,nvfp4=6.2,kv-fp8=6.11,mxfp4=6.9,fp8=6.12")
    assert settled.chosen is not None and settled.chosen.weights == "NVFP4"


def test_last_resorts_are_not_taken_while_something_else_passes() -> None:
    for hardware in ("rtx-4090", "h100-sxm"):
        chosen = _cell("llama-2-7b", hardware).chosen
        assert chosen is not None and chosen.weights != "W2A16" and chosen.kv_cache != "KV-INT4", hardware


# ------------------------------------------------------------------------------------------------------------- uncertainty


def test_it_abstains_when_intervals_overlap_and_a_measurement_settles_it() -> None:
    workload, device = Workload("x", 8, 512, 256, "throughput"), get_hardware("m2-max")
    inventory = read_inventory("llama-3-8b")
    spread = np.array([0.2, 0.6, 0.06, 0.12, 0.3, 0.3, 0.15, 0.5, 0.2])  # what a class of devices is known by, before anything is measured
    prior = Prior(Factors(0.8, 4.0, 0.95, 0.85, 0.6, 0.5, 0.8, 0.35, 0.7), spread, 0.03, "for this test")

    def cell_with(points: list[MeasuredPoint]) -> Cell:
        situation = situation_of(inventory, "llama-3-8b", device, workload)
        return decide_cell(dataclasses.replace(situation, predictor=Predictor(device, situation.outline, points, prior=prior)))

    cell = cell_with([])
    assert cell.verdict == "abstain" and len(cell.between) >= 2
    assert cell.choice == cell.between[0] and "contains 1" in cell.reason
    assert cell.next_measurement is not None and cell.next_measurement.kind == "time"
    assert {one.name for one in cell.candidates if one.status == "undecided"} == set(cell.between[1:])

    def step_ms(name: str) -> float:
        time = next(one for one in cell.candidates if one.name == name).time
        assert time is not None
        return time.ms_per_token.value

    points = [
        MeasuredPoint(StepPoint("decode", name, "BF16", 8, workload.mean_context), factor * step_ms(name))
        for name, factor in (("W8A16", 1.15), ("W4A16", 0.8))
    ]
    settled = cell_with(points)
    assert settled.verdict == "quantize" and settled.chosen is not None and settled.chosen.weights == "W4A16"


def test_a_time_that_cannot_be_is_not_used() -> None:
    results = decide_deployment(["llama-2-7b"], ["agx-orin-64gb"], measured=["bf16 decode 9.4 ms"])
    assert results.cells[0].calibrated_from == 0
    assert "impossible" in results.warnings[0] and "not used" in results.warnings[0]


def test_measured_times_narrow_the_intervals() -> None:
    point = MeasuredPoint(StepPoint(batch=1, context=576), 95.0)
    before = _cell("llama-2-7b", "agx-orin-64gb", "single-stream")
    after = decide_deployment(["llama-2-7b"], ["agx-orin-64gb"], workload="single-stream", measured=[point]).cells[0]

    def width(cell: Cell) -> float:
        time = next(one for one in cell.candidates if one.name == "W4A16").time
        assert time is not None
        return time.ms_per_token.high / time.ms_per_token.low

    assert width(after) < width(before)
    assert after.calibrated_from == 1 and not any("nothing was measured" in note for note in after.notes)


# ------------------------------------------------------------------------------------------------------------ every cell


@pytest.mark.parametrize("name", ["edge", "long-context"])
def test_every_candidate_has_its_reason_and_the_front_is_not_beaten(name: str) -> None:
    for hardware in ("h100-sxm", "m2-max"):
        cell = _cell("qwen2.5-1.5b", hardware, name)
        assert all(one.reason for one in cell.candidates)
        assert [one.status for one in cell.candidates].count("chosen") == (cell.choice is not None)
        running = {one.name: one for one in cell.candidates if one.time is not None and one.memory.fits}
        assert set(cell.pareto) <= set(running)
        for front in cell.pareto:
            mine = running[front]
            for other in running.values():
                assert mine.time is not None and other.time is not None
                assert not (
                    other.time.objective_ms.value < mine.time.objective_ms.value
                    and other.memory.total_bytes < mine.memory.total_bytes
                    and other.quality.loss_percent.value < mine.quality.loss_percent.value
                )
        if cell.choice is not None and cell.verdict != "do not quantize":
            assert cell.choice in cell.pareto


def test_cost_follows_from_price_and_throughput() -> None:
    results = decide_deployment(["llama-3-8b"], ["h100-sxm", "a100"], prices=parse_prices(["h100=3", "1.5"]))
    for cell, price in zip(results.cells, (3.0, 1.5), strict=True):
        chosen = cell.chosen
        assert chosen is not None and chosen.time is not None and cell.price_per_hour == price
        assert chosen.time.cost_per_million_tokens == pytest.approx(price / 3600 * 1e6 / chosen.time.tokens_per_s.value)


def test_json_csv_and_tables() -> None:
    results = decide_deployment(["qwen2.5-7b"], ["agx-orin-64gb", "rtx-4090"], workload="edge")
    adapter = TypeAdapter(DecideResults)
    assert adapter.validate_json(adapter.dump_json(results)) == results
    assert json.loads(adapter.dump_json(results))["schema_version"] == 1
    rows = list(csv.DictReader(io.StringIO(decide_csv(results))))
    assert len(rows) == sum(len(cell.candidates) for cell in results.cells)
    assert {row["status"] for row in rows} >= {"chosen", "rejected"}
    console = Console(file=io.StringIO(), width=200, record=True)
    render_decide(results, console, verbose=True)
    text = console.export_text()
    for cell in results.cells:
        assert cell.label in text and cell.choice is not None and cell.choice in text
    assert "Measure next" in text and "fewbit quantize Qwen/Qwen2.5-7B" in text


# ------------------------------------------------------------------------------------------------------------------ input


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"models": []}, "needs a model"),
        ({"hardware": ["h100", "toaster"]}, "unknown hardware 'toaster'"),
        ({"workload": "lunch"}, "unknown workload 'lunch'"),
        ({"batch": 0}, "cannot be meant"),
        ({"max_ms_per_token": -1.0}, "time per token"),
        ({"max_quality_loss": float("nan")}, "quality loss"),
        ({"perplexity": "int8=10"}, "without BF16"),
        ({"perplexity": "bf16=10,int8=0.2"}, "no perplexity"),
        ({"perplexity": "bf16=10,int9=11"}, "unknown scheme"),
        ({"perplexity": "bf16=10,int8=11,w8a16=12"}, "two perplexities"),
        ({"hardware": ["h100", "a100"], "measured": [MeasuredPoint(StepPoint(), 9.0)]}, "one model on one device"),
        ({"layers": 4}, "follow from the model"),
    ],
)
def test_wrong_input_says_what(options: dict[str, object], wrong: str) -> None:
    arguments: dict[str, object] = {"models": ["qwen2.5-7b"], "hardware": ["h100-sxm"], **options}
    with pytest.raises(UsageError, match=wrong):
        decide_deployment(**arguments)  # type: ignore[arg-type]


def test_workloads_of_a_file(tmp_path: Path) -> None:
    assert all(get_workload(name).batch >= 1 for name in workload_names())
    file = tmp_path / "mine.toml"
    file.write_text("batch = 3\nprompt = 100\nnew_tokens = 20\ngoal = 'latency'\nmax_ttft_ms = 500\nmax_quality_loss = 2\n")
    mine = get_workload(file)
    assert (mine.name, mine.batch, mine.limits.max_ttft_ms, mine.limits.max_quality_loss_percent) == ("mine", 3, 500.0, 2.0)
    for text, wrong in (("batch = 3\n", "prompt"), ("batch = 3\nprompt = 1\nnew_tokens = 1\nwings = 2\n", "wings"), ("batch = [", "TOML")):
        file.write_text(text)
        with pytest.raises(UsageError, match=wrong):
            get_workload(file)


@pytest.mark.parametrize("text", ["x", "h100=x", "-1"])
def test_wrong_prices(text: str) -> None:
    with pytest.raises(UsageError, match="price"):
        parse_prices([text])
