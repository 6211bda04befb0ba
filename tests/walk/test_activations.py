"""Hidden states come back as they were put in, from memory and from files, and the budget is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbit.walk.activations import ActivationStore, MemoryBudget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total", [0, 10**9])
def test_windows_come_back(total: int, dtype: torch.dtype, tmp_path: Path) -> None:
    store = ActivationStore(3, 5, 8, dtype, MemoryBudget(total, tmp_path))
    windows = [torch.randn(1, 5, 8).to(dtype) for _ in range(3)]
    for index in (2, 0, 1):
        store[index] = windows[index]
    assert store.on_disk == (total == 0) and len(store) == 3
    assert all(torch.equal(store[index], windows[index]) and store[index].dtype == dtype for index in range(3))
    store[1] = store[1] * 2
    assert torch.equal(store[1], windows[1] * 2) and torch.equal(store[2], windows[2])
    store.close()
    assert not list(tmp_path.iterdir())


def test_a_view_does_not_keep_its_base_alive(tmp_path: Path) -> None:
    store = ActivationStore(1, 4, 8, torch.float32, MemoryBudget(10**6, tmp_path))
    store[0] = torch.randn(1000, 4, 8)[3:4]
    assert store[0].untyped_storage().nbytes() == 4 * 8 * 4


def test_what_does_not_fit_goes_to_disk_and_memory_comes_back(tmp_path: Path) -> None:
    budget = MemoryBudget(1000, tmp_path)
    first, second = (ActivationStore(2, 10, 10, torch.float32, budget) for _ in range(2))
    assert not first.on_disk and second.on_disk and budget.used_bytes == 800
    first.close()
    assert budget.used_bytes == 0 and not ActivationStore(2, 10, 10, torch.float32, budget).on_disk


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    store = ActivationStore(2, 4, 8, torch.float32, MemoryBudget(0, tmp_path))
    store[0] = torch.zeros(1, 4, 8)
    with pytest.raises(OSError, match="shorter"):
        store[1]
