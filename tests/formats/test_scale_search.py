"""The native search for scales against the one in torch, and both against the definition."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from fewbit.formats import scale_search
from fewbit.formats.scale_search import _Native, _Torch
from fewbit.formats.spec import QuantSpec

needs_extension = pytest.mark.skipif(find_spec("fewbit._native") is None, reason="fewbit was installed without a C++ compiler")


def case(num_bits: int, group: int, weighted: bool) -> tuple[torch.Tensor, torch.Tensor, QuantSpec, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(num_bits * 1000 + group)
    rows = torch.randn(19, 4 * group, generator=generator)
    rows[3, :group] = 0.0
    rows[5, 0] = 60.0
    minmax = rows.view(19, 4, group).abs().amax(-1).clamp_min(1e-3) / ((2**num_bits - 1) / 2)
    importance = torch.rand(4 * group, generator=generator) if weighted else None
    return rows, minmax, QuantSpec(num_bits, strategy="group", group_size=group), importance


@needs_extension
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("group", [16, 40, 128, 3])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_native_and_torch_find_equally_good_scales(num_bits: int, group: int, weighted: bool) -> None:
    rows, minmax, spec, importance = case(num_bits, group, weighted)
    native = _Native(rows, minmax.shape, spec, importance)
    plain = _Torch(rows, minmax.shape, spec, importance)
    torch.testing.assert_close(native.error(minmax), plain.error(minmax), rtol=1e-4, atol=1e-6)
    found, expected = native.best(minmax), plain.best(minmax)
    torch.testing.assert_close(plain.error(found), plain.error(expected), rtol=1e-3, atol=1e-6)


@needs_extension
def test_threads_do_not_change_the_numbers() -> None:
    rows, minmax, spec, importance = case(4, 128, True)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(_Native(rows, minmax.shape, spec, importance).best(minmax))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_the_error_is_what_the_name_says(kind: str) -> None:
    if kind == "native" and find_spec("fewbit._native") is None:
        pytest.skip("fewbit was installed without a C++ compiler")
    rows, minmax, spec, importance = case(3, 16, True)
    assert importance is not None
    step = minmax.repeat_interleave(16, 1)
    codes = (rows.double() / step.double()).round().clamp(-4, 3)
    expected = ((codes * step - rows).square() * importance).view(19, 4, 16).sum(-1).float()
    torch.testing.assert_close((_Native if kind == "native" else _Torch)(rows, minmax.shape, spec, importance).error(minmax), expected)


def test_without_the_extension_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, minmax, spec, importance = case(4, 16, False)
    monkeypatch.setattr(scale_search, "native_extension", lambda: None)
    assert isinstance(scale_search.scale_search(rows, minmax.shape, spec, importance), _Torch)
