"""Writing a checkpoint so that its directory either is whole or does not exist.

All work happens in `DIR.partial/`; a rename, which a file system does at once or not at all, makes it `DIR`. A run that is killed leaves
`DIR.partial/` behind and nothing else, and the next run starts over.

`ShardWriter` keeps one tensor in memory at a time. A safetensors file begins with a header that lists all of its tensors, so a shard's
bytes go to a scratch file first; when the shard is full, the header and then the tensors are copied together, widest dtype first as the
safetensors library does, so that each tensor is aligned for readers that map the file.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from fewbit.checkpoints.safetensors_files import DTYPE_NAMES, INDEX_NAME, SINGLE_FILE_NAME
from fewbit.errors import OutputError

__all__ = ["MAX_SHARD_BYTES", "ShardWriter", "output_directory"]

MAX_SHARD_BYTES = 2 * 10**9
_NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPE_NAMES.items()}
_REMEDIES = {
    errno.ENOSPC: "free some space, or name a directory on another disk",
    errno.EDQUOT: "free some of your quota, or name a directory on another disk",
    errno.EROFS: "the file system is read-only: name a directory elsewhere",
    errno.EACCES: "name a directory that you may write to",
    errno.EPERM: "name a directory that you may write to",
    errno.ENOTDIR: "a part of the path is a file: name another directory",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def output_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into that becomes `path` when the block ends without an error, and disappears when it does not.

    Args:
        path: the directory to make.
        overwrite: replace an existing checkpoint; it stays in place until the new one is whole.

    Yields:
        `path` with `.partial` appended, empty.

    Raises:
        OutputError: `path` is a file, or a directory with something in it that may not be replaced; or the system refuses a write.
    """
    target = Path(path).absolute()
    if not target.name:
        raise OutputError(f"'{target}' cannot be replaced", "name a directory")
    partial = target.with_name(f"{target.name}.partial")
    with _translated(target):
        _check_target(target, overwrite)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    try:
        with _translated(target):
            yield partial
            _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"'{target}' is a file", "name a directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"'{target}' exists and is not empty", "name another directory, or allow to overwrite it")
    if not (target / "config.json").is_file():
        raise OutputError(f"'{target}' holds something else than a checkpoint (no config.json)", "name another directory")


def _put_in_place(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    replaced = target.with_name(f"{target.name}.replaced")
    target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        replaced.rename(target)
        raise
    shutil.rmtree(replaced)


@contextmanager
def _translated(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the disk and the directory's permissions")
        raise OutputError(f"cannot write '{target}': {error.strerror or error}", remedy) from error


@dataclass(frozen=True)
class _Pending:
    """A tensor in the scratch file of the open shard."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class ShardWriter:
    """Writes tensors, one after the other, into `model.safetensors` or into shards with an index.

    Use it as a context manager; the files have their final names only after a block that ended without an error.

    Args:
        directory: exists.
        max_shard_bytes: a shard is closed before it would exceed this; a single larger tensor gets a shard of its own.

    Raises:
        OutputError: a tensor twice.
        OSError: the system refuses a write (`output_directory` explains it).
    """

    def __init__(self, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._scratch: BufferedWriter | None = None
        self._pending: list[_Pending] = []
        self._pending_bytes = 0
        self._shards: list[list[_Pending]] = []
        self._names: set[str] = set()
        self.total_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        elif self._scratch is not None:
            self._scratch.close()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; nothing of it stays in memory."""
        if name in self._names:
            raise OutputError(f"tensor '{name}' is written twice")
        self._names.add(name)
        whole = tensor.detach().cpu().contiguous()
        # as_strided, because a dimension of one element keeps an odd stride even when the tensor counts as contiguous
        raw = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy()
        if self._pending and self._pending_bytes + raw.nbytes > self._max_shard_bytes:
            self._close_shard()
        if self._scratch is None:
            self._scratch = self._scratch_path.open("wb")
        self._scratch.write(raw.data)
        self._pending.append(_Pending(name, tensor.dtype, tuple(tensor.shape), self._pending_bytes, raw.nbytes))
        self._pending_bytes += raw.nbytes
        self.total_bytes += raw.nbytes

    def add_all(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write several tensors."""
        for name, tensor in tensors.items():
            self.add(name, tensor)

    @property
    def _scratch_path(self) -> Path:
        return self._directory / "shard.data"

    def _unnumbered(self, number: int) -> Path:
        """A shard's path while the number of shards is not known."""
        return self._directory / f"model-{number:05d}.safetensors"

    def _close_shard(self) -> None:
        assert self._scratch is not None
        self._scratch.close()
        ordered = sorted(self._pending, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
        with self._unnumbered(len(self._shards) + 1).open("wb") as out, self._scratch_path.open("rb") as scratch:
            out.write(_header(ordered))
            for tensor in ordered:
                scratch.seek(tensor.offset)
                remaining = tensor.nbytes
                while remaining:
                    remaining -= out.write(scratch.read(min(remaining, 2**20)))
        self._scratch_path.unlink()
        self._shards.append(ordered)
        self._scratch, self._pending, self._pending_bytes = None, [], 0

    def _finish(self) -> None:
        if self._pending or not self._shards:
            if self._scratch is None:
                self._scratch = self._scratch_path.open("wb")
            self._close_shard()
        if len(self._shards) == 1:
            self._unnumbered(1).rename(self._directory / SINGLE_FILE_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            self._unnumbered(number).rename(self._directory / final)
            weight_map |= {tensor.name: final for tensor in shard}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(tensors: list[_Pending]) -> bytes:
    """Length and JSON header of a shard that holds `tensors` in this order, padded with spaces to 8 bytes."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        fields[tensor.name] = {"dtype": _NAME_OF_DTYPE[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
