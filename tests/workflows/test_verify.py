"""`fewbit verify`: a good checkpoint passes, and each way of damaging one is found and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fewbit.checkpoints.damage import damaged_copy
from fewbit.checkpoints.plain import write_plain
from fewbit.checkpoints.registry import get_layout
from fewbit.checkpoints.runtimes import get_runtime, kind_of, kinds, runtimes
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.checkpoints.shards import write_tensors
from fewbit.checkpoints.sources import open_source
from fewbit.errors import UnsupportedModelError, UsageError
from fewbit.formats.digest import digest
from fewbit.walk.settings import GateChoice, WalkSettings, walk_settings
from fewbit.workflows.foreign.environments import interpreter
from fewbit.workflows.llama_quantize import LLAMA_TYPES, PREFIX
from fewbit.workflows.quantize import quantize_model
from fewbit.workflows.quantize_plan import check_method, resolve_scheme
from fewbit.workflows.verify import verify_checkpoint

LINEAR = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def w4(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "w4"
    quantize_model(tiny_llama_dir, scheme="W4A16-G32", out=out, settings=WalkSettings(gate=GateChoice(enabled=False)))
    return out


def test_a_good_checkpoint_has_no_problems(w4: Path, tiny_llama_dir: Path) -> None:
    result = verify_checkpoint(w4, against=tiny_llama_dir, runtime_names=())
    assert result.passed and not result.problems
    assert result.linears == 14 and result.kind == "compressed-tensors W4A16, symmetric"
    assert result.compared_with == ["recipe", "source"]


def test_damaged_scales_are_found_and_named(w4: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    copy = damaged_copy(w4, LINEAR, tmp_path / "damaged")
    result = verify_checkpoint(copy, against=tiny_llama_dir, runtime_names=())
    assert not result.passed
    assert len(result.problems) == 2 and all(LINEAR in problem for problem in result.problems)


def test_a_recorded_digest_that_differs_is_found(w4: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(w4, copy)
    quantized = open_source(copy).get_quantized(LINEAR)
    assert quantized is not None
    recipe = json.loads((copy / "fewbit_recipe.json").read_text(encoding="utf-8"))
    recipe["values_sha256"] = {LINEAR: digest(quantized)}
    (copy / "fewbit_recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    assert verify_checkpoint(copy, runtime_names=()).passed
    worse = damaged_copy(copy, LINEAR, tmp_path / "worse")
    problems = verify_checkpoint(worse, runtime_names=()).problems
    assert len(problems) == 1 and "recipe" in problems[0] and LINEAR in problems[0]


def test_the_plain_model_has_the_dequantized_values(w4: Path, tmp_path: Path) -> None:
    source = open_source(w4)
    plain = SafetensorsFiles(write_plain(source, tmp_path / "plain"))
    assert set(plain.names()) == set(source.names())
    assert all(plain.get(name).equal(source.get(name).float()) for name in source.names())


@pytest.mark.heavy
def test_another_runtime_computes_the_same_and_a_damaged_copy_does_not(w4: Path) -> None:
    if interpreter(get_runtime("transformers")) is None:
        pytest.skip("the environment of transformers is not made: make runtimes")
    check = verify_checkpoint(w4, runtime_names=("transformers",)).runtimes[0]
    assert check.status == "passed", check.reason
    assert check.layers_compared == 14 and not check.layers_differing
    assert check.difference_rms_nats is not None and check.floor_rms_nats is not None and check.control_rms_nats is not None
    assert check.difference_rms_nats <= 2 * check.floor_rms_nats < check.control_rms_nats


def test_a_runtime_that_cannot_load_the_kind_is_not_asked(w4: Path) -> None:
    check = verify_checkpoint(w4, runtime_names=("llama.cpp",)).runtimes[0]
    assert (check.status, check.reason) == ("skipped", "does not read this layout")


def test_a_scale_that_is_one_number_is_damaged_as_well(tmp_path: Path) -> None:
    directory = tmp_path / "modelopt"
    directory.mkdir()
    tensors = {"p.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "p.weight_scale": torch.tensor(0.5)}
    write_tensors(directory / "model.safetensors", tensors)
    worse = SafetensorsFiles(damaged_copy(directory, "p", tmp_path / "worse"))
    assert worse.get("p.weight_scale") == 0.75
    assert SafetensorsFiles(directory).get("p.weight_scale") == 0.5


def test_an_unknown_runtime_is_refused(w4: Path) -> None:
    with pytest.raises(UsageError, match="transformers, vllm"):
        verify_checkpoint(w4, runtime_names=("tensorrt",))


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}, "gptq-4"),
        ({"quant_method": "gptq", "bits": 4, "sym": False, "desc_act": False}, "gptq-4-asym"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "gptq-4-act"),
        ({"quant_method": "gptq", "bits": 8}, "gptq-8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq-4"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}, "autoround-4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bnb-nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bnb-int8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt-fp8"),
        ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, "modelopt-fp8-block"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt-nvfp4"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "torchao-int8wo"),
    ],
)
def test_the_kind_is_what_the_checkpoint_says_of_itself(fields: dict[str, object], kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": fields}), encoding="utf-8")
    assert kind_of(tmp_path).name == kind


def test_a_kind_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "new"}}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="new"):
        kind_of(tmp_path)


def test_each_cell_of_the_matrix_is_yes_or_a_reason() -> None:
    names = {runtime.name for runtime in runtimes()}
    for kind in kinds().values():
        assert kind.cells and set(kind.cells) <= names, kind.name
        assert all(reason is None or len(reason) > 10 for reason in kind.cells.values()), kind.name


def test_quantize_verifies_what_it_wrote_when_asked(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings = WalkSettings(gate=GateChoice(enabled=False))
    result = quantize_model(tiny_llama_dir, scheme="W4A16-G32", out=tmp_path / "w4", settings=settings, verify=())
    assert result.verify is not None and result.verify.passed
    assert result.verify.compared_with == ["recipe", "source"]
    again = quantize_model(tiny_llama_dir, scheme="W4A16-G32", out=tmp_path / "w4b", settings=settings)
    assert again.verify is None


@pytest.mark.parametrize(("scheme", "group"), [("W4A16-G32", None), ("W4A16-ASYM", 32)])
def test_a_gguf_file_is_compared_with_its_source(scheme: str, group: int | None, tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings = WalkSettings(gate=GateChoice(enabled=False))
    out = tmp_path / "gguf"
    quantize_model(tiny_llama_dir, scheme=scheme, group_size=group, layout="gguf", out=out, settings=settings)
    good = verify_checkpoint(out, against=tiny_llama_dir, runtime_names=())
    assert good.passed, good.problems
    file = next(out.glob("*.gguf"))
    worse = damaged_copy(file, "blk.1.attn_v", tmp_path / "worse")
    assert verify_checkpoint(worse, runtime_names=()).passed  # alone it is whole
    if group is None:  # a decoded type is held to a third of the weight only
        assert not verify_checkpoint(worse, against=tiny_llama_dir, runtime_names=()).passed


def test_each_row_of_the_matrix_can_be_made(tmp_path: Path) -> None:
    names = [str(made) for kind in kinds().values() for made in kind.made]
    assert len(set(names)) == len(names) > 30
    for kind in kinds().values():
        for made in kind.made:
            if made.scheme is None:
                assert made.format in ("gguf-dense", *(PREFIX + name for name in LLAMA_TYPES))
                continue
            layout = get_layout(made.format)
            scheme = resolve_scheme(made.scheme, made.group_size, layout)
            check_method(walk_settings(method=made.method), scheme)
            if not layout.single_file:
                fields = layout.config_fields(scheme, ["lm_head"])
                (tmp_path / "config.json").write_text(json.dumps({"quantization_config": fields}), encoding="utf-8")
                assert kind_of(tmp_path).name == kind.name, made
