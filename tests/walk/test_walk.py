"""The walk through many architectures: what transformers loads is what was computed, and every layer is accounted for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fewbit.checkpoints.compressed_tensors import CompressedTensorsReader
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.checkpoints.sources import open_source
from fewbit.errors import CheckpointError
from fewbit.formats.quantize import dequantize
from fewbit.walk.settings import WalkSettings
from fewbit.walk.skeleton import Skeleton
from fewbit.workflows.quantize import quantize_model

from .conftest import ZOO

DENSE = [name for name in ZOO if name not in ("mixtral", "qwen2_moe")]
SCHEME = "W4A16-G32"


@pytest.mark.parametrize("name", list(ZOO))
def test_a_skeleton_computes_what_the_model_computes(name: str, zoo_dir: Callable[[str], Path]) -> None:
    """Block by block, every weight read when its turn comes: the logits are transformers' own, to the last bit for dense models."""
    directory = zoo_dir(name)
    skeleton = Skeleton(open_source(directory))
    ids = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids[:1]).logits
        hidden = skeleton.embed(ids[:1])
        skeleton.check_calls(ids[1:])
        skeleton.release()
        for index in range(skeleton.num_blocks):
            block = skeleton.load_block(index)
            hidden = skeleton.call(index, 24)(block, hidden)
            skeleton.unload_block(index)
        logits = skeleton.logits(ids[:1], hidden)
    skeleton.release()
    assert torch.equal(logits, expected) if name in DENSE else torch.allclose(logits, expected, atol=1e-4)
    assert {parameter.device.type for parameter in skeleton.model.parameters()} == {"meta"}


def dequantized(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by disk name, as it is to be computed with in BF16."""
    reader = CompressedTensorsReader(directory)
    tensors = {f"{prefix}.weight": dequantize(reader.read(prefix), torch.bfloat16) for prefix in reader.linears}
    for name in reader.files.names():
        if name.rpartition(".")[0] not in reader.linears or name.endswith(".bias"):
            tensors[name] = reader.files.get(name)
    return tensors


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "gptq") for name in DENSE),
        ("llama", "rtn"),
        ("llama", "hqq"),
        *((name, "awq") for name in ("gemma2", "phi3", "opt", "cohere")),
    ],
)
def test_transformers_loads_what_was_walked(
    name: str, method: str, zoo_dir: Callable[[str], Path], small: WalkSettings, tmp_path: Path
) -> None:
    """The checkpoint in transformers gives the same logits as the source's architecture with the dequantized weights put in."""
    source, out = zoo_dir(name), tmp_path / "out"
    result = quantize_model(source, scheme=SCHEME, method=method, out=out, settings=small)
    weights = dequantized(out)
    assert set(weights) == set(SafetensorsFiles(source).names())
    ids = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(2))
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    skeleton = Skeleton(open_source(source))
    for model_name, disk in skeleton.names.single.items():
        reference.get_parameter(model_name).data.copy_(weights[disk])
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
        assert torch.equal(loaded(ids).logits, reference(ids).logits)
    assert result.quantized_linears == len(result.layers) == len(CompressedTensorsReader(out).linears)
    assert result.gate is not None and result.gate.outcome == "passed" and result.gate.kl_nats is not None
    assert result.gate.kl_nats.value > 0
    if method in ("gptq", "awq"):
        inside = [layer for layer in result.layers if ".layers." in layer.name]
        assert all(layer.tokens == 128 and layer.error is not None and layer.error < 0.5 for layer in inside)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts_are_quantized_one_by_one_under_the_names_of_the_disk(
    name: str, zoo_dir: Callable[[str], Path], small: WalkSettings, tmp_path: Path
) -> None:
    result = quantize_model(zoo_dir(name), scheme=SCHEME, method="gptq", out=tmp_path / "out", settings=small)
    assert set(dequantized(tmp_path / "out")) == set(SafetensorsFiles(zoo_dir(name)).names())
    experts = [layer for layer in result.layers if ".experts." in layer.name]
    assert len(experts) == 2 * 4 * 3 and all(layer.method in ("gptq", "rtn") for layer in experts)
    assert not any(layer.name.endswith(("gate", "shared_expert_gate")) for layer in result.layers)
    assert any("calibration tokens per expert" in note for note in result.notes)


