"""Section 2: every kernel over shapes and seeds against float64, on memory that was filled with NaN before.

Products: the largest difference over what rounding could explain, |x| |W|^T: below 2**-7 for BF16 outputs, 2**-17 for float32. Scales and
zero points differ from group to group. Attention: against float64 attention over what the cache
keeps; and what it keeps against the format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _gpu_common import Clock, Settings, random_rows

from fewbit.formats.quantize import dequantize, fake_quantize
from fewbit.formats.spec import SCHEMES, QuantSpec, Scheme
from fewbit.formats.static import fake_quantize_static
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.dispatch import KERNELS
from fewbit.kernels.triton.attention import CacheLayer, append, attend, new_layer, parts_for, read
from fewbit.runtime.gpu_model import random_quantized

__all__ = ["LARGE", "LARGE_TOKENS", "SHAPES", "TOKENS", "check", "schemes", "varied"]

SHAPES, TOKENS = ((512, 1024), (272, 2064), (4096, 4096)), (1, 3, 16, 17, 64, 300)
LARGE, LARGE_TOKENS = (28672, 8192), (1, 8, 130)  # offsets of bytes beyond 2**31 are in _check_far
_KV = {"none": "BF16", "int8": "KV-INT8", "fp8": "KV-FP8", "int4": "KV-INT4"}
_STATIC = 0.03


def check(settings: Settings, seconds: float) -> None:
    """Rows `correctness`: an error of at most 1 is right."""
    clock = Clock(seconds, settings)
    for kind in _KV:
        if clock.allows(f"attention {kind}"):
            settings.attempt(f"attention {kind}", lambda k=kind: _check_attention(settings, k))
    if settings.cuda and clock.allows("attention far"):
        settings.attempt("attention over more than 2**31 values", lambda: _check_far(settings))
    shapes = ((32, 256),) if settings.tiny else SHAPES
    chosen = [SCHEMES[name] for name in ("W4A16", "NVFP4", "W8A8", "FP8", "LLM-INT8")] if settings.tiny else schemes()
    for scheme in chosen:
        for out, columns in shapes:
            _check_scheme(settings, clock, scheme, out, columns, (20,) if settings.tiny else TOKENS, (0,) if settings.tiny else (0, 1))
    if not settings.tiny:
        for name in ("W4A16", "FP8", "W8A8", "NVFP4"):
            _check_scheme(settings, clock, SCHEMES[name], *LARGE, LARGE_TOKENS, (0,))


def schemes() -> list[Scheme]:
    """All that quantize weights."""
    return [scheme for scheme in SCHEMES.values() if scheme.weights is not None]


def varied(rows: int, columns: int, spec: QuantSpec, generator: torch.Generator) -> QuantizedTensor:
    """Random codes with scales and zero points that differ from group to group."""
    weight = random_quantized(rows, columns, spec, generator)
    random = torch.rand(weight.scale.shape, generator=generator, device=weight.scale.device)
    if weight.scale.dtype == torch.uint8:
        scale = (118 + 5 * random).to(torch.uint8)
    else:
        scale = ((0.5 + random) * weight.scale.float()).to(weight.scale.dtype)
    zero = weight.zero_point
    if zero is not None:
        span = 2 ** (spec.num_bits - 1)
        zero = torch.randint(-span, span, zero.shape, generator=generator, device=zero.device, dtype=torch.int8)
    return dataclasses.replace(weight, scale=scale, zero_point=zero)


@contextmanager
def _poisoned() -> Iterator[None]:
    """torch fills fresh memory with NaN (integers: their largest) while it is in deterministic mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _check_scheme(
    settings: Settings, clock: Clock, scheme: Scheme, out: int, columns: int, tokens: tuple[int, ...], seeds: tuple[int, ...]
) -> None:
    spec = scheme.weights
    assert spec is not None
    request = KernelRequest(spec, scheme.input_activations, out, columns, settings.device, settings.dtype)
    if columns % (spec.group_size or 1):
        return
    for kernel in KERNELS:
        what = f"{kernel.name} {scheme.name} {out}x{columns}"
        if not kernel.name.startswith("triton") or kernel.refuse(request) is not None or not clock.allows(what):
            continue

        def run(kernel: Any = kernel) -> None:
            errors = dict.fromkeys(tokens, 0.0)
            for seed in seeds:
                for m, error in _errors(kernel, request, scheme, tokens, seed, settings):
                    errors[m] = max(errors[m], error)
            for m, error in errors.items():
                row = {"kernel": kernel.name, "scheme": scheme.name, "shape": [out, columns], "tokens": m, "error": error}
                settings.record("correctness", row)

        settings.attempt(what, run)


def _errors(
    kernel: Any, request: KernelRequest, scheme: Scheme, tokens: tuple[int, ...], seed: int, settings: Settings
) -> Iterator[tuple[int, float]]:
    generator = torch.Generator(settings.device).manual_seed(seed)
    inputs, spec = scheme.input_activations, scheme.weights
    assert spec is not None
    weight = varied(request.out_features, request.in_features, spec, generator)
    if inputs is not None and not inputs.dynamic:
        weight = dataclasses.replace(weight, input_scale=torch.full((1,), _STATIC, device=settings.device))
    packed, w = kernel.pack(weight, request), dequantize(weight).double()
    bias = random_rows(settings, request.out_features, seed=seed + 200)
    for m in tokens:
        x = random_rows(settings, m, request.in_features, seed=seed + 100)
        with _poisoned():
            y = kernel.apply(x, packed, bias, request).double()
        if inputs is None:
            kept = x.double()
        elif inputs.dynamic:
            kept = fake_quantize(x.float(), inputs).double()
        else:
            kept = fake_quantize_static(x.float(), torch.full((1,), _STATIC, device=settings.device), inputs).double()
        rounding = 2.0**-7 if settings.dtype != torch.float32 or "FP8" in scheme.name else 2.0**-17
        bound = (kept.abs() @ w.abs().T + bias.abs().double()) * rounding
        error = ((y - kept @ w.T - bias.double()).abs() / bound.clamp_min(1e-9)).nan_to_num(float("inf"), float("inf"), float("inf"))
        yield m, float(error.max())


