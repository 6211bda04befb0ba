"""Reading safetensors, one tensor at a time, from one file or from shards with an index.

A safetensors file is

    8 bytes     N, little-endian: length of the header
    N bytes     JSON: {"name": {"dtype": "BF16", "shape": [out, in], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
    the rest    the tensors' bytes; offsets count from here, they neither overlap nor leave holes

and a sharded checkpoint adds `model.safetensors.index.json` with `{"weight_map": {"name": "model-00001-of-00002.safetensors", ...}}`.

A checkpoint comes from strangers, so every header is checked before the first tensor is read: a damaged download fails at once and by
name, not after an hour of quantizing, and no allocation is made on the word of a header that the file's size contradicts.

Why not map the file: pages of a mapping that were touched once count as resident memory until the kernel needs them, and the peak of a
run that streams through a model would look like the whole model. So a tensor's bytes are read straight into the tensor that is handed out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import torch

from fewbit.errors import CheckpointError, ModelNotFoundError

__all__ = ["DTYPE_NAMES", "INDEX_NAME", "SINGLE_FILE_NAME", "SafetensorsFiles", "TensorEntry", "read_header"]

SINGLE_FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPE_NAMES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}

_MAX_JSON_BYTES = 100_000_000  # the safetensors library's own limit on a header
_PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_DOWNLOAD_AGAIN = "download or copy the file again and compare its size with the source's"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        file: the safetensors file.
        dtype, shape: as the header says.
        offset: first byte, counted from the start of the file.
        nbytes: length; equals the elements' bytes.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFiles:
    """The tensors of a Hugging Face directory, read lazily.

    Args:
        directory: holds `model.safetensors`, or shards with `model.safetensors.index.json`, or a single file `*.safetensors`; or is such a
            file itself.

    Raises:
        ModelNotFoundError: no such directory, or no weights in it (pickle files are not weights: fewbit never unpickles).
        CheckpointError: a header or the index is damaged, contradicts the files, or points outside the directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        is_file = self.directory.suffix == ".safetensors" and self.directory.is_file()
        index, self._files = ({}, (self.directory,)) if is_file else _find_files(self.directory)
        self._entries: dict[str, TensorEntry] = {}
        for file in self._files:
            for name, entry in read_header(file).items():
                if index.get(name, file) != file:
                    continue  # a stale copy: the index says that another shard holds this tensor
                if name in self._entries:
                    raise CheckpointError(
                        f"tensor '{name}' is in both '{self._entries[name].file.name}' and '{file.name}' of '{self.directory}'",
                        f"remove the stale shard, or name the right one in {INDEX_NAME}",
                    )
                self._entries[name] = entry
        for name, file in index.items():
            if name not in self._entries:
                raise CheckpointError(
                    f"'{self.directory / INDEX_NAME}' says that tensor '{name}' is in '{file.name}', which does not hold it",
                    "the index and the shards are of different checkpoints: download all of them again",
                )

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in the order of their names."""
        return self._files

    @property
    def total_bytes(self) -> int:
        """Bytes of the weight files on disk, headers included."""
        return sum(file.stat().st_size for file in self._files)

    def names(self) -> list[str]:
        """The tensors' names, file after file, within a file in the order of their bytes (the order that reads fastest)."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype, from the header."""
        return self._entry(name).dtype

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor lies."""
        return self._entry(name)

    def nbytes(self, name: str) -> int:
        """The tensor's bytes on disk."""
        return self._entry(name).nbytes

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor. The file is open only meanwhile, and the tensor owns its memory.

        Returns:
            The tensor in the shape and dtype that the file has, on the CPU.

        Raises:
            CheckpointError: no tensor of that name, or the file got shorter since its header was read.
        """
        entry = self._entry(name)
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        if entry.nbytes:
            with _opened(entry.file) as file:
                file.seek(entry.offset)
                if file.readinto(raw.numpy().data) != entry.nbytes:
                    raise CheckpointError(f"'{entry.file}' ends within tensor '{name}'", _DOWNLOAD_AGAIN)
        return raw.view(entry.dtype).reshape(entry.shape)

    def sha256(self) -> str:
        """SHA-256 over the weight files' contents in the order of their names, in hexadecimal. Reads every byte, in pieces of 1 MiB."""
        digest = hashlib.sha256()
        for path in self._files:
            with _opened(path) as file:
                while piece := file.read(2**20):
                    digest.update(piece)
        return digest.hexdigest()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def _entry(self, name: str) -> TensorEntry:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"no tensor '{name}' in '{self.directory}' ({len(self._entries)} others)", "the weights belong to another architecture"
            )
        return entry


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The checked header of one safetensors file.

    Returns:
        Name to entry, in the order of the tensors' bytes.

    Raises:
        CheckpointError: the header is no safetensors header, or contradicts itself or the file's size.
    """
    with _opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            raise CheckpointError(f"'{file}' is truncated: {size} bytes, not even a safetensors header", _DOWNLOAD_AGAIN)
        if length > min(size - 8, _MAX_JSON_BYTES):
            what = f"its header claims {length} bytes and the file has {size}"
            raise CheckpointError(f"'{file}' is truncated or no safetensors file: {what}", _DOWNLOAD_AGAIN)
        header = _parse_json(stream.read(length), file)
    header.pop("__metadata__", None)
    entries = {name: _entry_of(name, fields, file, data_start=8 + length) for name, fields in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_layout(ordered, file, data_start=8 + length, size=size)
    return ordered


def _entry_of(name: str, fields: object, file: Path, data_start: int) -> TensorEntry:
    if not isinstance(fields, dict):
        raise _bad_header(file, f"tensor '{name}' has no dtype, shape and offsets")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_NAMES:
        raise _bad_header(file, f"tensor '{name}' has the unknown dtype {dtype!r}")
    if not _are_counts(shape):
        raise _bad_header(file, f"tensor '{name}' has the impossible shape {shape!r}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _bad_header(file, f"tensor '{name}' has the impossible offsets {offsets!r}")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPE_NAMES[dtype].itemsize
    if end - begin != nbytes:
        raise _bad_header(file, f"tensor '{name}' of shape {shape} in {dtype} takes {nbytes} bytes, its offsets span {end - begin}")
    return TensorEntry(file, DTYPE_NAMES[dtype], tuple(shape), data_start + begin, nbytes)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of non-negative integers (JSON's true is an int in Python, hence the exact type)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(entries: Mapping[str, TensorEntry], file: Path, data_start: int, size: int) -> None:
    """The tensors must fill the file exactly: no overlap, no hole, nothing beyond its end."""
    position, previous = data_start, ""
    for name, entry in entries.items():
        if entry.offset < position:
            raise _bad_header(file, f"tensors '{previous}' and '{name}' overlap")
        if entry.offset > position:
            raise _bad_header(file, f"{entry.offset - position} bytes before tensor '{name}' belong to no tensor")
        position, previous = entry.offset + entry.nbytes, name
    if position > size:
        raise CheckpointError(f"'{file}' is truncated: {size} bytes where its header says {position}", _DOWNLOAD_AGAIN)
    if position < size:
        raise _bad_header(file, f"{size - position} bytes after the last tensor belong to no tensor")


def _find_files(directory: Path) -> tuple[dict[str, Path], tuple[Path, ...]]:
    """The index (empty without one) and the weight files of a directory."""
    if not directory.is_dir():
        what = "is a file, not a directory" if directory.exists() else "does not exist"
        raise ModelNotFoundError(f"'{directory}' {what}", "give a directory with config.json and *.safetensors files")
    if (directory / SINGLE_FILE_NAME).is_file():
        return {}, (directory / SINGLE_FILE_NAME,)
    if (directory / INDEX_NAME).is_file():
        index = _read_index(directory)
        return index, tuple(sorted(set(index.values())))
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return {}, (files[0],)
    if files:
        raise CheckpointError(
            f"'{directory}' has {len(files)} safetensors files and no {INDEX_NAME} that says which tensor is where",
            "download the index too",
        )
    pickles = sorted({file.name for pattern in _PICKLE_PATTERNS for file in directory.glob(pattern)})
    if pickles:
        raise ModelNotFoundError(
            f"'{directory}' has its weights only as pickle ({pickles[0]}), which can run code when opened; fewbit reads safetensors only",
            "in a place you trust, load the model with transformers and save_pretrained() it, which writes safetensors",
        )
    raise ModelNotFoundError(f"no safetensors weights in '{directory}'", f"expected {SINGLE_FILE_NAME}, or shards with {INDEX_NAME}")


def _read_index(directory: Path) -> dict[str, Path]:
    path = directory / INDEX_NAME
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise CheckpointError(f"'{path}' has {path.stat().st_size} bytes, too many for an index", "download the index again")
    with _opened(path) as stream:
        weight_map = _parse_json(stream.read(), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"'{path}' has no weight_map from tensor names to file names", "download the index again")
    for name in sorted(set(weight_map.values())):
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name or relative.suffix != ".safetensors":
            raise CheckpointError(
                f"'{path}' names the shard {name!r}, which is no safetensors file inside the directory",
                "do not trust this checkpoint; download it from its publisher",
            )
        if not (directory / relative).is_file():
            raise CheckpointError(f"'{path}' names the shard '{name}', which is missing", "download the missing shard")
    return {tensor: directory / name for tensor, name in weight_map.items()}


def _parse_json(raw: bytes, file: Path) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("the same name twice")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad_header(file, f"no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise _bad_header(file, f"a JSON {type(value).__name__} where an object belongs")
    return value


def _bad_header(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"'{file}' is corrupt: {what}", _DOWNLOAD_AGAIN)


def _opened(file: Path) -> BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read '{file}': {error.strerror}", "check the file's permissions") from error
