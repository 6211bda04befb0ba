"""Reading a GGUF file's header, and its tensors one at a time.

    4 bytes     GGUF
    u32         version, 2 or 3
    u64, u64    number of tensors, number of metadata fields
    fields      key: string, type: u32, value; a string is u64 length and UTF-8; an array is u32 type, u64 count, values
    tensors     name: string, dimensions: u32, sizes: u64 each (the one that varies fastest first), type: u32, offset: u64
    padding     to `general.alignment` (32 where it is not said)
    data        offsets count from here

A file comes from strangers. Every count and length is compared with what is left of the file before anything is allocated, arrays and names
have bounds of their own, and the tensors' places are checked against the file's length and each other: so a header that lies costs neither
memory nor time, and a damaged download fails at once. That is why the gguf library's own reader is not used here: it believes the counts.

Blocks and what they hold: `checkpoints.gguf_blocks`. The names of tensors and fields: `checkpoints.gguf_models`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fewbit.errors import CheckpointError, ModelNotFoundError

__all__ = ["GgufFile", "GgufTensor", "gguf_path"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS: Mapping[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_NAME, _MAX_STRING, _MAX_ARRAY = 1024, 1 << 26, 1 << 22
_MAX_HEADER = 1 << 29
_MAX_ELEMENTS = 1 << 44
_DOWNLOAD_AGAIN = "download or copy the file again and compare its size with the source's"


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
        type: how its numbers are stored.
        shape: as torch says it, the size that varies fastest last.
        offset: first byte, counted from the start of the file.
        nbytes: its length.
    """

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """A GGUF file, its header read and checked.

    Args:
        path: the file.

    Attributes:
        path: the file.
        fields: the metadata: numbers, booleans, strings, lists of them.
        tensors: by name, in the order of the header.

    Raises:
        ModelNotFoundError: no such file.
        CheckpointError: it is no GGUF file, is damaged, or says what cannot be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelNotFoundError(f"there is no file '{path}'", "name a GGUF file")
        try:
            with self.path.open("rb") as stream:
                cursor = _Cursor(stream, self.path)
                self.fields, self.tensors = _read(cursor)
        except OSError as error:
            raise CheckpointError(f"cannot read '{path}': {error.strerror}", "check the file's permissions") from error
        if int(self.fields.get("split.count", 1) or 1) > 1:
            raise CheckpointError(f"'{path}' is one part of {self.fields['split.count']}", "join them: llama-gguf-split --merge")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def get(self, name: str) -> torch.Tensor:
        """The bytes of one tensor as they are stored: uint8 [nbytes], in memory of its own.

        Raises:
            CheckpointError: no such tensor, or the file got shorter since its header was read.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"there is no tensor '{name}' in '{self.path}'")
        raw = torch.empty(tensor.nbytes, dtype=torch.uint8)
        with self.path.open("rb") as stream:
            stream.seek(tensor.offset)
            if stream.readinto(raw.numpy().data) != tensor.nbytes:
                raise CheckpointError(f"'{self.path}' ends within tensor '{name}'", _DOWNLOAD_AGAIN)
        return raw

    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def text(self, key: str) -> str | None:
        """A field that is a string; None when it is missing or something else."""
        value = self.fields.get(key)
        return value if isinstance(value, str) else None


def gguf_path(path: str | Path) -> Path | None:
    """The GGUF file that a path means: the file itself, or the only one of a directory without config.json; None when it is neither."""
    path = Path(path)
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = [file for file in path.iterdir() if file.suffix.lower() == ".gguf" and file.is_file()]
    return found[0] if len(found) == 1 else None


class _Cursor:
    """A place in the file from which nothing is read that the file does not have."""

    def __init__(self, stream: BufferedReader, path: Path) -> None:
        self._stream, self._path = stream, path
        self.size = path.stat().st_size
        self.at = 0

    def bytes(self, count: int) -> bytes:
        if count > self.size - self.at or self.at + count > _MAX_HEADER:
            raise self.wrong(f"its header asks for {count:,} bytes at {self.at:,} of {self.size:,}")
        data = self._stream.read(count)
        if len(data) != count:
            raise self.wrong("it ends within its header")
        self.at += count
        return data

    def u32(self) -> int:
        return int(struct.unpack("<I", self.bytes(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.bytes(8))[0])

    def count(self, least_bytes: int, what: str) -> int:
        """A number of things that take at least so many bytes each."""
        number = self.u64()
        if number > (self.size - self.at) // least_bytes:
            raise self.wrong(f"it claims {number:,} {what}, more than its {self.size:,} bytes can hold")
        return number

    def text(self, longest: int) -> str:
        length = self.u64()
        if length > longest:
            raise self.wrong(f"it has a string of {length:,} bytes, {longest:,} are the most")
        try:
            return self.bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong("it has a string that is no UTF-8") from error

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"'{self._path}' is no valid GGUF file: {what}", _DOWNLOAD_AGAIN)


