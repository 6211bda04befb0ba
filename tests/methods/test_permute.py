"""A matrix transposed with its columns reordered: the extension against torch, and the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit.formats import native
from fewbit.methods import permute
from fewbit.methods.permute import gather_transposed, scatter_transposed

SIZES = st.tuples(st.integers(1, 90), st.integers(1, 70))


@pytest.mark.parametrize("extension", [True, False], ids=["extension", "torch"])
@given(size=SIZES, seed=st.integers(0, 999))
def test_gathered_and_scattered(extension: bool, size: tuple[int, int], seed: int) -> None:
    if extension and native.native_extension() is None:
        pytest.skip("the native extension is missing")
    with pytest.MonkeyPatch.context() as patch:
        if not extension:
            patch.setattr(permute, "native_extension", lambda: None)
        rows, columns = size
        generator = torch.Generator().manual_seed(seed)
        source = torch.randn(rows, columns, generator=generator)
        order = torch.randperm(columns, generator=generator)
        chosen = torch.randint(rows, (rows + 3,), generator=generator)
        assert torch.equal(gather_transposed(source, order, chosen), source[chosen][:, order].T)
        turned = gather_transposed(source, order)
        assert torch.equal(turned, source[:, order].T)
        start = seed % rows
        assert torch.equal(scatter_transposed(turned, slice(start, rows), order), source[start:])


@pytest.mark.skipif(native.native_extension() is None, reason="the native extension is missing")
def test_an_index_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        gather_transposed(torch.zeros(3, 4), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="outside"):
        scatter_transposed(torch.zeros(2, 3), slice(0, 3), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="fit"):
        scatter_transposed(torch.zeros(2, 3), slice(2, 4), torch.tensor([0, 1]))
