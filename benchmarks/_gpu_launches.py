"""The launches of `gpu.py`, section by section, on tensors without memory: jobs for `_gpu_compile`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from _gpu_cache import BATCHES as CACHE_BATCHES
from _gpu_cache import CONTEXTS, DIM, HEADS, KINDS, KV_HEADS
from _gpu_compile import meta
from _gpu_correctness import LARGE, LARGE_TOKENS, SHAPES, TOKENS, schemes
from _gpu_end_to_end import BATCHED, BATCHES, CONTEXT, LONG_PROMPT, PROMPT, ROWS, STEPS
from _gpu_end_to_end import TOKENS as GENERATED
from _gpu_kernels import BAR_SHAPES, FORMATS, OTHERS
from _gpu_kernels import SHAPES as KERNEL_SHAPES
from _gpu_kernels import TOKENS as KERNEL_TOKENS
from _gpu_tune import SHAPES as TUNED_SHAPES
from _gpu_tune import STEPS as TUNED_STEPS
from transformers import PretrainedConfig

from fewbit.formats.spec import SCHEMES, QuantSpec, Scheme, get_scheme
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.dense import DenseKernel
from fewbit.kernels.dispatch import KERNELS
from fewbit.kernels.triton.attention import append, attend, new_layer, parts_for
from fewbit.kernels.triton.layout import layout_of
from fewbit.kernels.triton.linear import TritonUnfused, TritonWeightOnly
from fewbit.kernels.triton.tuning import candidates
from fewbit.kernels.triton.w8a8 import TritonW8A8
from fewbit.kernels.triton.weight_only import multiply
from fewbit.models.shapes import shapes_config
from fewbit.models.structure import build_without_weights
from fewbit.runtime.gpu_engine import GpuEngine
from fewbit.runtime.gpu_model import GpuLinear, random_quantized, shaped_model

__all__ = ["attention_job", "engine_job", "jobs", "product_job"]

_BF16 = torch.bfloat16
_KV = {"none": "BF16", "int8": "KV-INT8", "fp8": "KV-FP8", "int4": "KV-INT4"}
Job = tuple[str, Callable[[], object]]


def jobs(sections: tuple[str, ...], shapes: tuple[str, ...], fp8: bool) -> Iterator[Job]:
    """Everything that the sections launch on a device with or without FP8.

    Args:
        sections: of `gpu.py`. shapes: models of the section `end-to-end`.
    """
    if "tune" in sections:
        yield from _tuning()
    if "kernels" in sections:
        yield from _kernels(fp8)
    if "end-to-end" in sections:
        yield from _steps(shapes, fp8)
    if "cache" in sections:
        for kind in KINDS:
            if fp8 or kind != "fp8":
                for batch in CACHE_BATCHES:
                    yield f"cache {kind} {batch}", lambda k=kind, b=batch: [attention_job(k, b, c) for c in CONTEXTS]
    if "correctness" in sections:
        yield from _correctness(fp8)


def _tuning() -> Iterator[Job]:
    scheme = get_scheme("W4A16")
    for _, m in TUNED_STEPS:
        for tiles in candidates(m):
            yield (
                f"tune M={m} {tiles.block_m}x{tiles.block_n} {tiles.num_warps} {tiles.num_stages} {tiles.swap}",
                lambda t=tiles, m=m: [product_job(scheme, TritonWeightOnly(), *shape, m, tiles=t) for shape in TUNED_SHAPES],
            )


def _kernels(fp8: bool) -> Iterator[Job]:
    for name in (*FORMATS, *OTHERS):
        scheme = get_scheme(name)
        kernel = _kernel(scheme, fp8)
        if kernel is not None:
            for shape in (BAR_SHAPES | KERNEL_SHAPES).values():
                yield f"kernel {name} {shape}", lambda s=scheme, k=kernel, o=shape: [product_job(s, k, *o, m) for m in KERNEL_TOKENS]


def _correctness(fp8: bool) -> Iterator[Job]:
    for scheme in schemes():
        for kernel in (_kernel(scheme, fp8), TritonUnfused()):
            if kernel is None or _refused(kernel, scheme, fp8):
                continue
            for out, columns in (*SHAPES, LARGE):
                if columns % ((scheme.weights.group_size if scheme.weights else None) or 1) == 0:
                    tokens = LARGE_TOKENS if (out, columns) == LARGE else TOKENS
                    yield (
                        f"check {kernel.name} {scheme.name} {out}x{columns}",
                        lambda s=scheme, k=kernel, o=out, c=columns, t=tokens: [product_job(s, k, o, c, m, bias=True) for m in t],
                    )
    for kind, name in _KV.items():
        if fp8 or kind != "fp8":
            yield f"check attention {kind}", lambda k=kind, n=name: _check_attention(k, SCHEMES[n].kv_residual_window)


def _steps(shapes: tuple[str, ...], fp8: bool) -> Iterator[Job]:
    single = PROMPT + 6 * GENERATED + 8
    for name in shapes:
        config = shapes_config(name)
        for _, scheme, prefer, head in ROWS:
            if scheme != "LLM-INT8":  # it looks into its inputs; its kernels are those of W8A8
                yield (
                    f"step {name} {scheme} {head}",
                    lambda c=config, s=scheme, p=prefer, h=head: engine_job(c, get_scheme(s), fp8, [(1, single)], (PROMPT,), p, h),
                )
        for scheme in BATCHED:
            sizes = [(batch, CONTEXT + 3 * STEPS + 4) for batch in BATCHES]
            yield (
                f"batches {name} {scheme}",
                lambda c=config, s=scheme, z=sizes: engine_job(c, get_scheme(s), fp8, [*z, (1, LONG_PROMPT)], (CONTEXT,), None, None),
            )


def _kernel(scheme: Scheme, fp8: bool) -> Kernel | None:
    """fewbit's fused kernel for a scheme."""
    return next((kernel for kernel in (TritonWeightOnly(), TritonW8A8()) if not _refused(kernel, scheme, fp8)), None)


