"""GGUF: blocks by the gguf library's own arithmetic, files that come back as they went, and headers that lie."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from fewbit.checkpoints.assemble import Feed
from fewbit.checkpoints.gguf import GgufIdentity, GgufLayout, write_gguf
from fewbit.checkpoints.gguf_blocks import WRITTEN, pack, unpack
from fewbit.checkpoints.gguf_header import GgufFile, GgufTensor
from fewbit.checkpoints.gguf_models import architecture_of, rope_factors, rows_of_heads
from fewbit.checkpoints.gguf_source import GgufSource
from fewbit.checkpoints.gguf_vocabulary import _rule
from fewbit.checkpoints.sources import DirectorySource, open_source
from fewbit.errors import CheckpointError, FewbitError, ModelNotFoundError, UnsupportedModelError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import Scheme, get_scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.methods.rtn import rtn


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stored", WRITTEN, ids=lambda stored: stored.name)
def test_blocks_decode_in_the_library_to_the_same_numbers(stored: Type) -> None:
    q = rtn(weight(48, 128), WRITTEN[stored])
    packed = pack(q)
    theirs = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), stored))
    if stored == Type.Q4_1:  # its offset is rounded to F16
        assert (theirs - dequantize(q)).abs().max() <= 2**-11 * 15 * float(q.scale.max())
        return
    assert torch.equal(theirs, dequantize(q))
    back = unpack(packed.flatten(), GgufTensor(stored, (48, 128), 0, packed.numel()), "w")
    assert back.spec == q.spec and torch.equal(back.values, q.values) and torch.equal(back.scale, q.scale)


@pytest.mark.parametrize("stored", [Type.Q4_0, Type.Q8_0, Type.MXFP4], ids=lambda stored: stored.name)
def test_the_librarys_own_blocks_are_read_bit_for_bit(stored: Type) -> None:
    raw = torch.from_numpy(gguf.quants.quantize(weight(16, 64).numpy(), stored))
    q = unpack(raw.flatten(), GgufTensor(stored, (16, 64), 0, raw.numel()), "w")
    assert torch.equal(dequantize(q), torch.from_numpy(gguf.quants.dequantize(raw.numpy(), stored)))
    assert torch.equal(pack(q), raw)


def write(directory: Path, to: Path, scheme: Scheme | None) -> GgufSource:
    source = DirectorySource(directory)
    stored = None if scheme is None else GgufLayout().stored(scheme)
    quantized = frozenset(n.removesuffix(".weight") for n in source.names() if "_proj.weight" in n and stored is not None)

    def linear(prefix: str) -> QuantizedTensor:
        assert stored is not None and stored.weights is not None
        return rtn(source.get(f"{prefix}.weight").float(), stored.weights)

    feed = Feed(source.names(), quantized, source.shape, source.get, source.files.entry, linear)
    fields = json.loads((directory / "config.json").read_text())
    write_gguf(feed, stored, to, GgufIdentity("tiny", source.config, fields, directory))
    return GgufSource(to)


def test_a_file_holds_everything_of_the_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source, read = DirectorySource(tiny_llama_dir), write(tiny_llama_dir, tmp_path / "m.gguf", None)
    assert set(read.names()) == set(source.names()) and read.scheme is None and not read.notes
    for name in source.names():
        assert torch.equal(read.get(name), source.get(name).to(read.get(name).dtype)), name
    assert read.config.to_dict() == {**source.config.to_dict(), "_name_or_path": ""}
    text = "def f(x): return 'ä' + x  # 1234"
    assert read.tokenizer()(text).input_ids == source.tokenizer()(text).input_ids
    assert isinstance(open_source(tmp_path), GgufSource)  # the only GGUF file of a directory


def test_quantized_weights_come_back_bit_for_bit_and_in_the_models_order(tiny_llama_dir: Path, tmp_path: Path) -> None:
    read = write(tiny_llama_dir, tmp_path / "m.gguf", get_scheme("W4A16-G32"))
    source = DirectorySource(tiny_llama_dir)
    assert (
        read.scheme is not None
        and read.scheme.weights is not None
        and read.scheme.name == "W4A16-G32"
        and len(read.quantized_linears) == 14
    )
    for prefix in read.quantized_linears:
        q, expected = read.get_quantized(prefix), rtn(source.get(f"{prefix}.weight").float(), read.scheme.weights)
        assert q is not None and torch.equal(q.values, expected.values) and torch.equal(q.scale, expected.scale)
    raw = read.file.get("blk.0.attn_q.weight")
    in_file = torch.from_numpy(gguf.quants.dequantize(raw.numpy().reshape(128, -1), Type.Q4_0))
    assert torch.equal(in_file.view(4, 16, 2, 128).transpose(1, 2).reshape(128, 128), read.get("model.layers.0.self_attn.q_proj.weight"))


def test_the_librarys_reader_finds_the_same_file(tiny_llama_dir: Path, tmp_path: Path) -> None:
    read = write(tiny_llama_dir, tmp_path / "m.gguf", get_scheme("MXFP4"))
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {t.name: (t.tensor_type, int(t.data_offset), int(t.n_bytes)) for t in theirs.tensors} == {
        name: (t.type, t.offset, t.nbytes) for name, t in read.file.tensors.items()
    }
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert field.contents() == read.file.fields[name], name


def test_a_file_by_others_gets_its_configuration_from_the_fields(tiny_llama_dir: Path, tmp_path: Path) -> None:
    ours = write(tiny_llama_dir, tmp_path / "m.gguf", None)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    for key, value in ours.file.fields.items():
        if key.startswith(("llama.", "tokenizer.ggml.")) and not isinstance(value, list):
            add = writer.add_string if isinstance(value, str) else writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(key, value)
    for name, tensor in ours.file.tensors.items():
        data = ours.file.get(name).numpy()
        if tensor.type == Type.BF16:
            writer.add_tensor(name, data.reshape(*tensor.shape[:-1], -1), raw_dtype=Type.BF16)
        else:
            writer.add_tensor(name, data.view(np.float32).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GgufSource(tmp_path / "other.gguf")
    for field in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size", "tie_word_embeddings", "rope_parameters"):
        expected = getattr(ours.config, field)
        assert getattr(read.config, field) == (pytest.approx(expected) if isinstance(expected, float) else expected), field
    assert all(torch.equal(read.get(name), ours.get(name)) for name in ours.names())


def test_q4_1_and_k_types_come_decoded_and_say_so(tiny_llama_dir: Path, tmp_path: Path) -> None:
    read = write(tiny_llama_dir, tmp_path / "m.gguf", replace(get_scheme("W4A16-ASYM"), weights=WRITTEN[Type.Q4_1]))
    assert read.scheme is None and not read.quantized_linears and "Q4_1" in read.notes[0]
    raw = read.file.get("blk.1.ffn_down.weight").numpy().reshape(128, -1)
    assert torch.equal(read.get("model.layers.1.mlp.down_proj.weight"), torch.from_numpy(gguf.quants.dequantize(raw, Type.Q4_1)))


def test_rows_of_q_and_k_are_llama_cpps() -> None:
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    order = rows_of_heads(architecture_of("llama"), "model.layers.0.self_attn.q_proj.weight", 16, config)
    assert order is not None and order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert rows_of_heads(architecture_of("llama"), "model.layers.0.self_attn.v_proj.weight", 16, config) is None
    assert rows_of_heads(architecture_of("qwen2"), "model.layers.0.self_attn.q_proj.weight", 16, config) is None
    with pytest.raises(UnsupportedModelError, match="not for 'gpt2'"):
        architecture_of("gpt2")


def test_llama_3s_factors_are_transformers_own() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters={**rope, "original_max_position_embeddings": 8192})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    factors = rope_factors(config)
    assert factors is not None and torch.allclose(plain / factors, scaled, rtol=1e-5)


def test_rules_of_published_tokenizers_are_known_by_name() -> None:
    split = {
        "type": "Split",
        "pattern": {
            "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        },
    }
    level = {"type": "ByteLevel", "use_regex": False}
    assert _rule({"type": "Sequence", "pretokenizers": [split, level]}) == ("qwen2", [])
    assert _rule({"type": "ByteLevel", "use_regex": True}) == ("gpt-2", [])
    assert _rule({"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, level]})[1]


# ------------------------------------------------------------------------------------------------------------------- hostile input


@pytest.fixture(scope="module")
def good(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    write(tiny_llama_dir, path, get_scheme("W4A16-G32"))
    return path


def header(tensors: int = 0, fields: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "begin with GGUF"),
    "pickle": (b"\x80\x04\x95" + bytes(64), "begin with GGUF"),
    "zip": (b"PK\x03\x04" + bytes(64), "begin with GGUF"),
    "version": (header(version=99), "version is 99"),
    "other order of bytes": (header(version=3 << 24), "other order"),
    "counts": (header(tensors=2**63), "claims"),
    "fields": (header(fields=2**40, rest=bytes(100)), "claims"),
    "long string": (header(fields=1, rest=struct.pack("<Q", 2**62) + bytes(40)), "string of"),
    "long array": (header(fields=1, rest=text("a") + struct.pack("<IIQ", 9, 4, 2**60) + bytes(40)), "claims"),
    "many empty strings": (header(fields=1, rest=text("a") + struct.pack("<IIQ", 9, 8, 2**21) + bytes(100)), "claims"),
    "nested array": (header(fields=1, rest=text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(40)), "unknown type 9"),
    "type of a field": (header(fields=1, rest=text("a") + struct.pack("<I", 77) + bytes(40)), "unknown type 77"),
    "field twice": (header(fields=2, rest=2 * (text("a") + struct.pack("<II", 4, 1))), "twice"),
    "no UTF-8": (header(fields=1, rest=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40)), "UTF-8"),
    "alignment": (header(fields=1, rest=text("general.alignment") + struct.pack("<II", 4, 3) + bytes(40)), "alignment is 3"),
    "dimensions": (header(tensors=1, rest=text("a") + struct.pack("<I", 2**31) + bytes(40)), "dimensions"),
    "shape": (header(tensors=1, rest=text("a") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)), "shape"),
    "type of a tensor": (header(tensors=1, rest=text("a") + struct.pack("<IQIQ", 1, 32, 999, 0) + bytes(400)), "unknown type 999"),
    "half a block": (header(tensors=1, rest=text("a") + struct.pack("<IQIQ", 1, 33, 2, 0) + bytes(400)), "whole blocks"),
    "outside": (header(tensors=1, rest=text("a") + struct.pack("<IQIQ", 1, 32, 0, 1 << 40) + bytes(400)), "outside"),
    "overlap": (
        header(tensors=2, rest=b"".join(text(n) + struct.pack("<IQIQ", 1, 64, 0, o) for n, o in (("a", 0), ("b", 32))) + bytes(999)),
        "overlaps",
    ),
    "tensor twice": (header(tensors=2, rest=2 * (text("a") + struct.pack("<IQIQ", 1, 32, 0, 0)) + bytes(999)), "twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_headers_that_lie_are_refused(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(tmp_path / "x.gguf")


def test_a_part_of_a_file_and_a_missing_one_are_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        GgufFile(tmp_path / "none.gguf")
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:-4096])
    with pytest.raises(CheckpointError, match="outside of the file"):
        GgufSource(tmp_path / "cut.gguf")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "blocks": lambda data: data.replace(b"llama.block_count\x04\0\0\0\x02", b"llama.block_count\x04\0\0\0\x7f"),
    "configuration": lambda data: data.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 9'),
    "no JSON": lambda data: data.replace(b'{"architectures"', b'["architectures"'),
    "architecture": lambda data: data.replace(b'"model_type": "llama"', b'"model_type": "qwen2"'),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_fields_that_contradict_each_other_are_refused(case: str, good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    assert DAMAGE[case](data) != data
    (tmp_path / "x.gguf").write_bytes(DAMAGE[case](data))
    with pytest.raises(CheckpointError):
        GgufSource(tmp_path / "x.gguf")


def test_a_scale_that_is_nan_is_refused(good: Path, tmp_path: Path) -> None:
    shutil.copyfile(good, tmp_path / "x.gguf")
    place = GgufFile(good).tensors["blk.0.ffn_up.weight"].offset
    with (tmp_path / "x.gguf").open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\xff\x7f")
    with pytest.raises(CheckpointError, match="NaN"):
        GgufSource(tmp_path / "x.gguf").get_quantized("model.layers.0.mlp.up_proj")


@given(st.data())
def test_a_changed_header_is_read_or_refused_and_nothing_else(
    good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 30000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    path.write_bytes(content)
    try:
        file = GgufFile(path)
        for name in list(file.tensors)[:3]:
            file.get(name)
    except FewbitError:
        pass
