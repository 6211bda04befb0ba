"""Section 3: times of single linears by format, shape and number of tokens, with the peers that import here.

A call multiplies with one of several copies of the weight, so that together they exceed four times the second-level cache; calls are
captured in a CUDA graph. `share`: of the measured read bandwidth (few tokens) or of the BF16 rate, whichever bounds more.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from _gpu_common import Clock, Settings, copies_for, random_rows, time_calls

from fewbit.errors import FewbitError
from fewbit.formats.spec import get_scheme
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.dispatch import select
from fewbit.runtime.gpu_model import random_quantized

__all__ = ["SHAPES", "measure_kernels"]

SHAPES = {
    "70b gate,up": (57344, 8192), "8192x28672": (8192, 28672), "4096x11008": (4096, 11008),
    "8b gate,up": (28672, 4096), "8b down": (4096, 14336),
    "8b q,k,v": (6144, 4096), "8b output": (4096, 4096), "7b gate,up": (22016, 4096), "7b q,k,v": (12288, 4096), "70b q,k,v": (10240, 8192),
    "70b output": (8192, 8192), "3b gate,up": (22016, 2048), "3b down": (2048, 11008), "3b q,k,v": (2560, 2048), "3b output": (2048, 2048),
}  # fmt: skip
_TOKENS = (1, 16, 128, 2048, 4, 8, 32, 64, 1024, 4096)
_FEWBIT = ("BF16", "W4A16", "W8A16", "FP8A16", "FP8", "W8A8", "NF4", "MXFP4", "W4A16-ASYM", "W3A16")
_PEERS = ("torch-int4", "gemlite-int4", "bitsandbytes-nf4", "torchao-int4")
Multiply = Callable[[torch.Tensor], object]


def measure_kernels(settings: Settings, clock: Clock, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per shape, contender and number of tokens."""
    shapes = {"tiny": (48, 256)} if settings.tiny else SHAPES
    contenders = ("BF16", "W4A16", "W8A8", *_PEERS[:1]) if settings.tiny else (*_FEWBIT, *_PEERS)
    rows: list[dict[str, Any]] = []
    for name, (out, columns) in shapes.items():
        for contender in contenders:
            what = f"{contender} {name}"
            if not clock.allows(what):
                continue
            settings.attempt(what, lambda c=contender, o=out, k=columns, n=name: rows.extend(_rows(settings, machine, c, o, k, n, clock)))
    bf16 = {(row["shape"], row["tokens"]): row["ms"] for row in rows if row["contender"] == "BF16"}
    for row in rows:
        base = bf16.get((row["shape"], row["tokens"]))
        row["over_bf16"] = base / row["ms"] if base else None
    return rows


def _rows(
    settings: Settings, machine: dict[str, Any], contender: str, out: int, columns: int, name: str, clock: Clock
) -> list[dict[str, Any]]:
    first, nbytes = _make(settings, contender, out, columns)
    copies = [first] + [_make(settings, contender, out, columns)[0] for _ in range(copies_for(nbytes, settings) - 1)]
    rows = []
    for tokens in (1,) if settings.tiny else _TOKENS:
        if not clock.allows(f"{contender} {name} M={tokens}"):
            continue
        x = random_rows(settings, tokens, columns)
        milliseconds = settings.attempt(
            f"{contender} {name} M={tokens}", lambda x=x: time_calls([lambda f=f: f(x) for f in copies], settings, replays=9)
        )
        if milliseconds is not None:
            bandwidth = nbytes / milliseconds / 1e6 / machine["read_gb_s"]
            rate = 2 * tokens * out * columns / milliseconds / 1e9 / (machine["bf16_tflop_s"] or float("inf"))
            rows.append(
                {"shape": name, "out": out, "columns": columns, "contender": contender, "tokens": tokens, "ms": milliseconds,
                 "bytes": nbytes, "share_of_bandwidth": bandwidth, "share_of_bf16_rate": rate}
            )  # fmt: skip
    return rows


def _make(settings: Settings, contender: str, out: int, columns: int) -> tuple[Multiply, int]:
    """A product with a weight of its own, and the weight's bytes."""
    if contender in _PEERS:
        return _PEER_MAKERS[contender](settings, out, columns)
    scheme = get_scheme(contender)
    request = KernelRequest(scheme.weights, scheme.input_activations, out, columns, settings.device, settings.dtype)
    kernel = select(request).kernel
    if not kernel.fused:
        raise FewbitError(f"{contender} has no fused kernel here")
    if scheme.weights is None:
        packed = kernel.pack(random_rows(settings, out, columns), request)
    else:
        packed = kernel.pack(random_quantized(out, columns, scheme.weights, torch.Generator(settings.device).manual_seed(0)), request)
    return lambda x: kernel.apply(x, packed, None, request), sum(tensor.nbytes for tensor in packed.values())


def _torch_int4(settings: Settings, out: int, columns: int) -> tuple[Multiply, int]:
    codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=settings.device)
    scales = torch.ones(columns // 128, out, 2, dtype=torch.bfloat16, device=settings.device)
    if not settings.cuda:
        raise FewbitError("torch's int4 kernel is timed on GPUs")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales), packed.nbytes + scales.nbytes


def _gemlite(settings: Settings, out: int, columns: int) -> tuple[Multiply, int]:
    core: Any = importlib.import_module("gemlite.core")
    layer = core.GemLiteLinear(
        4, group_size=128, in_features=columns, out_features=out, input_dtype=core.DType.BF16, output_dtype=core.DType.BF16
    )
    codes = torch.randint(0, 16, (out, columns), dtype=torch.uint8, device=settings.device)
    scales = torch.full((out * columns // 128, 1), 0.01, dtype=torch.bfloat16, device=settings.device)
    layer.pack(codes, scales, torch.full_like(scales, 8.0), None)
    return layer, out * columns // 2 + scales.nbytes


def _bitsandbytes(settings: Settings, out: int, columns: int) -> tuple[Multiply, int]:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    matmul: Any = importlib.import_module("bitsandbytes").matmul_4bit
    packed, state = functional.quantize_4bit(random_rows(settings, out, columns), blocksize=64, quant_type="nf4")
    return lambda x: matmul(x, packed.t(), quant_state=state), packed.nbytes + state.absmax.nbytes


def _torchao(settings: Settings, out: int, columns: int) -> tuple[Multiply, int]:
    quantization: Any = importlib.import_module("torchao.quantization")
    linear = torch.nn.Linear(columns, out, bias=False, device=settings.device, dtype=settings.dtype)
    quantization.quantize_(linear, quantization.Int4WeightOnlyConfig(group_size=128))
    return linear, out * columns // 2 + 4 * out * columns // 128


_PEER_MAKERS = {"torch-int4": _torch_int4, "gemlite-int4": _gemlite, "bitsandbytes-nf4": _bitsandbytes, "torchao-int4": _torchao}
