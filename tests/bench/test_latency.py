"""Latency of a tiny model: what is counted, scaled and named; never how long it took."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fewbit.bench.latency import LatencySettings, measure_latency, plan_blocks, symmetric_interval
from fewbit.bench.machine import MachineResult
from fewbit.bench.operators import measure_operators, operator_clocks
from fewbit.bench.overhead import emptied, linears
from fewbit.bench.scaling import LayerScale, StackClock
from fewbit.bench.steps import StepRunner
from fewbit.bench.traffic import step_cost
from fewbit.checkpoints.sources import DirectorySource
from fewbit.errors import MeasurementError
from fewbit.formats.spec import get_scheme
from fewbit.kernels.cpu.extension import missing_native
from fewbit.results import LatencyResult
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.load import LoadedModel, load_model

MACHINE = MachineResult(
    read_bandwidth_gb_s=20.0, bandwidth_method="made up", gemm_gflop_s=100.0, gemm_dtype="bfloat16", time_per_null_op_us=1.0
)
SETTINGS = LatencySettings(
    prompt_tokens=16, context_tokens=24, decode_steps=12, budget_s=0.5, prefill_repetitions=2, generate_prompt_tokens=8
)
WHOLE = LayerScale(2, 2)
HIDDEN, MLP, VOCABULARY, LAYERS, KV = 128, 256, 512, 2, 64
STACK_WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * MLP)


@pytest.fixture(scope="module")
def bf16(tiny_llama_dir: Path) -> LoadedModel:
    return load_model(DirectorySource(tiny_llama_dir), QuantizationConfig(get_scheme("BF16")))


@pytest.fixture(scope="module")
def int4(tiny_llama_dir: Path) -> LoadedModel:
    return load_model(DirectorySource(tiny_llama_dir), QuantizationConfig(get_scheme("W4A16"), kernel="unfused"))


def hooks_of(loaded: LoadedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())


def runner_of(loaded: LoadedModel, scale: LayerScale = WHOLE) -> StepRunner:
    return StepRunner.start(loaded, prompt_tokens=16, context_tokens=24, scale=scale, seed=0, runtime="transformers")


def test_a_variant(bf16: LoadedModel, int4: LoadedModel) -> None:
    before = hooks_of(int4), hooks_of(bf16)
    result = measure_latency(bf16, int4, MACHINE, settings=SETTINGS)
    assert (hooks_of(int4), hooks_of(bf16)) == before
    assert 6 <= result.decode_n <= 24
    assert result.decode_ms_p50 <= result.decode_ms_p95
    assert result.decode_ms_p99 is None  # fewer than 100 steps
    assert result.speedup_over_bf16.low <= result.speedup_over_bf16.value <= result.speedup_over_bf16.high
    assert not result.scaled
    assert result.counters is None
    assert result.achieved_weight_gb_s == pytest.approx(result.weight_bytes_per_step / result.decode_ms_p50 / 1e6)
    assert result.read_bandwidth_gb_s is not None and result.read_bandwidth_gb_s > 0
    assert result.bandwidth_share == pytest.approx(result.traffic_gb_s / result.read_bandwidth_gb_s)
    assert result.traffic_bytes_per_step > result.weight_bytes_per_step
    adapter = TypeAdapter(LatencyResult)
    assert adapter.validate_json(adapter.dump_json(result)) == result


def test_the_baseline_against_itself_is_1_with_its_noise(bf16: LoadedModel) -> None:
    result = measure_latency(bf16, bf16, MACHINE, settings=dataclasses.replace(SETTINGS, counters=True))
    assert result.speedup_over_bf16.value == 1.0
    assert result.speedup_over_bf16.low <= 1.0 <= result.speedup_over_bf16.high
    assert result.speedup_over_bf16.low < result.speedup_over_bf16.high
    assert result.prefill_speedup_over_bf16 == 1.0
    assert result.counters is not None


def test_a_kv_variant_shares_the_model(bf16: LoadedModel) -> None:
    variant = dataclasses.replace(bf16, scheme=get_scheme("KV-INT8"))
    result = measure_latency(bf16, variant, MACHINE, settings=SETTINGS, runtime="transformers")
    assert result.runtime == "transformers" and result.runtime_reason
    plain = step_cost(bf16, WHOLE, tokens=1, context=24)
    assert result.weight_bytes_per_step == plain.weight_bytes
    assert result.traffic_bytes_per_step > plain.traffic_bytes  # less is stored, but a dequantized copy is written and read
    direct = step_cost(variant, WHOLE, tokens=1, context=24, cache_copies=False)
    assert direct.traffic_bytes < plain.traffic_bytes  # the engine reads what is stored


@pytest.mark.skipif(missing_native() is not None, reason=str(missing_native()))
def test_the_engine_is_measured_by_its_own_clock(bf16: LoadedModel) -> None:
    result = measure_latency(bf16, bf16, MACHINE, settings=SETTINGS, scale=LayerScale(2, 20), runtime="engine")
    assert (result.runtime, result.runtime_reason, result.scaled) == ("engine", "", True)
    assert 0 < result.overhead_share < 1
    classes = result.operators
    assert min(classes.ffn_projections_ms, classes.attention_projections_ms, classes.attention_ms, classes.lm_head_ms) > 0


def test_bytes_and_operations(bf16: LoadedModel, int4: LoadedModel) -> None:
    cost = step_cost(bf16, WHOLE, tokens=1, context=0)
    head = HIDDEN * VOCABULARY
    assert cost.weight_bytes == 2 * (STACK_WEIGHTS + head)  # the tied head is read, the embedding's other rows are not
    attention = 4 * LAYERS * HIDDEN
    assert cost.operations == 2 * (STACK_WEIGHTS + head) + attention
    assert step_cost(bf16, WHOLE, tokens=10, context=0).operations == 20 * STACK_WEIGHTS + 2 * head + attention * 55
    four = step_cost(int4, WHOLE, tokens=1, context=0)
    assert four.weight_bytes == STACK_WEIGHTS // 2 + STACK_WEIGHTS // 128 * 2 + 2 * head
    assert four.operations == cost.operations


def test_scaling_multiplies_the_stack_only(bf16: LoadedModel) -> None:
    whole, scaled = (step_cost(bf16, LayerScale(2, layers), tokens=1, context=0) for layers in (2, 20))
    assert scaled.weight_bytes - whole.weight_bytes == 9 * 2 * STACK_WEIGHTS
    result = measure_latency(bf16, bf16, MACHINE, settings=SETTINGS, scale=LayerScale(2, 20))
    assert result.scaled
    assert result.weight_bytes_per_step == scaled.weight_bytes


def test_scaled_times_come_from_each_step(bf16: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepRunner, "_timed_decode", lambda self: 10.0)
    runner = runner_of(bf16, LayerScale(2, 8))
    monkeypatch.setattr(StackClock, "stack_ms", 4.0, raising=False)
    monkeypatch.setattr(StackClock, "__init__", lambda self, model, device: setattr(self, "_handles", []))
    monkeypatch.setattr(StackClock, "__enter__", lambda self: self)
    assert runner.decode_block(3) == [10.0 + 3 * 4.0] * 3


def test_the_cache_does_not_drift(bf16: LoadedModel) -> None:
    for scheme in ("BF16", "KV-INT8", "KV-INT4", "KV-INT4-KIVI"):
        runner = runner_of(dataclasses.replace(bf16, scheme=get_scheme(scheme)))
        for _ in range(3):
            assert len(runner.decode_block(5, settling=1)) == 5
            assert runner.cache.get_seq_length() == 24 + 6, scheme


def test_emptied_linears_read_nothing_and_come_back(bf16: LoadedModel, int4: LoadedModel) -> None:
    ids = torch.arange(8)[None]
    for loaded in (bf16, int4):
        with torch.inference_mode():
            expected = loaded.model(ids).logits
            with emptied(loaded.model):
                assert not loaded.model(ids).logits.any()
            assert torch.equal(loaded.model(ids).logits, expected)
            with pytest.raises(RuntimeError, match="in between"), emptied(loaded.model):
                raise RuntimeError("in between")
            assert torch.equal(loaded.model(ids).logits, expected)
        assert all("forward" not in linear.__dict__ for _, linear in linears(loaded.model))


def test_operator_times_add_up_to_the_step(bf16: LoadedModel) -> None:
    runner = runner_of(bf16)
    steps: list[float] = []

    def step() -> float:
        steps.append(runner.raw_step())
        return steps[-1]

    times = measure_operators(bf16.model, step, steps=4, scale=WHOLE)
    parts = dataclasses.astuple(times)
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(sum(steps[1:]) / 4)  # the first one only warms up
    assert hooks_of(bf16) == 0


def test_operator_classes_are_not_counted_twice(bf16: LoadedModel) -> None:
    with operator_clocks(bf16.model), torch.inference_mode():
        hooked = {name for name, module in bf16.model.named_modules() if module._forward_pre_hooks}
    layer = "model.layers.0"
    assert {name for name in hooked if name.startswith(layer)} == {
        f"{layer}.self_attn",
        *(f"{layer}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(f"{layer}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    }
    assert "lm_head" in hooked


def test_scaled_operator_times_keep_the_head(bf16: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(bf16)
    with monkeypatch.context() as patch:
        ticks = iter(range(1_000_000))
        patch.setattr("time.perf_counter", lambda: float(next(ticks)))  # each reading of the clock is one second: times are counts
        once = measure_operators(bf16.model, runner.raw_step, steps=2, scale=LayerScale(2, 2))
        tenfold = measure_operators(bf16.model, runner.raw_step, steps=2, scale=LayerScale(2, 20))
    assert tenfold.lm_head_ms == pytest.approx(once.lm_head_ms)
    assert tenfold.ffn_projections_ms == pytest.approx(10 * once.ffn_projections_ms)
    assert tenfold.attention_ms == pytest.approx(10 * once.attention_ms)
    assert once.rest_ms < tenfold.rest_ms < 10 * once.rest_ms


def test_a_context_beyond_the_model(bf16: LoadedModel) -> None:
    with pytest.raises(MeasurementError, match="512 positions"):
        measure_latency(bf16, bf16, MACHINE, settings=dataclasses.replace(SETTINGS, context_tokens=500))


@given(
    baseline_ms=st.floats(min_value=0.05, max_value=5000),
    variant_ms=st.floats(min_value=0.05, max_value=20000),
    steps=st.integers(min_value=12, max_value=500),
    budget=st.floats(min_value=0.1, max_value=60),
)
def test_blocks_fit_the_budget(baseline_ms: float, variant_ms: float, steps: int, budget: float) -> None:
    settings = LatencySettings(decode_steps=steps, budget_s=budget)
    plan = plan_blocks(baseline_ms=baseline_ms, variant_ms=variant_ms, settings=settings)
    assert plan.pairs >= 6
    assert plan.steps >= 1
    assert plan.pairs * plan.steps < steps + plan.pairs
    spent = plan.pairs * (plan.steps + plan.settling) * (baseline_ms + variant_ms) / 1e3
    assert spent <= budget or (plan.pairs == 6 and plan.steps == 1)  # six pairs are the least that has an interval


def test_fast_models_reach_p99() -> None:
    plan = plan_blocks(baseline_ms=2.0, variant_ms=3.0, settings=LatencySettings())
    assert plan.pairs * plan.steps >= 100


def test_symmetric_interval() -> None:
    interval = symmetric_interval([0.9, 1.0, 1.05, 1.1, 1.2, 1.25])
    assert interval.value == 1.0
    assert (interval.low, interval.high) == pytest.approx((0.8, 1.25))
