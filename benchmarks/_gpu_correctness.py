"""Section 2: every kernel over shapes and seeds against float64, on memory that was filled with NaN before.

An error is the largest difference over what rounding could explain, |x| |W|^T: below 2**-7 for BF16 outputs, 2**-17 for float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _gpu_common import Clock, Settings, random_rows

from fewbit.formats.quantize import dequantize, fake_quantize
from fewbit.formats.spec import SCHEMES
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.dispatch import KERNELS
from fewbit.kernels.triton.attention import append, attend, new_layer
from fewbit.methods.rtn import rtn

__all__ = ["check_attention", "check_products"]

_KV = {"none": "BF16", "int8": "KV-INT8", "fp8": "KV-FP8", "int4": "KV-INT4"}


@contextmanager
def _poisoned() -> Iterator[None]:
    """torch fills fresh memory with NaN (integers: their largest) while it is in deterministic mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_products(settings: Settings, clock: Clock) -> list[dict[str, Any]]:
    """One row per kernel, scheme, shape and number of tokens: the error over its bound (at most 1 is right)."""
    shapes, tokens = (((32, 256),), (20,)) if settings.tiny else (((512, 1024), (4096, 4096), (272, 2064)), (1, 3, 16, 17, 64, 300))
    seeds = (0,) if settings.tiny else (0, 1)
    schemes = [s for s in SCHEMES.values() if s.weights is not None]
    if settings.tiny:
        schemes = [SCHEMES[name] for name in ("W4A16", "NVFP4", "W8A8", "FP8", "LLM-INT8")]
    rows = []
    for scheme in schemes:
        for out, columns in shapes:
            request = KernelRequest(scheme.weights, scheme.input_activations, out, columns, settings.device, settings.dtype)
            group = 0 if scheme.weights is None else scheme.weights.group_size or 1
            kernels = [k for k in KERNELS if k.name.startswith("triton") and k.refuse(request) is None]
            if columns % max(group, 1) or not kernels or not clock.allows(f"{scheme.name} {out}x{columns}"):
                continue
            for kernel in kernels:
                for m in tokens:
                    errors = [_error(kernel, request, scheme, m, seed, settings) for seed in seeds]
                    rows.append({"kernel": kernel.name, "scheme": scheme.name, "shape": [out, columns], "tokens": m, "error": max(errors)})
    return rows


def _error(kernel: Any, request: KernelRequest, scheme: Any, tokens: int, seed: int, settings: Settings) -> float:
    weight = rtn(random_rows(settings, request.out_features, request.in_features, seed=seed).float(), scheme.weights)
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        weight = dataclasses.replace(weight, input_scale=torch.full((1,), 0.03, device=settings.device))
    x = random_rows(settings, tokens, request.in_features, seed=seed + 100)
    bias = random_rows(settings, request.out_features, seed=seed + 200)
    packed = kernel.pack(weight, request)
    with _poisoned():
        y = kernel.apply(x, packed, bias, request).double()
    kept = x.double()
    if scheme.input_activations is not None:
        inputs = scheme.input_activations
        if inputs.dynamic:
            kept = fake_quantize(x.float(), inputs).double()
        else:
            kept = ((x.float() / 0.03).round().clamp(-128, 127) * 0.03).double()
    w = dequantize(weight).double()
    bound = (kept.abs() @ w.abs().T + bias.abs().double()) * (
        2.0**-7 if settings.dtype != torch.float32 or "FP8" in scheme.name else 2.0**-17
    )
    return float(((y - kept @ w.T - bias.double()).abs() / bound.clamp_min(1e-9)).nan_to_num(float("inf")).max())


def check_attention(settings: Settings, clock: Clock) -> list[dict[str, Any]]:
    """One row per cache format: the largest difference over 0.03 (BF16) or 1e-3 from attention over what the format keeps."""
    rows = []
    dim, heads, kv_heads, tokens = (64, 2, 1, 36) if settings.tiny else (128, 32, 8, 1000)
    for kind, scheme in _KV.items():
        if not clock.allows(f"attention {kind}"):
            continue
        window = SCHEMES[scheme].kv_residual_window
        layer = new_layer(kind, 2, kv_heads, tokens, dim, settings.dtype, settings.device, window)
        x = random_rows(settings, tokens, (heads + 2 * kv_heads) * dim)
        angles = random_rows(settings, tokens, dim // 2, seed=1).float()
        place = torch.arange(tokens, dtype=torch.int32, device=settings.device)
        with _poisoned():
            queries = append(
                x, layer, settings.dtype, heads=heads, bias=None, norms=None, rotary=(torch.cos(angles), torch.sin(angles)),
                sequences=torch.ones_like(place), positions=place, ends=torch.full_like(place, tokens),
            )  # fmt: skip
            lengths = torch.tensor([0, tokens], dtype=torch.int32, device=settings.device)
            out = attend(queries[-1:].repeat(2, 1, 1), layer, lengths, dim**-0.5, parts=3)[1].double()
        kept = x.float().view(tokens, -1, dim).transpose(0, 1).double()
        keys, values = kept[heads : heads + kv_heads], kept[heads + kv_heads :]
        first, second = keys.chunk(2, -1)
        cosine, sine = (torch.cat([t, t], -1).double() for t in (torch.cos(angles), torch.sin(angles)))
        keys = keys * cosine + torch.cat([-second, first], -1) * sine
        spec = SCHEMES[scheme].kv_keys
        if spec is not None:
            for tensor in (keys, values):
                old = max(tokens - window, 0)
                tensor[:, :old] = fake_quantize(tensor[:, :old].float(), spec).double()
        grouped = [t.repeat_interleave(heads // kv_heads, 0) for t in (keys, values)]
        expected = torch.nn.functional.scaled_dot_product_attention(queries[-1].double()[:, None], *grouped)[:, 0]
        bound = 0.03 if settings.dtype != torch.float32 else 1e-3
        rows.append(
            {
                "kernel": "attention",
                "scheme": kind,
                "shape": [heads, dim],
                "tokens": tokens,
                "error": float((out - expected).abs().max()) / bound,
            }
        )
    return rows
