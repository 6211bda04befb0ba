"""Folding a scale into neighbours leaves outputs as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit.errors import FormatError
from fewbit.methods.folding import divide_norm, divide_rows, multiply_columns, representable, shared

SEEDS = st.integers(0, 2**16)


def random(*shape: int, seed: int, spread: float = 0.0) -> torch.Tensor:
    """Normal numbers, or positive ones exp(spread * normal)."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (torch.exp(spread * x) if spread else x).float()


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return float((left.double() - right.double()).norm()) <= tolerance * float(right.double().norm())


@given(seed=SEEDS, offset=st.sampled_from([0.0, 1.0]), with_bias=st.booleans())
def test_norm_to_linear(seed: int, offset: float, with_bias: bool) -> None:
    x, gain, bias, scale = (
        random(9, 24, seed=seed),
        random(24, seed=seed + 1),
        random(24, seed=seed + 2),
        random(24, seed=seed + 3, spread=2.0),
    )
    weight = random(7, 24, seed=seed + 4)

    def norm(g: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * (offset + g)
        return normalized if b is None else normalized + b

    before = norm(gain, bias if with_bias else None) @ weight.T
    new_gain, new_bias = divide_norm(gain, bias if with_bias else None, scale, offset=offset)
    assert close(norm(new_gain, new_bias) @ multiply_columns(weight, scale).T, before)
    assert (new_bias is None) != with_bias


@given(seed=SEEDS, with_bias=st.booleans())
def test_gated_pair(seed: int, with_bias: bool) -> None:
    """up_proj, the last half of a fused gate_up_proj, to down_proj."""
    x, fused, bias = random(5, 8, seed=seed), random(24, 8, seed=seed + 1), random(24, seed=seed + 2) if with_bias else None
    down, scale = random(6, 12, seed=seed + 3), random(12, seed=seed + 4, spread=2.0)

    def mlp(gate_up: torch.Tensor, c: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        gate, up = torch.nn.functional.linear(x, gate_up, c).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ out.T

    before = mlp(fused, bias, down)
    new_fused, new_bias = divide_rows(fused, bias, scale, torch.arange(12, 24))
    assert torch.equal(new_fused[:12], fused[:12])
    assert close(mlp(new_fused, new_bias, multiply_columns(down, scale)), before)


@given(seed=SEEDS)
def test_relu_pair(seed: int) -> None:
    x, first, bias, second = random(5, 8, seed=seed), random(12, 8, seed=seed + 1), random(12, seed=seed + 2), random(6, 12, seed=seed + 3)
    scale = random(12, seed=seed + 4, spread=2.0)
    before = torch.relu(x @ first.T + bias) @ second.T
    new_first, new_bias = divide_rows(first, bias, scale)
    assert new_bias is not None
    assert close(torch.relu(x @ new_first.T + new_bias) @ multiply_columns(second, scale).T, before)


@given(seed=SEEDS, kv_heads=st.sampled_from([1, 2, 4]))
def test_grouped_query_pair(seed: int, kv_heads: int) -> None:
    """v_proj to o_proj: four query heads of three channels share `kv_heads` key-value heads."""
    heads, size, tokens = 4, 3, 6
    x, value = random(tokens, 8, seed=seed), random(kv_heads * size, 8, seed=seed + 1)
    out, mixing = random(5, heads * size, seed=seed + 2), random(heads, tokens, tokens, seed=seed + 3).softmax(-1)
    head = torch.arange(heads).repeat_interleave(size)
    channels = (head // (heads // kv_heads)) * size + torch.arange(heads * size) % size

    def attention(v: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        per_head = (x @ v.T).view(tokens, kv_heads, size).transpose(0, 1).repeat_interleave(heads // kv_heads, dim=0)
        return (mixing @ per_head).transpose(0, 1).reshape(tokens, -1) @ o.T

    wanted = random(heads * size, seed=seed + 4, spread=1.0)
    scale = shared(wanted, channels, kv_heads * size)
    assert bool((scale[channels] >= wanted).all())
    before = attention(value, out)
    assert close(attention(divide_rows(value, None, scale)[0], multiply_columns(out, scale[channels])), before)


@given(seed=SEEDS, offset=st.sampled_from([0.0, 1.0]))
def test_representable_scales_divide_bf16_gains_without_rounding(seed: int, offset: float) -> None:
    gain = random(64, seed=seed).abs().bfloat16()
    gain[:2] = -offset  # nothing passes
    wanted = random(64, seed=seed + 1, spread=1.0)
    scale = representable(gain, wanted, offset=offset)
    divided, _ = divide_norm(gain, None, scale, offset=offset)
    assert bool((scale[:2] == 1).all())
    assert close((divided.float() + offset) * scale, gain.float() + offset, 1e-6)
    assert bool(((scale / wanted - 1).abs()[2:] < 2**-7).all() if offset == 0 else (scale > 0).all())


def test_scales_that_are_none() -> None:
    gain, weight = torch.ones(4), torch.ones(3, 4)
    for bad in (torch.tensor([1.0, 2.0, 0.0, 1.0]), torch.tensor([1.0, float("nan"), 1.0, 1.0]), torch.ones(5)):
        for fold in (
            lambda s=bad: divide_norm(gain, None, s),
            lambda s=bad: multiply_columns(weight, s),
            lambda s=bad: divide_rows(weight, None, s),
        ):
            with pytest.raises(FormatError):
                fold()
