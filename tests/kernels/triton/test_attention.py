"""Decode attention over the quantized cache against attention over what the formats keep, in the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewbit.formats.quantize import fake_quantize
from fewbit.formats.spec import SCHEMES

_SCHEMES = {"none": "BF16", "int8": "KV-INT8", "fp8": "KV-FP8", "int4": "KV-INT4"}


def _rope(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, D], tables [tokens, D / 2]."""
    first, second = x.chunk(2, -1)
    cosine, sine = (torch.cat([t, t], -1)[:, None].to(x.dtype) for t in (cosine, sine))
    return x * cosine + torch.cat([-second, first], -1) * sine


def check(kind: str, device: str, *, window: int = 0, sliding: int = 0, norm: bool = False, dim: int = 64) -> None:
    """A prompt of 68 and 3 tokens, then a step of both sequences."""
    from fewbit.kernels.triton.attention import append, attend, new_layer

    dtype, heads, kv_heads, capacity = torch.float32, 2, 1, 80
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layer = new_layer(kind, 2, kv_heads, capacity, dim, dtype, device, window)
    cosine, sine = torch.cos(random(capacity, dim // 2)), torch.sin(random(capacity, dim // 2))
    bias, weights = random((heads + 2 * kv_heads) * dim), (random(dim), random(dim))
    spec: Any = SCHEMES[_SCHEMES[kind]].kv_keys
    keys: list[list[torch.Tensor]] = [[], []]
    values: list[list[torch.Tensor]] = [[], []]
    for sequences, positions, ends in (
        ([0] * 68, list(range(68)), [68] * 68), ([1] * 3, [0, 1, 2], [3] * 3), ([0, 1], [68, 3], [69, 4])
    ):  # fmt: skip
        x = random(2, len(sequences), (heads + 2 * kv_heads) * dim)
        integers = [torch.tensor(t, dtype=torch.int32, device=device) for t in (sequences, positions, ends)]
        norms = (weights[0].to(device), weights[1].to(device), 1e-6) if norm else None
        q = append(
            x.to(device), layer, dtype, heads=heads, bias=bias.to(device), norms=norms, rotary=(cosine.to(device), sine.to(device)),
            sequences=integers[0], positions=integers[1], ends=integers[2],
        )  # fmt: skip
        rows = (x.sum(0) + bias).view(len(sequences), -1, dim)
        query, key, value = rows.split([heads, kv_heads, kv_heads], 1)
        if norm:
            query, key = (torch.nn.functional.rms_norm(t, (dim,), w, 1e-6) for t, w in zip((query, key), weights, strict=True))
        query, key = (_rope(t, cosine[positions], sine[positions]) for t in (query, key))
        assert float((q.cpu() - query).abs().max()) < 1e-4
        for row, sequence in enumerate(sequences):
            keys[sequence].append(key[row])
            values[sequence].append(value[row])
    out = attend(q, layer, integers[2], dim**-0.5, parts=2, sliding=sliding).cpu()
    for sequence in range(2):
        k, v = torch.stack(keys[sequence], 1), torch.stack(values[sequence], 1)  # [kv heads, tokens, D]
        if spec is not None:
            history = k.shape[1] - window
            for t in (k, v):
                t[:, : max(history, 0)] = fake_quantize(t[:, : max(history, 0)].clone(), spec)
        first = max(k.shape[1] - sliding, 0) if sliding else 0
        k, v = (t[:, first:].repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(query[sequence][:, None], k, v)[:, 0]
        error = float((out[sequence] - expected).abs().max())
        assert error < (2e-2 if device == "cuda" else 2e-4), (kind, window, sliding, sequence, error)


def everything(device: str) -> None:
    """All checks of this file."""
    check("none", device, norm=True)
    check("none", device, sliding=20)
    check("int8", device, dim=128)
    check("fp8", device, dim=128)
    check("int8", device, dim=64)  # too few channels for words of four codes, here and in the next
    check("fp8", device, dim=32)
    check("int4", device)
    check("int4", device, window=32)


def test_everything_in_the_interpreter(in_the_interpreter: Callable[[str, str], None]) -> None:
    in_the_interpreter(__file__, "checks.everything('cpu')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_everything_on_the_gpu() -> None:
    everything("cuda")
