"""Rates are positive, of the kernels that were asked for, and survive JSON; how large they are is the machine's business."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from fewbit.bench import engine_rates
from fewbit.bench.kernel_rates import MEASURED_KERNELS, RatePlan, measure_kernel_rates
from fewbit.kernels.cpu.extension import missing_native
from fewbit.results import EngineRates

SMALL = RatePlan((1, 8, 64), (128, 256), 1 << 17, 256, cache_share=0.0, rounds=2, budget_s=0.0)
needs_native = pytest.mark.skipif(missing_native() is not None, reason=str(missing_native()))


@needs_native
def test_rates_of_the_machine() -> None:
    said: list[tuple[int, int, str]] = []
    rates = engine_rates.measure_engine_rates(quick=True, kernels=MEASURED_KERNELS[:3], progress=lambda *now: said.append(now))
    assert rates is not None
    found = [(rate.scheme, rate.kernel, rate.columns) for rate in rates.kernels]
    kernels = [("BF16", "dense"), ("W8A16", "cpu-int8-exact"), ("W4A16", "cpu-int4-exact")]
    assert found == [(*kernel, columns) for kernel in kernels for columns in (128, 256)]
    assert all(ps > 0 for rate in rates.kernels for ps in rate.ps_per_weight)
    assert {(rate.phase, rate.cache, rate.group) for rate in rates.attention} == {
        *((phase, "BF16", group) for phase in ("decode", "prefill") for group in (1, 4)),
        *(("decode", cache, 1) for cache in ("KV-INT8", "KV-FP8", "KV-INT4")),
    }
    assert all(rate.ns > 0 for rate in rates.attention if rate.phase == "prefill")
    assert rates.operator_us >= 0
    assert rates.ns_per_activation >= 0
    assert said[0] == (0, 5, "bandwidth")
    assert [done for done, _, _ in said] == [0, 1, 4]
    adapter = TypeAdapter(EngineRates)
    assert adapter.validate_json(adapter.dump_json(rates)) == rates


@needs_native
@pytest.mark.parametrize(
    ("scheme", "compute", "kernel", "bits"),
    [
        ("BF16", "exact", "dense", 16.0),
        ("W4A16", "int8-activations", "cpu-int4", 4.125),
        ("W8A8", "exact", "cpu-w8a8", 8.0),
        ("NVFP4", "exact", "cpu-fp4-exact", 4.5),
    ],
)
def test_the_kernel_is_the_one_that_the_dispatcher_selects(scheme: str, compute: str, kernel: str, bits: float) -> None:
    rates = measure_kernel_rates([(scheme, compute)], SMALL)  # type: ignore[list-item]
    assert [rate.columns for rate in rates] == [128, 256]
    for rate in rates:
        assert rate.kernel == kernel
        assert rate.bits == pytest.approx(bits, rel=0.15)
        assert rate.tokens == [1, 8, 64]
        assert all(ps > 0 for ps in rate.ps_per_weight)


@needs_native
def test_what_has_no_native_kernel_is_left_out() -> None:
    assert measure_kernel_rates([("LLM-INT8", "exact")], SMALL) == []


def test_without_the_native_extension_there_are_no_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_rates, "missing_native", lambda: "no compiler")
    assert engine_rates.measure_engine_rates(quick=True) is None