def test_calibration_pays(zoo_dir: Callable[[str], Path], small: WalkSettings, tmp_path: Path) -> None:
    """GPTQ's layers have less error on held-back tokens than rounding to nearest, and the model is nearer to the source."""
    many = replace(small, calibration=replace(small.calibration, samples=24, sequence_length=64))
    rtn, gptq = (
        quantize_model(zoo_dir("llama"), scheme="W3A16", group_size=32, method=method, out=tmp_path / method, settings=many)
        for method in ("rtn", "gptq")
    )
    assert sum(layer.error < layer.rtn_error for layer in gptq.layers if layer.error and layer.rtn_error) > 0.8 * len(gptq.layers)
    assert rtn.gate is not None and gptq.gate is not None and rtn.gate.kl_nats is not None and gptq.gate.kl_nats is not None
    assert gptq.gate.kl_nats.value < rtn.gate.kl_nats.value


def test_a_block_at_a_time_needs_no_forward_without_need(
    zoo_dir: Callable[[str], Path], ungated: WalkSettings, small: WalkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RTN with the gate gives the same bytes as RTN without; the latter never loads a block."""
    quantize_model(zoo_dir("llama"), scheme=SCHEME, out=tmp_path / "gated", settings=small)

    def refuse(*_: object) -> None:
        raise AssertionError("a block was loaded")

    monkeypatch.setattr(Skeleton, "load_block", refuse)
    quantize_model(zoo_dir("llama"), scheme=SCHEME, out=tmp_path / "streamed", settings=ungated)
    assert SafetensorsFiles(tmp_path / "gated").sha256() == SafetensorsFiles(tmp_path / "streamed").sha256()


def test_a_budget_of_nothing_changes_no_number(zoo_dir: Callable[[str], Path], small: WalkSettings, tmp_path: Path) -> None:
    for name, memory in (("memory", None), ("disk", 0)):
        quantize_model(zoo_dir("llama"), scheme=SCHEME, method="gptq", out=tmp_path / name, settings=replace(small, memory_bytes=memory))
    for file in sorted(path.name for path in (tmp_path / "memory").iterdir()):
        assert (tmp_path / "memory" / file).read_bytes() == (tmp_path / "disk" / file).read_bytes(), file


def test_arguments_that_depend_on_the_text_are_refused(zoo_dir: Callable[[str], Path]) -> None:
    skeleton = Skeleton(open_source(zoo_dir("llama")))
    ids = torch.arange(12)[None]
    skeleton.embed(ids)
    calls = skeleton._calls[12]
    calls[1] = replace(calls[1], keywords={**calls[1].keywords, "position_ids": torch.zeros(1, 12, dtype=torch.int64)})
    with pytest.raises(Exception, match="arguments that depend on the text"):
        skeleton.check_calls(ids + 1)


def test_a_missing_tensor_is_named(zoo_dir: Callable[[str], Path]) -> None:
    skeleton = Skeleton(open_source(zoo_dir("llama")))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.7"):
        skeleton.stored("model.layers.7.mlp.up_proj.weight")


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("scheme", ["W4A16-G32", "W8A8"])
def test_paused_runs_and_repeated_runs_give_the_same_bytes(
    name: str, scheme: str, zoo_dir: Callable[[str], Path], small: WalkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With input-error compensation, so that the reference path pauses, too."""
    settings = replace(small, method="gptq", gptq=replace(small.gptq, compensation=0.5))
    quantize_model(zoo_dir(name), scheme=scheme, out=tmp_path / "paused", settings=settings)
    monkeypatch.setattr("fewbit.walk.block._BlockWork._round_paused", lambda *_: False)
    quantize_model(zoo_dir(name), scheme=scheme, out=tmp_path / "repeated", settings=settings)
    assert SafetensorsFiles(tmp_path / "paused").sha256() == SafetensorsFiles(tmp_path / "repeated").sha256()
    assert (tmp_path / "paused" / "fewbit_recipe.json").read_bytes() == (tmp_path / "repeated" / "fewbit_recipe.json").read_bytes()


def test_weights_that_wait_packed_change_no_number(
    zoo_dir: Callable[[str], Path], small: WalkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a wide group is rounded, what is done is kept in few bits; here every group counts as wide."""
    settings = replace(small, method="gptq", gptq=replace(small.gptq, compensation=0.5))
    quantize_model(zoo_dir("llama"), scheme=SCHEME, out=tmp_path / "as_usual", settings=settings)
    monkeypatch.setattr("fewbit.walk.block.WIDE_COLUMNS", 1)
    quantize_model(zoo_dir("llama"), scheme=SCHEME, out=tmp_path / "parked", settings=settings)
    assert SafetensorsFiles(tmp_path / "as_usual").sha256() == SafetensorsFiles(tmp_path / "parked").sha256()
