"""`fewbit inspect`: what is there is told, and what contradicts itself is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

import fewbit
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.checkpoints.shards import copy_into_shards
from fewbit.cli import main
from fewbit.report.inspect_table import render_inspect
from fewbit.walk.settings import GateChoice, WalkSettings

LAYOUTS = ("compressed-tensors", "gptq", "awq", "gguf")


@pytest.fixture(scope="module")
def made(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    for layout in LAYOUTS:
        settings = WalkSettings(gate=GateChoice(False))
        fewbit.quantize_model(tiny_llama_dir, scheme="W4A16-G32", out=root / layout, layout=layout, settings=settings)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_good_checkpoint_is_described_and_has_no_problem(layout: str, made: Path) -> None:
    result = fewbit.inspect_checkpoint(made / layout)
    assert result.problems == [] and result.layout == layout and result.scheme == "W4A16-G32"
    assert result.quantized_parameters == 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256)
    assert result.parameters == result.quantized_parameters + 512 * 128 + 5 * 128
    least = 4.5 if layout in ("gguf", "compressed-tensors") else 4.6
    assert result.effective_bits_per_weight is not None and least <= result.effective_bits_per_weight < 5.1
    main_format = next(one for one in result.formats if one.linears == 14)
    assert main_format.kernel and result.kind is not None
    expected = "llama.cpp" if layout == "gguf" else "transformers"
    assert any(cell.runtime == expected and cell.loads for cell in result.runtimes)
    console = Console(record=True, width=200)
    render_inspect(result, console)
    assert "Nothing contradicts itself" in console.export_text()


def test_high_precision_is_said_to_be_that(tiny_llama_dir: Path) -> None:
    result = fewbit.inspect_checkpoint(tiny_llama_dir)
    assert result.scheme == "" and result.effective_bits_per_weight is None and result.effective_bits_per_parameter == 16
    assert result.problems == [] and any("chat template" in note for note in result.notes)


def edit(directory: Path, to: Path, **fields: object) -> Path:
    shutil.copytree(directory, to)
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] |= fields
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_group_size_that_the_tensors_do_not_have(made: Path, tmp_path: Path) -> None:
    result = fewbit.inspect_checkpoint(edit(made / "gptq", tmp_path / "x", group_size=64))
    assert any("scales" in problem for problem in result.problems)
    assert any("quantize_config.json" in problem and "group_size" in problem for problem in result.problems)


def test_a_linear_that_config_json_names_as_not_quantized(made: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    result = fewbit.inspect_checkpoint(edit(made / "compressed-tensors", tmp_path / "x", ignore=["lm_head", name]))
    assert any(name in problem and "names it" in problem for problem in result.problems)


def test_tensors_that_are_missing_foreign_or_not_announced(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "gptq", tmp_path / "x")
    files = SafetensorsFiles(made / "gptq")
    pieces = [(name, files.entry(name)) for name in files.names() if name != "model.norm.weight"]
    pieces.append(("model.layers.7.mlp.odd.weight", files.entry("model.norm.weight")))
    (tmp_path / "x" / "model.safetensors").unlink()
    copy_into_shards(tmp_path / "x", pieces)
    problems = " ".join(fewbit.inspect_checkpoint(tmp_path / "x").problems)
    assert "'model.norm.weight' of the architecture is missing" in problems and "layers.7.mlp.odd.weight' belongs to no part" in problems
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tmp_path / "x"), "--json"])
    assert ended.value.code == 1
    assert any("config.json names none" in problem for problem in json.loads(capsys.readouterr().out)["problems"])
