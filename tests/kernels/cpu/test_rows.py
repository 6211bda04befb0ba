"""The loops over one row of activations: every instruction set gives the portable one's bits."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fewbit import _native

SETS = [name for name in _native.rows.instruction_sets() if name != "portable"]
LENGTHS = st.integers(1, 200)


def values(length: int, seed: int, special: bool) -> torch.Tensor:
    x = torch.randn(length, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 60 - 30)
    if special:
        x[seed % length] = (float("nan"), float("inf"), -float("inf"), 0.0, 1e-44)[seed % 5]
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32) if a.dtype == torch.float32 else a, b.view(torch.int32) if b.dtype == torch.float32 else b)


@pytest.mark.parametrize("name", SETS)
@given(LENGTHS, st.integers(0, 40), st.integers(0, 999), st.booleans(), st.sampled_from([0.0, 0.01, 1e-38]))
@settings(max_examples=200, deadline=None)
def test_quantize(name, length, padding, seed, special, static):
    x = values(length, seed, special)
    answers, codes = [], []
    for each in (name, "portable"):
        codes.append(torch.full((length + padding,), 77, dtype=torch.int8))
        scale, total = _native.rows.quantize(each, x, 127.0, static, codes[-1])
        answers.append((torch.tensor(scale), total))
    assert torch.equal(*codes)
    assert answers[0][1] == answers[1][1] == int(codes[0].int().sum())
    assert torch.equal(answers[0][0].isnan(), answers[1][0].isnan()) and torch.equal(answers[0][0].nan_to_num(), answers[1][0].nan_to_num())


def test_quantize_is_the_definition():
    x = torch.tensor([0.5, -2.0, 1.0, 127.0, 1.5, 2.5])
    codes = torch.empty(8, dtype=torch.int8)
    for name in _native.rows.instruction_sets():
        assert _native.rows.quantize(name, x, 127.0, 0.0, codes) == (1.0, 130)
        assert codes.tolist() == [0, -2, 1, 127, 2, 2, 0, 0]
        assert _native.rows.quantize(name, x, 127.0, 0.5, codes)[0] == 0.5
        assert codes.tolist() == [1, -4, 2, 127, 3, 5, 0, 0]


@pytest.mark.parametrize("name", SETS)
@given(LENGTHS, st.integers(0, 999), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_norm(name, length, seed, special, rounded):
    x, weight = values(length, seed, special), torch.randn(length)
    results = [torch.full((length,), 7.0) for _ in range(2)]
    for each, out in zip((name, "portable"), results, strict=True):
        _native.rows.normalize(each, x, weight, 0.37, rounded, out)
    assert same(*results)
    ours, portable = (torch.tensor(_native.rows.sum_of_squares(each, x)) for each in (name, "portable"))
    assert same(ours, portable) or bool(ours.isnan() & portable.isnan())


@pytest.mark.parametrize("name", SETS)
@given(LENGTHS, st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_widen(name, length, seed):
    x = values(length, seed, True).bfloat16()
    out = torch.full((length,), 7.0)
    _native.rows.widen(name, x.view(torch.uint16), out)
    assert same(out, x.float())


def test_unknown_instruction_sets_are_errors():
    with pytest.raises(ValueError, match="no avx1024"):
        _native.rows.sum_of_squares("avx1024", torch.ones(3))