def _refused(kernel: Kernel, scheme: Scheme, fp8: bool) -> bool:
    if scheme.weights is None or kernel.refuse_format(KernelRequest(scheme.weights, scheme.input_activations, 128, 256)) is not None:
        return True
    return not fp8 and scheme.input_activations is not None and scheme.weights.type == "float"


def _packed(kernel: Kernel, spec: QuantSpec | None, request: KernelRequest) -> dict[str, torch.Tensor]:
    """What the kernel keeps of a weight, without memory: dtypes from a small one, the shapes that launchers read from the request."""
    out, columns = request.out_features, request.in_features
    if spec is None:
        return {"weight": torch.empty(out, columns, dtype=request.dtype, device="meta")}
    small = _small(kernel.name, spec, request.input_activations)
    packed = {name: meta(tensor) for name, tensor in small.items()}
    if "values" in small:
        packed["values"] = meta(small["values"], out, columns)
        blocks = spec.block_shape
        packed["scale"] = meta(small["scale"], *((-(-out // blocks[0]), -(-columns // blocks[1])) if blocks else (out,)))
    else:
        packed["scale"] = meta(small["scale"], out, -(-columns // spec.group_size) if spec.group_size else 1)
    return packed


@cache
def _small(name: str, spec: QuantSpec, inputs: QuantSpec | None) -> dict[str, torch.Tensor]:
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    weight = random_quantized(128, 256, spec, torch.Generator().manual_seed(0))
    if inputs is not None and not inputs.dynamic:
        weight = dataclasses.replace(weight, input_scale=torch.ones(1))
    return kernel.pack(weight, KernelRequest(spec, inputs, 128, 256, "cpu", _BF16))


def product_job(scheme: Scheme, kernel: Kernel, out: int, columns: int, m: int, *, bias: bool = False, tiles: Any = None) -> None:
    """One product of M rows; with `tiles`, the kernel for weights alone with these block sizes."""
    request = KernelRequest(scheme.weights, scheme.input_activations, out, columns, "meta", _BF16)
    packed = _packed(kernel, scheme.weights, request)
    x = torch.empty(m, columns, dtype=_BF16, device="meta")
    if tiles is not None:
        assert scheme.weights is not None
        layout = layout_of(scheme.weights, columns)
        multiply(x, packed, layout, tiles.for_shape(m, out, layout.chunks))
    else:
        kernel.apply(x, packed, torch.empty(out, dtype=_BF16, device="meta") if bias else None, request)


def attention_job(kind: str, batch: int, context: int) -> None:
    """Attention of one step over a cache of Llama-3-8B's shapes."""
    layer = new_layer(kind, batch, KV_HEADS, context, DIM, _BF16, "meta")
    queries, lengths = torch.empty(batch, HEADS, DIM, dtype=_BF16, device="meta"), torch.empty(batch, dtype=torch.int32, device="meta")
    attend(queries, layer, lengths, DIM**-0.5, parts=parts_for(context, batch * KV_HEADS, "meta"))


def _check_attention(kind: str, window: int) -> None:
    layer = new_layer(kind, 2, KV_HEADS, 1000, DIM, _BF16, "meta", window)
    x = torch.empty(1000, (HEADS + 2 * KV_HEADS) * DIM, dtype=_BF16, device="meta")
    table = torch.empty(1000, DIM // 2, device="meta")
    place = torch.empty(1000, dtype=torch.int32, device="meta")
    append(x, layer, _BF16, heads=HEADS, bias=None, norms=None, rotary=(table, table), sequences=place, positions=place, ends=place)
    attend(torch.empty(2, HEADS, DIM, dtype=_BF16, device="meta"), layer, place[:2], DIM**-0.5, parts=3)


def engine_job(
    config: PretrainedConfig, scheme: Scheme, fp8: bool, caches: list[tuple[int, int]], prompts: tuple[int, ...], prefer: str | None,
    head: str | None,
) -> None:  # fmt: skip
    """Prompts and one step for each (sequences, capacity); two blocks stand for all."""
    if _kernel(scheme, fp8) is None and scheme.weights is not None:
        return
    config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 2, "layer_types": None, "vocab_size": 1024})
    dense, made = DenseKernel(), {"triton-unfused": TritonUnfused()}

    def linear(out: int, columns: int, weights: QuantSpec | None, inputs: QuantSpec | None, bias: bool = False) -> GpuLinear:
        request = KernelRequest(weights, inputs, out, columns, "meta", _BF16)
        chosen: Kernel | None = dense if weights is None else made.get(prefer or "") or _kernel(Scheme("", weights, inputs), fp8)
        assert chosen is not None
        return GpuLinear(chosen, (request,), (_packed(chosen, weights, request),), normal(out) if bias else None)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=_BF16, device="meta")

    rotary = build_without_weights(config, dtype=_BF16).model.rotary_emb
    spec = None if head is None else get_scheme(head).weights
    engine = GpuEngine(shaped_model(config, scheme, "meta", _BF16, rotary, linear, normal, head=spec))
    for sequences, capacity in caches:
        cache = engine.new_cache(capacity, sequences)
        for prompt in prompts if sequences == 1 and capacity != LONG_PROMPT else ():
            engine.prefill(torch.arange(prompt), cache)
        if capacity == LONG_PROMPT:
            engine.prefill(torch.arange(LONG_PROMPT), cache)
        else:
            engine.decode(cache)
