"""The check on every layer finds what is broken and leaves alone what is only rounded; fallbacks say why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.checkpoints.compressed_tensors import CompressedTensorsReader
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.errors import FormatError
from fewbit.formats.quantize import quantize
from fewbit.formats.spec import SCHEMES, QuantSpec, get_scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.methods.rtn import rtn
from fewbit.walk import methods
from fewbit.walk.checks import check_layer, limits, saturated_share
from fewbit.walk.settings import WalkSettings
from fewbit.workflows.quantize import quantize_model

SPEC: QuantSpec = get_scheme("W4A16-G32").weights  # type: ignore[assignment]
assert SPEC is not None
WEIGHT = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.weights and scheme.weights.strategy != "block"])
def test_rounding_to_nearest_passes(name: str) -> None:
    spec = SCHEMES[name].weights
    assert spec is not None
    wide = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    check = check_layer(wide, rtn(wide, spec), torch.randn(100, 256, generator=torch.Generator().manual_seed(1)))
    assert check.failure == "" and check.error is not None and 0 < check.error < 1


def broken(kind: str) -> QuantizedTensor:
    q = rtn(WEIGHT, SPEC)
    if kind == "nan":
        scale = q.scale.clone()
        scale[3, 0] = float("nan")
        return replace(q, scale=scale)
    if kind == "collapsed":
        values = q.values.clone()
        values[:4] = 0
        return replace(q, values=values)
    if kind == "saturated":
        return quantize(WEIGHT, SPEC, scale=q.scale / 30)
    return replace(q, values=-q.values.clamp(-7, 7))


@pytest.mark.parametrize(
    ("kind", "says"),
    [("nan", "not finite"), ("collapsed", "constant"), ("saturated", "ends of the grid"), ("negated", "relative output error")],
)
def test_what_is_broken_is_found(kind: str, says: str) -> None:
    assert says in check_layer(WEIGHT, broken(kind), TOKENS).failure


def test_worse_than_rounding_to_nearest_is_a_failure() -> None:
    noisy = rtn(WEIGHT + 0.15 * torch.randn(48, 64, generator=torch.Generator().manual_seed(2)), SPEC)
    assert check_layer(WEIGHT, noisy, TOKENS).failure == ""
    assert "rounding to nearest" in check_layer(WEIGHT, noisy, TOKENS, rtn_error=0.05).failure


def test_zeros_are_exact_and_limits_are_a_table() -> None:
    zeros = torch.zeros(8, 32)
    assert check_layer(zeros, rtn(zeros, SPEC), torch.randn(5, 32)) == check_layer(zeros, rtn(zeros, SPEC), torch.ones(5, 32))
    assert check_layer(zeros, rtn(zeros, SPEC), torch.randn(5, 32)).error == 0.0
    assert limits(6) == limits(4) and limits(8).relative_error < limits(2).relative_error
    fp8 = get_scheme("FP8").weights
    assert fp8 is not None and saturated_share(rtn(WEIGHT, fp8)) >= 1 / 64


def test_layers_fall_back_step_by_step_and_say_so(
    zoo_dir: Callable[[str], Path], ungated: WalkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ that fails is tried with more damping, then rounding to nearest; what fails there takes its group into high precision."""
    real = methods.gptq

    def sometimes(weights: list[torch.Tensor], spec: object, statistics: object, settings: methods.WalkSettings) -> object:
        if weights[0].shape == (64, 128):  # down_proj
            raise FormatError("a singular matrix")
        if weights[0].shape == (64, 64) and len(weights) == 1 and settings.dampening < 0.05:  # type: ignore[attr-defined]  # o_proj
            raise FormatError("needs more damping")
        return real(weights, spec, statistics, settings)  # type: ignore[arg-type]

    monkeypatch.setattr(methods, "gptq", sometimes)
    result = quantize_model(zoo_dir("llama"), scheme="W4A16-G32", method="gptq", out=tmp_path / "out", settings=ungated)
    by_name = {layer.name: layer for layer in result.layers}
    down, output = by_name["model.layers.0.mlp.down_proj"], by_name["model.layers.0.self_attn.o_proj"]
    assert down.method == "rtn" and len(down.notes) == 3 and "singular" in down.notes[0]
    assert output.method == "gptq" and output.dampening == pytest.approx(0.1) and "more damping" in output.notes[0]
    assert by_name["model.layers.0.self_attn.q_proj"].notes == []


def test_a_group_that_cannot_be_rounded_stays_in_high_precision(
    zoo_dir: Callable[[str], Path], small: WalkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fewbit.walk.block as block

    real = block.check_layer

    def strict(weight: torch.Tensor, *arguments: object) -> object:
        check = real(weight, *arguments)  # type: ignore[arg-type]
        return replace(check, failure="too bad") if weight.shape == (32, 64) else check  # k and v

    monkeypatch.setattr(block, "check_layer", strict)
    source = zoo_dir("llama")
    result = quantize_model(source, scheme="W4A16-G32", method="gptq", out=tmp_path / "out", settings=small)
    kept = [layer.name for layer in result.layers if layer.method == "high precision"]
    assert kept == [f"model.layers.{index}.self_attn.{name}_proj" for index in range(2) for name in "qkv"]
    assert set(kept) < set(result.ignored_linears) and set(kept) < set(CompressedTensorsReader(tmp_path / "out").ignore)
    one, other = SafetensorsFiles(source), SafetensorsFiles(tmp_path / "out")
    assert all(torch.equal(one.get(f"{name}.weight"), other.get(f"{name}.weight")) for name in kept)
    assert result.quantized_linears == 8
