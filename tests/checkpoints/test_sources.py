"""Sources: what they hand out, and the one-line errors of directories that are no models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbit.checkpoints.sources import DirectorySource, RandomSource, open_source
from fewbit.errors import CheckpointError, FewbitError, ModelNotFoundError, UnsupportedModelError
from fewbit.models.shapes import shapes_config


@pytest.fixture
def llama(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    target = tmp_path / "llama"
    shutil.copytree(tiny_llama_dir, target)
    return target


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def test_directory_source(llama: Path) -> None:
    source = open_source(llama)
    expected = load_file(llama / "model.safetensors")
    assert sorted(source.names()) == sorted(expected)
    assert all(torch.equal(source.get(name), tensor) for name, tensor in expected.items())
    assert source.scheme is None
    assert source.get_quantized("model.layers.0.mlp.up_proj") is None
    assert source.weight_bytes_on_disk == (llama / "model.safetensors").stat().st_size
    assert source.describe() == str(llama)
    assert source.tokenizer().decode(source.tokenizer()("def f(x):").input_ids) == "def f(x):"
    digest = source.sha256()
    assert digest is not None
    assert len(digest) == 64


def test_the_hash_follows_the_weights(llama: Path, tiny_llama_dir: Path) -> None:
    assert open_source(llama).sha256() == open_source(tiny_llama_dir).sha256()
    data = bytearray((llama / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (llama / "model.safetensors").write_bytes(data)
    assert open_source(llama).sha256() != open_source(tiny_llama_dir).sha256()


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text) and None


def only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index_to(name: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove("config.json"), ModelNotFoundError, "no config.json"),
        (remove("model.safetensors"), ModelNotFoundError, "no safetensors weights"),
        (only_pickle, ModelNotFoundError, "pickle"),
        (write("config.json", "{"), CheckpointError, "config.json"),
        (write("config.json", "[]"), CheckpointError, "no JSON object"),
        (truncate, CheckpointError, "truncated"),
        (write("model.safetensors", "not safetensors at all"), CheckpointError, "safetensors"),
        (index_to("../outside.safetensors"), CheckpointError, "inside the directory"),
        (index_to("/outside.safetensors"), CheckpointError, "inside the directory"),
        (lambda d: edit_config(d, model_type="no-such-model"), UnsupportedModelError, "no-such-model"),
        (lambda d: edit_config(d, model_type="no-such-model", auto_map={"AutoConfig": "x.Y"}), UnsupportedModelError, "no code"),
        (lambda d: edit_config(d, quantization_config={"quant_method": "hqq", "bits": 4}), UnsupportedModelError, "layout 'hqq'"),
    ],
)
def test_damaged_directories(damage: Callable[[Path], None], error: type[FewbitError], message: str, llama: Path) -> None:
    damage(llama)
    with pytest.raises(error, match=message) as caught:
        open_source(llama)
    assert str(llama) in str(caught.value)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        open_source(Path(__file__))


def test_a_hub_id_without_network_says_what_to_do() -> None:
    with pytest.raises(ModelNotFoundError, match="no local directory, and the hub cannot be reached") as caught:
        open_source("no-such-org/no-such-model")
    assert caught.value.remedy


def test_a_missing_tokenizer_matters_only_when_it_is_asked_for(llama: Path) -> None:
    for file in llama.glob("tokenizer*"):
        file.unlink()
    source = DirectorySource(llama)
    assert source.names()
    with pytest.raises(ModelNotFoundError, match="no tokenizer"):
        source.tokenizer()


def test_a_damaged_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="cannot read the tokenizer"):
        DirectorySource(llama).tokenizer()


def test_random_source() -> None:
    config = shapes_config("llama-3.2-1b")
    source = RandomSource(config, seed=0, num_layers=2)
    assert config.num_hidden_layers == 16
    assert source.config.num_hidden_layers == 2
    assert source.describe() == "shapes:llama-3.2-1b"
    assert source.weight_bytes_on_disk is None
    assert source.sha256() is None
    weight = source.get("model.layers.1.mlp.up_proj.weight")
    assert weight.shape == (8192, 2048)
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(weight[:512], weight[512:1024])
    assert not torch.equal(weight, source.get("model.layers.0.mlp.up_proj.weight"))
    assert not torch.equal(weight, RandomSource(config, seed=1, num_layers=2).get("model.layers.1.mlp.up_proj.weight"))
    assert source.get("model.norm.weight").eq(1).all()
    with pytest.raises(ModelNotFoundError, match="random weights"):
        source.tokenizer()


@pytest.mark.parametrize("value", ["abc", -1, 0, 1.5, True, [1]])
@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "max_position_embeddings"])
def test_what_counts_something_is_a_positive_integer(name: str, value: object, llama: Path) -> None:
    edit_config(llama, **{name: value})
    with pytest.raises(CheckpointError, match=rf"config.json' says {name} = "):
        DirectorySource(llama)


def test_a_known_architecture_with_wrong_fields_is_not_called_unknown(llama: Path) -> None:
    edit_config(llama, rms_norm_eps="small")
    with pytest.raises(CheckpointError, match=r"does not fit the architecture 'llama': .*rms_norm_eps") as caught:
        DirectorySource(llama)
    assert "\n" not in str(caught.value)


def test_more_layers_than_there_can_be_are_refused_before_they_are_built(tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2**31}))
    with pytest.raises(CheckpointError, match="4096 are the most"):
        DirectorySource(tmp_path / "x")