def _check_attention(settings: Settings, kind: str) -> None:
    """A prompt is appended and its last query attends; queries are sharpened so that a few tokens carry the sum."""
    dim, heads, kv_heads, tokens = (128, 2, 1, 36) if settings.tiny else (128, 32, 8, 1000)
    window = SCHEMES[_KV[kind]].kv_residual_window
    layer = new_layer(kind, 2, kv_heads, tokens, dim, settings.dtype, settings.device, window)
    x = random_rows(settings, tokens, (heads + 2 * kv_heads) * dim)
    angles = random_rows(settings, tokens, dim // 2, seed=1).float()
    place = torch.arange(tokens, dtype=torch.int32, device=settings.device)
    with _poisoned():
        queries = append(
            x, layer, settings.dtype, heads=heads, bias=None, norms=None, rotary=(torch.cos(angles), torch.sin(angles)),
            sequences=torch.ones_like(place), positions=place, ends=torch.full_like(place, tokens),
        )  # fmt: skip
        lengths = torch.tensor([1, tokens], dtype=torch.int32, device=settings.device)
        query = (4.0 * queries[-1:]).repeat(2, 1, 1)
        out = attend(query, layer, lengths, dim**-0.5, parts=3)[1]
    error = _attention_error(out, query[1], layer, 1, tokens, settings)
    kept = x.float().view(tokens, -1, dim).transpose(0, 1)
    keys, values = kept[heads : heads + kv_heads].clone(), kept[heads + kv_heads :]
    first, second = keys.chunk(2, -1)
    cosine, sine = (torch.cat([t, t], -1) for t in (torch.cos(angles), torch.sin(angles)))
    keys = keys * cosine + torch.cat([-second, first], -1) * sine
    stored = max(_stored_error(a, b, kind) for a, b in zip(read(layer, 1, tokens, settings.dtype), (keys, values), strict=True))
    for name, value in ((kind, error), (f"{kind}, stored", stored)):
        settings.record("correctness", {"kernel": "attention", "scheme": name, "shape": [heads, dim], "tokens": tokens, "error": value})


def _attention_error(out: torch.Tensor, query: torch.Tensor, layer: CacheLayer, sequence: int, tokens: int, settings: Settings) -> float:
    """Against float64 attention over what the cache keeps; BF16 rounds the weights of the values."""
    grouped = query.shape[0] // layer.keys.shape[1]
    keys, values = (t.double().repeat_interleave(grouped, 0) for t in read(layer, sequence, tokens, settings.dtype))
    expected = torch.nn.functional.scaled_dot_product_attention(query.double()[:, None], keys, values)[:, 0]
    bound = (2.0**-6 if settings.dtype != torch.float32 else 2.0**-14) * values.abs().max()
    return float(((out.double() - expected).abs().max() / bound).nan_to_num(float("inf")))


def _stored_error(got: torch.Tensor, wanted: torch.Tensor, kind: str) -> float:
    """The largest difference between what is kept and what came, over a step of the format (half a step, and BF16's rounding before it)."""
    spec = SCHEMES[_KV[kind]].kv_keys
    difference = (got.double() - wanted.double()).abs()
    if spec is None:
        return float((difference / (2.0**-7 * wanted.abs().max().double())).max().nan_to_num(float("inf")))
    kept = fake_quantize(wanted, spec).double()
    step = {"int8": 2.0**-7, "fp8": 2.0**-4, "int4": 2.0 / 15}[kind] * wanted.abs().amax(-1, keepdim=True).double()
    return float(((got.double() - kept).abs() / step).max().nan_to_num(float("inf")))


def _check_far(settings: Settings) -> None:
    """The last sequence of an INT8 cache of more than 2**31 values: offsets that 32 bits do not hold."""
    sequences, kv_heads, capacity, dim, tokens = 33, 8, 65536, 128, 2000
    layer = new_layer("int8", sequences, kv_heads, capacity, dim, settings.dtype, settings.device)
    for codes, scale in ((layer.keys, layer.key_scale), (layer.values, layer.value_scale)):
        codes[-1, :, :tokens].random_(-127, 128)
        scale[-1, :, :tokens] = 0.01
    query = random_rows(settings, sequences, 32, dim)
    lengths = torch.ones(sequences, dtype=torch.int32, device=settings.device)
    lengths[-1] = tokens
    out = attend(query, layer, lengths, dim**-0.5, parts=parts_for(capacity, sequences * kv_heads, settings.device))[-1]
    error = _attention_error(out, query[-1], layer, sequences - 1, tokens, settings)
    settings.record("correctness", {"kernel": "attention", "scheme": "int8, far", "shape": [32, dim], "tokens": tokens, "error": error})
