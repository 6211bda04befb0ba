"""`fewbit.load`: the same logits from every layout of the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.errors import UsageError
from fewbit.walk.settings import GateChoice, WalkSettings

LAYOUTS = ("compressed-tensors", "gptq", "gptq_v2", "awq", "gguf")


@pytest.fixture(scope="module")
def made(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("load") / "gguf"
    fewbit.quantize_model(tiny_llama_dir, scheme="W4A16-G32", out=out, layout="gguf", settings=WalkSettings(gate=GateChoice(False)))
    return out


def logits(loaded: fewbit.LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = loaded.model(torch.arange(40)[None]).logits
    return result


def test_one_model_in_every_layout_gives_the_same_logits(made: Path, tmp_path: Path) -> None:
    expected = logits(fewbit.load(made, kernel="unfused", dtype=torch.float32))
    for layout in LAYOUTS:
        fewbit.convert_checkpoint(made, layout=layout, out=tmp_path / layout)
        loaded = fewbit.load(tmp_path / layout, kernel="unfused", dtype=torch.float32)
        assert loaded.scheme.name == "W4A16-G32" and torch.equal(logits(loaded), expected), layout
    dense = fewbit.load(made, scheme="BF16", dtype=torch.float32)
    assert not dense.quantized_linear_bytes and torch.allclose(logits(dense), expected, atol=1e-4)


def test_a_quantized_checkpoint_is_not_rounded_a_second_time(made: Path) -> None:
    with pytest.raises(UsageError, match="rounded twice"):
        fewbit.load(made, scheme="W8A16")


def test_a_gguf_file_goes_to_every_layout_and_back_unchanged(made: Path, tmp_path: Path) -> None:
    from fewbit.checkpoints.gguf_source import GgufSource

    first = GgufSource(next(made.glob("*.gguf")))
    for layout in ("gptq", "awq", "compressed-tensors"):
        fewbit.convert_checkpoint(made, layout=layout, out=tmp_path / layout)
        result = fewbit.convert_checkpoint(tmp_path / layout, layout="gguf", out=tmp_path / f"{layout}.gguf")
        assert result.rounded_scales == 0 and result.layout_format == "Q4_0"
        back = GgufSource(tmp_path / f"{layout}.gguf")
        assert list(back.file.tensors) and all(torch.equal(first.file.get(name), back.file.get(name)) for name in first.file.tensors)
    assert {path.name for path in made.iterdir()} == {"model-Q4_0.gguf", "README.md", "fewbit_recipe.json"}
