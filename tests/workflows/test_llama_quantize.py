"""GGUF files from a model in high precision, with llama.cpp's quantizer where it is installed."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from fewbit.checkpoints.sources import open_source
from fewbit.errors import MeasurementError, UsageError
from fewbit.workflows import llama_quantize
from fewbit.workflows.convert import convert_checkpoint


def test_a_dense_file_holds_the_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = convert_checkpoint(tiny_llama_dir, layout="gguf-dense", out=tmp_path / "m.gguf")
    source, read = open_source(tiny_llama_dir), open_source(tmp_path / "m.gguf")
    assert result.quantized_linears == 0 and read.scheme is None and [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert all(torch.equal(read.get(name), source.get(name).to(read.get(name).dtype)) for name in source.names())


def test_what_cannot_be_is_refused_and_leaves_nothing(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="gguf-q4_k_m"):
        convert_checkpoint(tiny_llama_dir, layout="gguf-q9", out=tmp_path / "m.gguf")
    monkeypatch.setenv("FEWBIT_ENVS", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(MeasurementError, match="not installed"):
        convert_checkpoint(tiny_llama_dir, layout="gguf-q4_k_m", out=tmp_path / "m.gguf")
    monkeypatch.setattr(llama_quantize, "_quantizer", lambda: ["false"])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(MeasurementError, match="failed"):
        convert_checkpoint(tiny_llama_dir, layout="gguf-q4_k_m", out=tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_llama_cpps_types_are_read_as_the_library_decodes_them(tiny_llama_dir: Path, tmp_path: Path) -> None:
    try:
        llama_quantize._quantizer()
    except MeasurementError as error:
        pytest.skip(error.problem)
    convert_checkpoint(tiny_llama_dir, layout="gguf-iq4_nl", out=tmp_path / "m.gguf")
    read = open_source(tmp_path / "m.gguf")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["blk.0.ffn_down.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(theirs.data, theirs.tensor_type))
    assert torch.equal(read.get("model.layers.0.mlp.down_proj.weight"), expected) and read.notes
    with pytest.raises(UsageError, match="second time"):
        convert_checkpoint(tmp_path / "m.gguf", layout="gguf-q4_k_m", out=tmp_path / "n.gguf")
