"""The estimate: exact where it is arithmetic, near where it was measured, and a refusal before the work where it cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewbit.checkpoints.sources import open_source
from fewbit.errors import UsageError
from fewbit.formats.spec import get_scheme
from fewbit.models.shapes import shapes_config
from fewbit.models.structure import build_without_weights, linear_names
from fewbit.results import QuantizeEstimate
from fewbit.walk import estimate as estimate_module
from fewbit.walk.estimate import Workload, check_fits, estimate_quantization, workload_of
from fewbit.walk.rates import Rates, measure_rates
from fewbit.walk.settings import CalibrationChoice, GateChoice, WalkSettings
from fewbit.workflows.quantize import quantize_model

RATES = Rates(1e11, 1e11, 5e-10, 2e-6, 5e8, 5e8, 1e-7, 1e-4, 2e-8)
W4 = get_scheme("W4A16")
NO_GATE = GateChoice(enabled=False)
LLAMA_7B_LINEARS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)


def llama_7b() -> Workload:
    config = shapes_config("llama-2-7b")
    model = build_without_weights(config)
    targets = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert set(targets) | {"lm_head"} == set(linear_names(config))
    return workload_of(model, config, targets)


@pytest.fixture(scope="module")
def seven_billion() -> Workload:
    return llama_7b()


def estimated(work: Workload, **settings: object) -> QuantizeEstimate:
    return estimate_quantization(work, W4, WalkSettings(**settings), torch.float32, RATES)  # type: ignore[arg-type]


def test_the_workload_of_llama_2_7b_is_its_shapes(seven_billion: Workload) -> None:
    block = seven_billion.blocks[0]
    assert len(seven_billion.blocks) == 32 and seven_billion.outside == ()
    assert sorted((group.columns, sorted(group.rows)) for group in block) == [
        (4096, [4096]),
        (4096, [4096, 4096, 4096]),
        (4096, [11008, 11008]),
        (11008, [4096]),
    ]
    assert sum(group.weights for group in block) * 32 == LLAMA_7B_LINEARS
    assert seven_billion.kept_bytes == pytest.approx(2 * (2 * 32000 * 4096 + 65 * 4096), rel=1e-6)


def test_disk_is_the_packed_weights_twice_and_what_is_kept_once(seven_billion: Workload) -> None:
    disk = estimated(seven_billion, gate=NO_GATE).disk_parts
    assert disk["finished blocks"] == LLAMA_7B_LINEARS * 4.125 / 8
    assert disk["checkpoint"] == disk["finished blocks"] + seven_billion.kept_bytes
    assert disk["hidden states"] == 0
    spilled = estimated(seven_billion, method="gptq", gate=NO_GATE, memory_bytes=2**20)
    assert spilled.disk_parts["hidden states"] == (128 + 8) * 512 * 4096 * 4
    assert spilled.memory_parts["hidden states"] == 2**20


def test_memory_stays_within_a_block_and_three_squares_of_the_widest_input(seven_billion: Workload) -> None:
    """The project's bar on GPTQ; and RTN without a gate is far below a block."""
    gptq = estimated(seven_billion, method="gptq", gate=NO_GATE).memory_parts
    block = 4 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert block < gptq["work"] <= block + 3 * 11008**2 * 4
    assert estimated(seven_billion, gate=NO_GATE).memory_parts["work"] < block / 1.5
    tuned = estimated(seven_billion, method="gptq+autoround", gate=NO_GATE)
    assert tuned.memory_parts["work"] > 3 * block


def test_time_grows_with_what_it_is_made_of(seven_billion: Workload) -> None:
    few = CalibrationChoice(samples=32)
    base = estimated(seven_billion, method="gptq", gate=NO_GATE)
    fewer = estimated(seven_billion, method="gptq", gate=NO_GATE, calibration=few)
    assert fewer.duration_parts["moments"] == pytest.approx(base.duration_parts["moments"] / 4, rel=1e-6)
    assert fewer.duration_parts["rounding"] == base.duration_parts["rounding"]
    operations = 32 * (2 * 11008**3 / 3 + 4096 * 11008**2 + 3 * 2 * 4096**3 / 3 + (4 * 4096 + 2 * 11008) * 4096**2)
    assert base.duration_parts["rounding"] > operations / RATES.flops
    seconds = [
        estimated(seven_billion, method=method, gate=NO_GATE).duration_s for method in ("rtn", "gptq", "awq+gptq", "awq+gptq+autoround")
    ]
    values = [interval.value for interval in seconds if interval is not None]
    assert values == sorted(values) and len(set(values)) == 4
    assert (
        estimated(seven_billion).duration_parts["forward passes"]
        > 0
        == estimated(seven_billion, gate=NO_GATE).duration_parts["forward passes"]
    )
    assert estimate_quantization(seven_billion, W4, WalkSettings(), torch.float32).duration_s is None


