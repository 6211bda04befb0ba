"""`fewbit convert`: identical numbers where grids are equal, refusals where they are not, and the losses told."""

from __future__ import annotations

import json
import shutil
from itertools import permutations
from pathlib import Path

import pytest
import torch

from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.checkpoints.shards import copy_into_shards, write_tensors
from fewbit.checkpoints.sources import open_source
from fewbit.errors import OutputError, UsageError
from fewbit.formats.quantize import dequantize
from fewbit.walk.settings import GateChoice, WalkSettings
from fewbit.workflows.convert import convert_checkpoint
from fewbit.workflows.quantize import quantize_model

NO_GATE = WalkSettings(gate=GateChoice(False))


@pytest.fixture(scope="module")
def made(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    for scheme in ("W4A16-G32", "W4A16-ASYM", "W8A8", "NVFP4"):
        quantize_model(tiny_llama_dir, scheme=scheme, out=root / scheme, settings=NO_GATE)
    quantize_model(tiny_llama_dir, scheme="W4A16-G32", out=root / "gptq", layout="gptq", settings=NO_GATE)
    return {path.name: path for path in root.iterdir()}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    source = open_source(directory)
    return {name: source.get(name).float() for name in source.names()}


@pytest.mark.parametrize("chain", list(permutations(("gptq", "awq", "compressed-tensors"), 2)), ids="-".join)
def test_there_and_back_is_byte_identical(chain: tuple[str, str], made: dict[str, Path], tmp_path: Path) -> None:
    first = convert_checkpoint(made["gptq"], layout=chain[0], out=tmp_path / "a")
    second = convert_checkpoint(tmp_path / "a", layout=chain[1], out=tmp_path / "b")
    third = convert_checkpoint(tmp_path / "b", layout=chain[0], out=tmp_path / "c")
    assert first.losses == second.losses == third.losses == []
    one, other = SafetensorsFiles(tmp_path / "a"), SafetensorsFiles(tmp_path / "c")
    assert one.sha256() == other.sha256()
    before, after = weights(made["gptq"]), weights(tmp_path / "b")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_bf16_scale_is_kept_where_fp16_holds_it_and_counted_where_not(made: dict[str, Path], tmp_path: Path) -> None:
    result = convert_checkpoint(made["W4A16-ASYM"], layout="gptq", out=tmp_path / "gptq")
    assert result.layout_format == "gptq_v2" and result.scales > 0
    before, after = weights(made["W4A16-ASYM"]), weights(tmp_path / "gptq")
    changed = sum(not torch.equal(before[name], after[name]) for name in before)
    assert (changed > 0) == (result.rounded_scales > 0) == bool(result.losses)


def test_formats_of_inputs_that_the_target_lacks_are_told(made: dict[str, Path], tmp_path: Path) -> None:
    result = convert_checkpoint(made["W8A8"], layout="gptq", out=tmp_path / "gptq")
    assert result.scheme == "W8A16" and "inputs" in result.losses[0]


def test_dense_holds_the_dequantized_weights(made: dict[str, Path], tmp_path: Path) -> None:
    convert_checkpoint(made["NVFP4"], layout="dense-float32", out=tmp_path / "dense")
    source, dense = open_source(made["NVFP4"]), open_source(tmp_path / "dense")
    assert dense.scheme is None
    for prefix in source.quantized_linears:
        q = source.get_quantized(prefix)
        assert q is not None and torch.equal(dense.get(f"{prefix}.weight"), dequantize(q))


def test_a_type_of_gguf_without_a_format_of_ours_is_written_out(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings = WalkSettings(gate=GateChoice(enabled=False))
    quantize_model(tiny_llama_dir, scheme="W4A16-ASYM", group_size=32, layout="gguf", out=tmp_path / "q4_1", settings=settings)
    source = open_source(tmp_path / "q4_1")
    exact = convert_checkpoint(tmp_path / "q4_1", layout="dense-float32", out=tmp_path / "dense32")
    assert exact.losses == [] and exact.quantized_linears == 0
    rounded = convert_checkpoint(tmp_path / "q4_1", layout="dense", out=tmp_path / "dense")
    assert any("rounded" in loss for loss in rounded.losses)
    for name in source.names():
        assert torch.equal(open_source(tmp_path / "dense32").get(name).float(), source.get(name).float())
        assert torch.equal(open_source(tmp_path / "dense").get(name), source.get(name).bfloat16()), name
    with pytest.raises(UsageError, match="no other layout"):
        convert_checkpoint(tmp_path / "q4_1", layout="gptq", out=tmp_path / "gptq")


def test_another_grid_is_refused_and_nothing_is_left(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"without rounding the weights again.*compressed-tensors"):
        convert_checkpoint(made["NVFP4"], layout="gptq", out=tmp_path / "gptq")
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way_is_not_touched(made: dict[str, Path], tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not quantized"):
        convert_checkpoint(tiny_llama_dir, layout="gptq", out=tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(OutputError):
        convert_checkpoint(made["gptq"], layout="awq", out=tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


def test_scales_of_the_kv_cache_go_with_it(made: dict[str, Path], tmp_path: Path) -> None:
    modelopt = tmp_path / "modelopt"
    shutil.copytree(made["W8A8"], tmp_path / "source")
    files = SafetensorsFiles(made["W8A8"])
    names = [f"model.layers.{i}.self_attn.{kind}_scale" for i in range(2) for kind in "kv"]
    write_tensors(tmp_path / "scales.safetensors", {name: torch.tensor([0.5 + i]) for i, name in enumerate(names)})
    scales = SafetensorsFiles(tmp_path / "scales.safetensors")
    (tmp_path / "source" / "model.safetensors").unlink()
    copy_into_shards(tmp_path / "source", [*((n, files.entry(n)) for n in files.names()), *((n, scales.entry(n)) for n in names)])
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "dynamic": False,
        "symmetric": True,
    }
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    result = convert_checkpoint(tmp_path / "source", layout="compressed-tensors", out=tmp_path / "out")
    written = SafetensorsFiles(tmp_path / "out")
    assert [float(written.get(name)) for name in names] == [0.5, 1.5, 2.5, 3.5] and result.losses == []
    without = convert_checkpoint(tmp_path / "source", layout="torchao", out=modelopt)
    assert any("KV cache" in loss for loss in without.losses)
    assert not any(name.endswith("k_scale") for name in SafetensorsFiles(modelopt).names())
