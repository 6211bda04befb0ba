"""Learned rounding on a block whose linears can make up for each other."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fewbit.errors import FormatError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import SCHEMES, QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.methods.gptq import gptq
from fewbit.methods.learned_rounding import LearnedRounding, LearnedRoundingSettings, learn_rounding
from fewbit.methods.rtn import rtn
from fewbit.methods.statistics import InputStatistics

WIDTH, TOKENS, WINDOWS = 64, 32, 8
INT3 = QuantSpec(3, strategy="group", group_size=32)
QUICK = LearnedRoundingSettings(steps=60, batch=4)


def forward(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return x + torch.nn.functional.silu(x @ weights["gate"].T) * (x @ weights["up"].T) @ weights["down"].T


def setup() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    x = torch.randn(WINDOWS, 1, TOKENS, WIDTH, generator=generator) @ mixing
    weights = {name: torch.randn(WIDTH, WIDTH, generator=generator) * 0.15 for name in ("gate", "up", "down")}
    return weights, x, torch.stack([forward(weights, window) for window in x])


def learn(quantized: Mapping[str, QuantizedTensor], settings: LearnedRoundingSettings = QUICK) -> LearnedRounding:
    weights, x, wanted = setup()
    return learn_rounding(forward, weights, quantized, WINDOWS, lambda i: (x[i], wanted[i]), settings)


def loss(quantized: Mapping[str, QuantizedTensor]) -> float:
    _, x, wanted = setup()
    weights = {name: dequantize(q) for name, q in quantized.items()}
    return sum(float((forward(weights, x[i]) - wanted[i]).square().mean()) for i in range(WINDOWS)) / WINDOWS


@pytest.mark.parametrize("name", ["W4A16-G32", "W2A16-ASYM", "W3A16-ASYM", "NVFP4", "MXFP4", "FP8A16", "W4A16-CHANNEL"])
def test_it_takes_error_off_rounding_to_nearest_in_every_format(name: str) -> None:
    spec = SCHEMES[name].weights
    assert spec is not None
    if spec.group_size == 128:
        spec = QuantSpec(spec.num_bits, strategy="group", group_size=32, symmetric=spec.symmetric)
    weights, _, _ = setup()
    start = {key: rtn(weight, spec) for key, weight in weights.items()}
    result = learn(start)
    assert result.loss_before == pytest.approx(loss(start), rel=1e-3)
    assert result.loss_after == pytest.approx(loss(result.quantized), rel=1e-3)  # what was trained is what is stored
    assert result.loss_after < 0.9 * result.loss_before
    assert 0 < result.changed < 0.5
    assert all(q.spec == spec and q.values.dtype == start[key].values.dtype for key, q in result.quantized.items())


def test_it_never_makes_a_block_worse() -> None:
    weights, x, _ = setup()
    start: dict[str, QuantizedTensor] = {}
    for name, weight in weights.items():
        statistics = InputStatistics(WIDTH, hessian=True)
        statistics.update(x)
        start[name] = gptq([weight], INT3, statistics)[0].quantized
    result = learn(start, LearnedRoundingSettings(steps=8, batch=1, code_rate=0.5, scale_rate=0.3))  # far too fast
    assert result.loss_after <= result.loss_before
    assert loss(result.quantized) <= loss(start) * (1 + 1e-4)


def test_the_same_seed_gives_the_same_codes() -> None:
    weights, _, _ = setup()
    start = {key: rtn(weight, INT3) for key, weight in weights.items()}
    first, second = learn(start), learn(start)
    assert all(torch.equal(first.quantized[name].values, second.quantized[name].values) for name in start)
    assert all(torch.equal(first.quantized[name].scale, second.quantized[name].scale) for name in start)


def test_a_group_index_stays() -> None:
    weights, _, _ = setup()
    g_idx = (torch.arange(WIDTH) % 2).to(torch.int32)
    order = torch.argsort(g_idx, stable=True)
    start = {}
    for name, weight in weights.items():
        q = rtn(weight[:, order], INT3)
        back = torch.argsort(order)
        start[name] = QuantizedTensor(q.values[:, back], q.scale, INT3, None, g_idx)
    result = learn(start)
    assert result.loss_after == pytest.approx(loss(result.quantized), rel=1e-3)
    assert all(torch.equal(q.g_idx, g_idx) for q in result.quantized.values() if q.g_idx is not None)


def test_what_it_refuses() -> None:
    weights, _, _ = setup()
    start = {key: rtn(weight, INT3) for key, weight in weights.items()}
    with pytest.raises(FormatError, match="same linears"):
        learn({"gate": start["gate"]})
    with pytest.raises(FormatError, match="at least 1"):
        LearnedRoundingSettings(steps=0)
