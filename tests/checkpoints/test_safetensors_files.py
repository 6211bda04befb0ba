"""Lazy safetensors: the same tensors as the library reads, and every kind of damage named before a tensor is read."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewbit.checkpoints.safetensors_files import DTYPE_NAMES, INDEX_NAME, SafetensorsFiles, read_header
from fewbit.checkpoints.shards import copy_into_shards, write_tensors
from fewbit.errors import CheckpointError, FewbitError, ModelNotFoundError, OutputError

FILE = "model.safetensors"


def raw(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", DTYPE_NAMES.values(), ids=str)
def test_every_dtype_reads_as_the_library_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    size = 12 * dtype.itemsize
    content = torch.arange(size, dtype=torch.uint8) % (2 if dtype == torch.bool else 61)
    tensors = {"matrix": content.view(dtype).reshape(3, 4), "scalar": content[: dtype.itemsize].view(dtype).reshape(())}
    tensors["empty"] = torch.empty(0, 5, dtype=dtype)
    write_tensors(tmp_path / FILE, tensors)
    files = SafetensorsFiles(tmp_path)
    theirs = load_file(tmp_path / FILE)
    assert set(files.names()) == set(theirs) == set(tensors)
    for name, tensor in theirs.items():
        ours = files.get(name)
        assert ours.dtype == tensor.dtype == files.dtype(name) and ours.shape == tensor.shape == files.shape(name)
        assert torch.equal(ours.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_file_by_the_library_reads_and_hashes(tmp_path: Path) -> None:
    save_file({"a": torch.randn(5, 3), "b": torch.arange(4)}, tmp_path / FILE, {"format": "pt"})
    files = SafetensorsFiles(tmp_path)
    assert torch.equal(files.get("b"), torch.arange(4)) and "a" in files and len(files) == 2
    assert files.sha256() == hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest()
    assert files.total_bytes == (tmp_path / FILE).stat().st_size
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        files.get("c")


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), max_bytes=st.integers(1, 200), wide=st.booleans())
def test_shards_hold_everything_once_and_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], max_bytes: int, wide: bool
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.arange(n, dtype=torch.int64 if wide and i % 2 else torch.uint8) for i, n in enumerate(sizes)}
    piece = directory.with_name(f"{directory.name}.safetensors")
    write_tensors(piece, tensors)
    assert SafetensorsFiles(piece).files == (piece,)
    total = copy_into_shards(directory, [(name, read_header(piece)[name]) for name in tensors], max_bytes)
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    files = SafetensorsFiles(directory)
    theirs = {name: tensor for file in files.files for name, tensor in load_file(file).items()}
    assert set(theirs) == set(files.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(files.get(name), tensor) and torch.equal(theirs[name], tensor)
    for file in files.files:
        held = read_header(file)
        assert len(held) == 1 or sum(part.nbytes for part in held.values()) <= max_bytes
    if len(files.files) > 1:
        assert json.loads((directory / INDEX_NAME).read_text())["metadata"]["total_size"] == total


DAMAGE = {
    "empty": (b"", "truncated"),
    "shorter than its length field": (b"\0\0\0", "truncated"),
    "an absurd header length": (struct.pack("<Q", 2**63) + b"{}", "claims"),
    "a zip in disguise": (b"PK\x03\x04" + b"\0" * 64, "no safetensors file"),
    "no JSON": (raw(b"{nonsense"), "JSON"),
    "not UTF-8": (raw(b"\xff\xfe{}"), "JSON"),
    "JSON nested without end": (raw(b"[" * 200_000), "JSON"),
    "a list": (raw([1]), "list"),
    "one name twice": (raw(b'{"a":1,"a":2}'), "twice"),
    "an entry that is a number": (raw({"a": 3}), "'a'"),
    "an unknown dtype": (raw({"a": entry(0, 4, dtype="F3")}, b"1234"), "F3"),
    "a dtype that is a list": (raw({"a": entry(0, 4, dtype=["U8"])}, b"1234"), "dtype"),
    "a negative shape": (raw({"a": entry(0, 4, [-4])}, b"1234"), "shape"),
    "a shape of true": (raw({"a": entry(0, 1, [True])}, b"1"), "shape"),
    "an absurd shape": (raw({"a": entry(0, 4, [2**60, 2**60])}, b"1234"), "takes"),
    "offsets backwards": (raw({"a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}}, b"1234"), "span"),
    "three offsets": (raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"1"), "offsets"),
    "overlap": (raw({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "overlap"),
    "a hole": (raw({"a": entry(0, 2), "b": entry(4, 6)}, b"123456"), "belong to no tensor"),
    "bytes after the end": (raw({"a": entry(0, 2)}, b"123456"), "belong to no tensor"),
    "out of range": (raw({"a": entry(0, 2), "b": entry(2, 2_000_000)}, b"12"), "truncated"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_with_the_file(case: str, tmp_path: Path) -> None:
    content, says = DAMAGE[case]
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        SafetensorsFiles(tmp_path)
    assert FILE in caught.value.problem and caught.value.remedy


@settings(max_examples=150)
@given(cut=st.integers(0, 300), position=st.integers(0, 300), byte=st.integers(0, 255))
def test_no_damaged_byte_escapes_as_another_error(tmp_path_factory: pytest.TempPathFactory, cut: int, position: int, byte: int) -> None:
    path = tmp_path_factory.mktemp("fuzz") / FILE
    save_file({"a": torch.arange(10), "b": torch.ones(3, 4)}, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(bytes(content[: len(content) - cut % len(content)]))
    try:
        files = SafetensorsFiles(path.parent)
        for name in files.names():
            files.get(name)
    except FewbitError as error:
        assert str(path) in error.problem


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / FILE)
    files = SafetensorsFiles(tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="ends within tensor 'a'"):
        files.get("a")


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "../evil.safetensors"}, "inside the directory"),
        ({"a": "/etc/evil.safetensors"}, "inside the directory"),
        ({"a": "sub/../../evil.safetensors"}, "inside the directory"),
        ({"a": "..\\evil.safetensors"}, "inside the directory"),
        ({"a": "model.bin"}, "inside the directory"),
        ({"a": "one.safetensors", "b": "gone.safetensors"}, "missing"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, "'c'"),
        ({"a": 3}, "weight_map"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(weight_map: Any, says: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for place in (tmp_path / "evil.safetensors", directory / "one.safetensors", directory / "other.safetensors"):
        save_file({"a": torch.ones(1)}, place)
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=says) as caught:
        SafetensorsFiles(directory)
    assert INDEX_NAME in caught.value.problem


def test_the_index_decides_between_two_copies_of_a_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}))
    assert SafetensorsFiles(tmp_path).get("a") == 1


def test_directories_without_safetensors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        SafetensorsFiles(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match="no safetensors weights"):
        SafetensorsFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelNotFoundError, match=r"pickle \(pytorch_model.bin\).*safetensors only.*save_pretrained"):
        SafetensorsFiles(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        SafetensorsFiles(tmp_path / "config.json")
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        SafetensorsFiles(tmp_path)


def test_a_tensor_twice_is_a_bug(tmp_path: Path) -> None:
    write_tensors(tmp_path / FILE, {"a": torch.ones(1)})
    entry = read_header(tmp_path / FILE)["a"]
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="'a'"):
        copy_into_shards(tmp_path / "out", [("a", entry), ("a", entry)])
    assert not list((tmp_path / "out").iterdir())