def test_a_mixtures_experts_see_a_share_of_the_tokens() -> None:
    from transformers import MixtralConfig

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2)
    targets = {f"model.layers.{i}.mlp.experts.{e}.w{n}": (96, 64) for i in range(2) for e in range(8) for n in (1, 3)}
    work = workload_of(build_without_weights(config), config, targets)
    assert {group.share for block in work.blocks for group in block} == {0.25}


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "NVFP4", "FP8-BLOCK"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_rates_are_measured_in_moments(scheme: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.walk import rates

    monkeypatch.setattr(rates, "_GEMM_BUDGET_S", 0.01)
    monkeypatch.setattr(rates, "_GEMM_SIZE", 256)
    monkeypatch.setattr(rates, "_DISK_BYTES", 1 << 20)
    monkeypatch.setattr(rates, "_PASS_ELEMENTS", 1 << 21)
    monkeypatch.setattr(rates, "_ROWS", (128, 256))
    found = measure_rates(get_scheme(scheme), WalkSettings(method=method), torch.bfloat16, tmp_path)
    assert 1e8 < found.flops < 1e15 and 1e8 < found.float32_flops < 1e15
    assert 1e-12 < found.pass_s < 1e-6 and 1e-8 < found.op_s < 1e-3
    assert 1e5 < found.write_bytes_s < 1e12 and 1e6 < found.hash_bytes_s < 1e11
    assert 1e-10 < found.rtn_s < 1e-4 and (found.rounding_s > 0 or found.rounding_column_s > 0)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_what_was_estimated(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source = open_source(tiny_llama_dir)
    model = build_without_weights(source.config)
    targets = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    work = workload_of(model, source.config, targets, source_bytes=source.weight_bytes_on_disk)
    estimate = estimate_quantization(work, W4, WalkSettings(gate=NO_GATE), torch.float32)
    result = quantize_model(tiny_llama_dir, scheme="W4A16", out=tmp_path / "out", settings=WalkSettings(gate=NO_GATE))
    assert estimate.disk_parts["checkpoint"] == pytest.approx(result.checkpoint_bytes, rel=0.02)


def test_windows_are_no_longer_than_the_model(seven_billion: Workload) -> None:
    def seconds(length: int) -> float:
        duration = estimated(seven_billion, method="gptq", calibration=CalibrationChoice(sequence_length=length)).duration_s
        assert duration is not None
        return duration.value

    assert seven_billion.positions == 4096
    assert seconds(2048) < seconds(4096) == seconds(100_000)


def small(**parts: float) -> QuantizeEstimate:
    zero = WalkSettings(gate=NO_GATE)
    work = Workload(((),), ((8, 128),), (1024,), 1000, 2000, 100, 128)
    estimate = estimate_quantization(work, W4, zero, torch.float32)
    memory, disk = {**estimate.memory_parts, **parts}, estimate.disk_parts
    total = memory["process"] + memory["work"] + memory["hidden states"]
    return replace(
        estimate,
        peak_memory_bytes=replace(estimate.peak_memory_bytes, value=total, low=total / 1.2, high=total * 1.2),
        memory_parts=memory,
        disk_parts=disk,
    )


@pytest.mark.parametrize(("parts", "remedy"), [({"work": 2.0**50}, "--precision bfloat16"), ({"hidden states": 2.0**50}, "--memory lower")])
def test_what_does_not_fit_the_memory_is_refused_with_what_to_change(parts: dict[str, float], remedy: str, tmp_path: Path) -> None:
    check_fits(small(), tmp_path / "out")
    with pytest.raises(UsageError, match=rf"1,048,576\.\d GiB of memory, and .* available; .*{remedy}"):
        check_fits(small(**parts), tmp_path / "out")


def test_a_disk_that_is_too_small_is_refused_and_unfinished_work_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = small()
    needed = int(estimate.disk_bytes.value)
    free: Callable[[int], None] = lambda nbytes: monkeypatch.setattr(  # noqa: E731
        estimate_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=nbytes)
    )
    free(needed)
    check_fits(estimate, tmp_path / "not" / "there" / "out")
    free(needed // 2)
    with pytest.raises(UsageError, match=r"on the disk, and 1\.0 KiB are free; free some space"):
        check_fits(estimate, tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "step").write_bytes(bytes(needed))
    check_fits(estimate, tmp_path / "out")
