"""Writing safetensors: one small file at once, and a whole checkpoint out of tensors that lie on disk already.

A safetensors file begins with a header that lists all of its tensors (`checkpoints.safetensors_files`), widest dtype first as the
safetensors library does, so that each tensor is aligned for readers that map the file.

A checkpoint is put together from pieces: tensors of the source that stay as they are, and those of files that hold finished work.
Where each lies and how long it is stands in the headers, so shards are planned first and then filled by copying bytes; no tensor is
decoded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path

import torch

from fewbit.checkpoints.safetensors_files import DTYPE_NAMES, INDEX_NAME, SINGLE_FILE_NAME, TensorEntry
from fewbit.errors import OutputError

__all__ = ["MAX_SHARD_BYTES", "copy_into_shards", "write_atomically", "write_tensors"]

MAX_SHARD_BYTES = 2 * 10**9
_PIECE_BYTES = 2**22
_NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPE_NAMES.items()}
_Header = Sequence[tuple[str, torch.dtype, Sequence[int], int]]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file, atomically: it is whole or absent whenever the process ends.

    Raises:
        OSError: the system refuses the write.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    ordered = sorted(plain, key=lambda name: (-plain[name].dtype.itemsize, name))
    with _appearing(path) as file:
        file.write(_header([(name, plain[name].dtype, plain[name].shape, plain[name].nbytes) for name in ordered]))
        for name in ordered:
            tensor = plain[name]
            # as_strided, because a dimension of one element keeps an odd stride even when the tensor counts as contiguous
            file.write(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is whole or absent whenever the process ends.

    Raises:
        OSError: the system refuses the write.
    """
    with _appearing(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def _appearing(path: Path) -> Iterator[BufferedWriter]:
    """A file that gets its name when all of it is on the disk; nothing of it is left when the block fails."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def copy_into_shards(
    directory: Path,
    pieces: Sequence[tuple[str, TensorEntry]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write `model.safetensors`, or shards with an index, out of tensors that lie in other safetensors files.

    Args:
        directory: exists.
        pieces: name and place of each tensor, in the order in which shards are filled.
        max_shard_bytes: a shard is closed before it would exceed this; a single larger tensor gets a shard of its own.
        metadata: what every file's header says besides the tensors.

    Returns:
        Bytes of all tensors.

    Raises:
        OutputError: a tensor twice.
        OSError: the system refuses a read or a write.
    """
    names = [name for name, _ in pieces]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) != len(names) else None
    if twice is not None:
        raise OutputError(f"tensor '{twice}' is written twice", "this is a bug in fewbit: please report it")
    shards: list[list[tuple[str, TensorEntry]]] = [[]]
    filled = 0
    for name, entry in pieces:
        if shards[-1] and filled + entry.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, entry))
        filled += entry.nbytes
    total = sum(entry.nbytes for _, entry in pieces)
    if len(shards) == 1:
        _fill(directory / SINGLE_FILE_NAME, shards[0], metadata)
        return total
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _fill(directory / file, shard, metadata)
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _fill(path: Path, shard: Sequence[tuple[str, TensorEntry]], metadata: Mapping[str, str] | None = None) -> None:
    ordered = sorted(shard, key=lambda piece: (-piece[1].dtype.itemsize, piece[0]))
    with path.open("wb") as out:
        out.write(_header([(name, entry.dtype, entry.shape, entry.nbytes) for name, entry in ordered], metadata))
        for _, entry in ordered:
            with entry.file.open("rb") as file:
                file.seek(entry.offset)
                remaining = entry.nbytes
                while remaining:
                    piece = file.read(min(remaining, _PIECE_BYTES))
                    if not piece:
                        raise OSError(f"'{entry.file}' has become shorter while it was read")
                    out.write(piece)
                    remaining -= len(piece)


def _header(tensors: _Header, metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON header of a file that holds `tensors` in this order, padded with spaces to 8 bytes."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        fields[name] = {"dtype": _NAME_OF_DTYPE[dtype], "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
