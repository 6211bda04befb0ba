"""Hidden states of many windows, in memory while they fit a budget and in plain files when they do not.

Between two blocks a walk holds the hidden states of every calibration window: 128 windows of 512 tokens take 1 GiB at a width of 4,096, and
twice that when a reference path is carried along. Windows are read and written one at a time with plain reads and writes into a file of
equal records. Nothing is mapped: touched pages of a mapping count as resident memory, and the peak would be that of the whole file.

A window's output may replace its input: blocks treat windows independently. What a killed run leaves in such files is not used again; a
resumed walk computes the hidden states anew from the blocks that are finished.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["ActivationStore", "MemoryBudget"]


class MemoryBudget:
    """Bytes that activations may take in memory.

    Args:
        total_bytes: of all stores together.
        directory: where the files of those that do not fit are put; it exists.
    """

    def __init__(self, total_bytes: int, directory: Path) -> None:
        self.total_bytes, self.directory = total_bytes, directory
        self.used_bytes = 0
        self._files = 0

    def take(self, nbytes: int) -> bool:
        """Reserve memory; False when the budget has not so much left."""
        if self.used_bytes + nbytes > self.total_bytes:
            return False
        self.used_bytes += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """Return what was reserved."""
        self.used_bytes -= nbytes

    def new_file(self) -> Path:
        """A path for one more store."""
        self._files += 1
        return self.directory / f"activations-{self._files}.bin"


class ActivationStore:
    """`count` windows of hidden states [1, T, width], each written before it is read.

    Args:
        count, length, width: windows, tokens of each, features.
        dtype: of the hidden states.
        budget: decides, once for the whole store, between memory and a file.

    Raises:
        OSError: the file cannot be made or the disk is full.
    """

    def __init__(self, count: int, length: int, width: int, dtype: torch.dtype, budget: MemoryBudget) -> None:
        self.count, self.length, self.width, self.dtype = count, length, width, dtype
        self._record = length * width * dtype.itemsize
        self._budget = budget
        self._memory: list[torch.Tensor | None] | None = [None] * count if budget.take(count * self._record) else None
        self._path = None if self._memory is not None else budget.new_file()
        self._file = None if self._path is None else os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    @property
    def on_disk(self) -> bool:
        """Whether the windows are in a file."""
        return self._file is not None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        """[1, T, width]; do not change it in place."""
        if self._memory is not None:
            held = self._memory[index]
            assert held is not None, f"window {index} is read before it was written"
            return held
        assert self._file is not None
        raw = torch.empty(self._record, dtype=torch.uint8)
        view, done = raw.numpy().data, 0
        while done < self._record:
            read = os.preadv(self._file, [view[done:]], index * self._record + done)
            if read == 0:
                raise OSError(f"the activations' file '{self._path}' is shorter than it should be")
            done += read
        return raw.view(self.dtype).view(1, self.length, self.width)

    def __setitem__(self, index: int, hidden: torch.Tensor) -> None:
        value = hidden.detach().to(self.dtype).reshape(1, self.length, self.width)
        if self._memory is not None:
            # A view would keep alive whatever it is a view of.
            self._memory[index] = value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
            return
        assert self._file is not None
        view, done = value.contiguous().view(-1).view(torch.uint8).numpy().data, 0
        while done < self._record:
            done += os.pwrite(self._file, view[done:], index * self._record + done)

    def close(self) -> None:
        """Give memory or file back."""
        if self._memory is not None:
            self._memory = None
            self._budget.give_back(self.count * self._record)
        if self._file is not None:
            os.close(self._file)
            self._file = None
            assert self._path is not None
            self._path.unlink(missing_ok=True)