def _read(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if cursor.size < 24 or cursor.bytes(4) != _MAGIC:
        raise cursor.wrong("it does not begin with GGUF")
    version = cursor.u32()
    if version not in _VERSIONS:
        hint = ", its bytes are in the other order" if version & 0xFFFF == 0 else ""
        raise cursor.wrong(f"its version is {version}{hint}")
    tensors, fields = cursor.count(24, "tensors"), cursor.count(12, "fields")
    found: dict[str, Any] = {}
    for _ in range(fields):
        key = cursor.text(_MAX_NAME)
        if key in found:
            raise cursor.wrong(f"the field '{key}' is there twice")
        found[key] = _value(cursor, cursor.u32(), key)
    infos = [_info(cursor) for _ in range(tensors)]
    alignment = found.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.wrong(f"its alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return found, _placed(cursor, infos, start, alignment)


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.text(_MAX_STRING)
    if kind == _ARRAY:
        inner, number = cursor.u32(), cursor.u64()
        size = 8 if inner == _STRING else np.dtype(_SCALARS[inner]).itemsize if inner in _SCALARS else 0
        if not size:
            raise cursor.wrong(f"the field '{key}' is an array of the unknown type {inner}")
        if number > _MAX_ARRAY or number * size > cursor.size - cursor.at:
            raise cursor.wrong(f"the field '{key}' claims {number:,} elements")
        if inner == _STRING:
            return [cursor.text(_MAX_STRING) for _ in range(number)]
        values = np.frombuffer(cursor.bytes(number * size), dtype=_SCALARS[inner])
        return (values != 0).tolist() if inner == _BOOL else values.tolist()
    if kind not in _SCALARS:
        raise cursor.wrong(f"the field '{key}' has the unknown type {kind}")
    value = np.frombuffer(cursor.bytes(np.dtype(_SCALARS[kind]).itemsize), dtype=_SCALARS[kind])[0].item()
    return bool(value) if kind == _BOOL else value


def _info(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.text(_MAX_NAME)
    dimensions = cursor.u32()
    if not 1 <= dimensions <= 4:
        raise cursor.wrong(f"tensor '{name}' has {dimensions} dimensions")
    shape = tuple(cursor.u64() for _ in range(dimensions))[::-1]
    if not all(1 <= size <= _MAX_ELEMENTS for size in shape) or prod(shape) > _MAX_ELEMENTS:
        raise cursor.wrong(f"tensor '{name}' has the shape {list(shape)}")
    kind = cursor.u32()
    try:
        stored = GGMLQuantizationType(kind)
    except ValueError as error:
        raise cursor.wrong(f"tensor '{name}' has the unknown type {kind}") from error
    return name, stored, shape, cursor.u64()


def _placed(
    cursor: _Cursor, infos: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]], start: int, alignment: int
) -> dict[str, GgufTensor]:
    """The tensors with their places, which neither overlap nor leave the file."""
    placed: dict[str, GgufTensor] = {}
    for name, stored, shape, offset in infos:
        block, size = GGML_QUANT_SIZES[stored]
        if shape[-1] % block:
            raise cursor.wrong(f"tensor '{name}' has rows of {shape[-1]}, no whole blocks of {block} ({stored.name})")
        nbytes = prod(shape) // block * size
        if offset % alignment or start + offset + nbytes > cursor.size:
            raise cursor.wrong(f"tensor '{name}' lies at {offset:,} with {nbytes:,} bytes, outside of the file or not aligned")
        if name in placed:
            raise cursor.wrong(f"tensor '{name}' is there twice")
        placed[name] = GgufTensor(stored, shape, start + offset, nbytes)
    end = 0
    for name, tensor in sorted(placed.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise cursor.wrong(f"tensor '{name}' overlaps another one")
        end = tensor.offset + tensor.nbytes
    return placed
