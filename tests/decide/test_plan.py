from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from fewbit.decide.plan import PlanResults, make_plan
from fewbit.decide.serving import cache_option, serving_of
from fewbit.errors import FormatError, UnsupportedModelError, UsageError
from fewbit.formats.spec import QuantSpec, get_scheme
from fewbit.models.inventory_sources import read_inventory
from fewbit.predict.hardware import get_hardware
from fewbit.report.plan_table import plan_csv, render_plan
from fewbit.workflows.plan import plan_model


def test_formats_side_by_side() -> None:
    bare = {one.format: one for one in plan_model("70e9").formats}
    assert [bare[name].nominal_bytes / 1e9 for name in ("FP32", "BF16", "FP8", "INT8", "INT4", "INT2")] == [280, 140, 70, 70, 35, 17.5]
    real = {one.format: one for one in plan_model("llama-3-70b").formats}
    assert round(real["BF16"].effective_bytes or 0, -8) == 141.1e9
    assert round((real["INT4"].effective_bytes or 0) / 1e9, 1) == 39.5


def test_int4_weights_and_int8_cache_of_a_bare_7b() -> None:
    plan = plan_model("7e9", scheme="W4A16", kv="KV-INT8", layers=28, kv_heads=4, head_dim=128, batch=16, context=1024)
    assert 14.9e9 < plan.deployed_bytes_before < 15.0e9
    assert 3.9e9 < plan.deployed_bytes_after < 4.2e9


def test_rows_add_up_to_the_model() -> None:
    inventory = read_inventory("mixtral-8x7b")
    plan = make_plan(inventory, get_scheme("W8A8"), None, get_hardware("a100-80gb"), batch=4, context=2048)
    rows = [row for row in plan.rows if row.target in ("weights", "high precision")]
    assert sum(row.bytes_after for row in rows) == plan.weights_bytes_after == inventory.bytes_in(get_scheme("W8A8").weights)
    assert sum(row.bytes_before for row in rows) == 2 * plan.parameters
    assert {row.target for row in plan.rows} == {"weights", "high precision", "input activations", "KV cache"}
    expert = next(row for row in rows if row.tensors.endswith("experts.*.down_proj.weight"))
    assert (expert.count, expert.shape, expert.scales) == (32 * 8, [4096, 14336], "bfloat16, one per row (axis 0), shape [4096, 1]")
    assert "INT8" in expert.kernel and "INT8" not in expert.fallback and expert.fallback
    assert all(row.risk for row in plan.rows)
    assert plan.kept["router"] == 32 * 8 * 4096


def test_what_fits_is_the_largest_that_fits() -> None:
    from fewbit.decide.memory import memory_need

    inventory, device = read_inventory("qwen2.5-7b"), get_hardware("jetson-orin-nx-16gb")
    plan = make_plan(inventory, get_scheme("W4A16"), get_scheme("KV-INT8"), device, batch=4, context=4096)
    cache = next(one for one in plan.caches if one.format == "KV-INT8")
    assert cache.largest_batch is not None and cache.largest_context is not None
    for change, fits in ((0, True), (1, False)):
        need = memory_need(inventory, get_scheme("W4A16"), get_scheme("KV-INT8"), device, batch=cache.largest_batch + change, context=4096)
        assert need.fits is fits
    assert plan.memory is not None and plan.memory.fits and not plan.memory.fits_before


def test_kernels_follow_the_hardware() -> None:
    def path(scheme: str, device: str) -> str:
        return serving_of(get_scheme(scheme), get_hardware(device)).path

    assert path("FP8", "h100-sxm") == "native" and path("FP8", "a100-80gb") == "fused"
    assert path("W4A16", "h100-sxm") == path("W4A16", "m2-max") == path("W4A16", "mi300x") == "fused"
    assert path("NVFP4", "b200") == "native" and path("NVFP4", "h100-sxm") == "fused"
    assert path("W8A8", "a100-80gb") == "native" and path("W8A8", "m2-max") == "unfused"
    assert path("NF4", "rtx-4090") == "unfused"
    assert (
        cache_option(get_scheme("KV-FP8"), get_hardware("h100-sxm"), "vLLM")[1]
        and not cache_option(get_scheme("KV-FP8"), get_hardware("m2"))[1]
    )


def test_every_device_runs_16_bit_and_some_4_bit_format() -> None:
    from fewbit.predict.hardware import HARDWARE

    for device in HARDWARE.values():
        assert serving_of(get_scheme("BF16"), device).path == "dense", device.name
        assert serving_of(get_scheme("W4A16"), device).path == "fused", device.name


def test_table_json_and_csv_hold_the_same() -> None:
    plan = plan_model("gemma-3-27b", scheme="FP8", kv="KV-FP8", hardware="h100-sxm", batch=2)
    console = Console(file=io.StringIO(), width=200)
    render_plan(plan, console, verbose=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "27,432,406,640" in text and "CUTLASS FP8" in text and "last 1024 tokens" in text
    assert TypeAdapter(PlanResults).validate_json(TypeAdapter(PlanResults).dump_json(plan)) == plan
    assert len(list(csv.reader(io.StringIO(plan_csv(plan))))) == 1 + len(plan.rows)


def test_the_command_needs_no_torch_and_answers_in_two_seconds() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); sys.argv = ['fewbit', 'plan', 'deepseek-v3', '--json']\n"
        "from fewbit.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules; assert time.process_time() < 2"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["parameters"] == 671_026_419_200


def test_cost_is_the_walks_own_estimate() -> None:
    plan = plan_model(None, scheme="W4A16", cost=True, method="rtn")
    assert plan.cost is not None and plan.cost.duration_s is not None and plan.cost.duration_s.low < plan.cost.duration_s.high
    assert plan_model("7e9", cost=True).cost is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "7e9", "hardware": "no-such-device"}, UsageError),
        ({"model": "7e9", "scheme": "W5A16"}, UsageError),
        ({"model": "7e9", "kv": "W4A16"}, UsageError),
        ({"model": "7e9", "batch": 0}, UsageError),
        ({"model": "phi-3-mini", "scheme": "no"}, UsageError),
    ],
)
def test_what_cannot_be_meant(arguments: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        plan_model(**arguments)  # type: ignore[arg-type]


def test_a_group_that_does_not_divide_is_named() -> None:
    inventory = read_inventory("qwen2.5-0.5b")  # 896 and 4,864 columns
    with pytest.raises((FormatError, UnsupportedModelError), match="896"):
        make_plan(inventory, get_scheme("W4A16").__class__("odd", weights=_grouped(768)))


def _grouped(size: int) -> QuantSpec:
    from dataclasses import replace

    weights = get_scheme("W4A16").weights
    assert weights is not None
    return replace(weights, group_size=size)


def test_the_figure_of_a_plan(tmp_path: Path) -> None:
    plan_model("qwen2.5-7b", kv="KV-INT8", hardware="jetson-orin-nx-16gb", batch=16, figure=tmp_path / "memory.svg")
    svg = (tmp_path / "memory.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg") and "Jetson Orin NX 16GB, 17.2 GB" in svg
    assert all(f"batch {count}" in svg for count in (1, 4, 16, 64))
    plan_model("7e9", figure=tmp_path / "bare.svg")  # neither device nor cache
    assert "memory (GB)" in (tmp_path / "bare.svg").read_text(encoding="utf-8")
