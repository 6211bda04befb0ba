"""A model as the GPU engine walks it: blocks of linears over packed weights, joined where they share their inputs.

q, k and v read the same rows, and so do gate and up: their packed weights lie one after the other, and one kernel multiplies with all of
them. The loaded model's own layers become views of the joined tensors, so nothing is kept twice. Where a kernel cannot join its weights
(`GpuKernel.join` says so) they stay apart and are multiplied in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from fewbit.errors import UnsupportedModelError
from fewbit.formats.grids import value_dtype
from fewbit.formats.grouping import scale_shape
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.dense import DenseKernel
from fewbit.kernels.dispatch import select
from fewbit.kernels.triton.environment import refuse_device, room_for
from fewbit.kernels.triton.gpu_kernel import GpuKernel, Rows
from fewbit.models.structure import build_without_weights
from fewbit.runtime.kv_kind import kv_kind
from fewbit.runtime.linear import QuantLinear
from fewbit.runtime.load import LoadedModel
from fewbit.runtime.rotary import RotaryTable, rotary_refusal

__all__ = ["GpuBlock", "GpuLinear", "GpuModel", "gpu_engine_refusal", "model_of", "random_model", "random_quantized", "shaped_model"]

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_DIMS = (32, 64, 128, 256)


@dataclass(frozen=True)
class GpuLinear:
    """Linears that share their inputs, over one packed weight, or over several where `packed` has more.

    Attributes:
        requests, packed: of each part; joined weights have one.
        bias: [sum of out_features] or None.
    """

    kernel: Kernel
    requests: tuple[KernelRequest, ...]
    packed: tuple[Mapping[str, torch.Tensor], ...]
    bias: torch.Tensor | None

    @property
    def inputs(self) -> QuantSpec | None:
        """The format of the codes that `sums` takes; None: rows in high precision."""
        return self.kernel.inputs(self.requests[0]) if isinstance(self.kernel, GpuKernel) and len(self.packed) == 1 else None

    @property
    def static(self) -> torch.Tensor | None:
        """The scale of static inputs, float32 [1]."""
        return self.packed[0].get("input_scale") if self.inputs is not None else None

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold it."""
        return not isinstance(self.kernel, GpuKernel) or self.kernel.capturable

    def sums(self, x: Rows) -> torch.Tensor:
        """x W^T without the bias, in parts [parts, M, N]."""
        if isinstance(self.kernel, GpuKernel) and len(self.packed) == 1:
            return self.kernel.sums(x, self.packed[0], self.requests[0])
        products = [self.kernel.apply(x.values, p, None, r) for p, r in zip(self.packed, self.requests, strict=True)]
        return (products[0] if len(products) == 1 else torch.cat(products, -1))[None]

    def nbytes(self) -> int:
        """Of the packed weights."""
        return sum(tensor.nbytes for one in self.packed for tensor in one.values())


@dataclass(frozen=True)
class GpuBlock:
    """One transformer block. `head_norms`: weights of the norms of queries and keys (Qwen3); `sliding`: tokens it sees, 0: all."""

    input_norm: torch.Tensor
    qkv: GpuLinear
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    output: GpuLinear
    post_norm: torch.Tensor
    gate_up: GpuLinear
    down: GpuLinear
    sliding: int = 0


@dataclass(frozen=True)
class GpuModel:
    """What the engine needs of a model; tensors are on `device`.

    Attributes:
        kv: how keys and values are stored: `none`, `int8`, `fp8` or `int4`. window: newest tokens in high precision.
        rotary: transformers' module. scale: of attention's scores.
    """

    blocks: list[GpuBlock]
    embedding: torch.Tensor
    norm: torch.Tensor
    head: GpuLinear
    heads: int
    kv_heads: int
    dim: int
    epsilon: float
    scale: float
    vocabulary: int
    kv: str
    window: int
    dtype: torch.dtype
    device: str
    rotary: Any

    def linears(self) -> list[GpuLinear]:
        """All of them, the head last."""
        return [linear for b in self.blocks for linear in (b.qkv, b.output, b.gate_up, b.down)] + [self.head]

    def nbytes(self) -> int:
        """Of weights; an embedding that is the head counts once."""
        tied = any(tensor.data_ptr() == self.embedding.data_ptr() for one in self.head.packed for tensor in one.values())
        return sum(linear.nbytes() for linear in self.linears()) + (0 if tied else self.embedding.nbytes)

    def rotary_tables(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, float32 [positions, D / 2]."""
        cosine, sine = RotaryTable(self.rotary, positions, self.dtype).tables
        return cosine.to(self.device), sine.to(self.device)


def gpu_engine_refusal(config: PretrainedConfig, scheme: Scheme, device: str, dtype: torch.dtype, rotary: Any) -> str | None:
    """Why the GPU engine cannot run a model; None when it can."""
    keys = kv_kind(scheme.kv_keys)
    refused = refuse_device(device, (8, 9) if keys == "fp8" else (8, 0))
    if refused is not None:
        return refused
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the GPU engine computes in bfloat16, float16 or float32, not {dtype}"
    if config.model_type not in _FAMILIES:
        return f"the GPU engine runs {', '.join(_FAMILIES)}, not '{config.model_type}'"
    if config.hidden_act not in ("silu", "swish") or getattr(config, "mlp_bias", False):
        return "the GPU engine has SiLU without biases in the MLP"
    if keys is None or scheme.kv_keys != scheme.kv_values:
        return f"the GPU engine's cache does not know {scheme.kv_keys} with {scheme.kv_values}"
    dim = _head_dim(config)
    if dim not in _DIMS or config.num_attention_heads % config.num_key_value_heads:
        return f"the GPU engine runs heads of {', '.join(map(str, _DIMS))} channels, not {dim}"
    if keys == "int4" and dim < 64:
        return f"an INT4 cache needs heads of 64 channels or more, not {dim}"
    slides = [sliding for index in range(config.num_hidden_layers) if (sliding := _sliding(config, index))]
    if scheme.kv_keys is not None and slides and min(slides) < scheme.kv_residual_window:
        return f"layers that see {min(slides)} tokens are fewer than the {scheme.kv_residual_window} kept in high precision"
    if rotary.rope_type in ("dynamic", "longrope"):
        return f"the GPU engine has no rotary embedding that changes with the length ('{rotary.rope_type}')"
    return rotary_refusal(rotary, dim)


def model_of(loaded: LoadedModel) -> GpuModel:
    """A loaded model for the engine; its layers' packed weights become views of the joined ones.

    Raises:
        UnsupportedModelError: `gpu_engine_refusal` has a reason.
    """
    config, inner = loaded.config, loaded.model.model
    device = str(loaded.model.device)
    _check(config, loaded.scheme, device, loaded.dtype, inner.rotary_emb)

    def linear(*modules: nn.Module) -> GpuLinear:
        return _share(modules, _join([_of_module(module, loaded.dtype, device) for module in modules]))

    blocks = []
    for index, layer in enumerate(inner.layers):
        attention, mlp = layer.self_attn, layer.mlp
        norms = (attention.q_norm.weight.detach(), attention.k_norm.weight.detach()) if hasattr(attention, "q_norm") else None
        blocks.append(
            GpuBlock(
                layer.input_layernorm.weight.detach(),
                linear(attention.q_proj, attention.k_proj, attention.v_proj),
                norms,
                linear(attention.o_proj),
                layer.post_attention_layernorm.weight.detach(),
                linear(mlp.gate_proj, mlp.up_proj),
                linear(mlp.down_proj),
                _sliding(config, index),
            )
        )
    head = _of_module(loaded.model.lm_head, loaded.dtype, device)
    embedding, norm = inner.embed_tokens.weight.detach(), inner.norm.weight.detach()
    return _assemble(config, loaded.scheme, device, loaded.dtype, inner.rotary_emb, blocks, embedding, norm, head)


def random_model(
    config: PretrainedConfig,
    scheme: Scheme,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    head: QuantSpec | None = None,
    kernel: str | None = None,
    seed: int = 0,
) -> GpuModel:
    """A model of these shapes with random weights, made on the device: times depend on shapes and formats, not on the numbers.

    Args:
        head: format of the head's weight; None: `dtype`, and tied to the embedding where the configuration ties it.
        kernel: as in `dispatch.select`, for the quantized linears of the blocks.

    Raises:
        UnsupportedModelError: `gpu_engine_refusal` has a reason. KernelError: no kernel runs the format here, or there is no memory.
    """
    rotary = build_without_weights(config, dtype=dtype).model.rotary_emb
    _check(config, scheme, device, dtype, rotary)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def linear(out: int, columns: int, weights: QuantSpec | None, inputs: QuantSpec | None, bias: bool = False) -> GpuLinear:
        request = KernelRequest(weights, inputs, out, columns, device, dtype)
        chosen = select(request, prefer=kernel if weights is not None else None).kernel
        weight = normal(out, columns) * columns**-0.5 if weights is None else random_quantized(out, columns, weights, generator)
        return GpuLinear(chosen, (request,), (chosen.pack(weight, request),), normal(out) if bias else None)

    with room_for("the model's weights", device, "use a format with fewer bits or a larger device"):
        return shaped_model(config, scheme, device, dtype, rotary, linear, normal, head=head)


def shaped_model(
    config: PretrainedConfig, scheme: Scheme, device: str, dtype: torch.dtype, rotary: Any, linear: Callable[..., GpuLinear],
    normal: Callable[..., torch.Tensor], *, head: QuantSpec | None = None,
) -> GpuModel:  # fmt: skip
    """A model of the configuration's shapes, its linears made by `linear(out, columns, weights, inputs, bias)`.

    Args:
        rotary: transformers' module. normal: makes the embedding, [vocabulary, hidden]. head: as in `random_model`.
    """
    hidden, dim, biased = config.hidden_size, _head_dim(config), config.model_type == "qwen2"
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    w, x = scheme.weights, scheme.input_activations
    ones = torch.ones(hidden, dtype=dtype, device=device)
    norms = (torch.ones(dim, dtype=dtype, device=device),) * 2 if config.model_type == "qwen3" else None
    blocks = [
        GpuBlock(
            ones, linear((heads + 2 * kv_heads) * dim, hidden, w, x, biased), norms, linear(hidden, heads * dim, w, x), ones,
            linear(2 * width, hidden, w, x), linear(hidden, width, w, x), _sliding(config, index),
        )
        for index in range(config.num_hidden_layers)
    ]  # fmt: skip
    embedding = normal(config.vocab_size, hidden)
    if head is None and config.tie_word_embeddings:
        request = KernelRequest(None, None, config.vocab_size, hidden, device, dtype)
        dense = DenseKernel()
        last = GpuLinear(dense, (request,), (dense.pack(embedding, request),), None)
    else:
        last = linear(config.vocab_size, hidden, head, None)
    return _assemble(config, scheme, device, dtype, rotary, blocks, embedding, ones, last)


def _assemble(
    config: PretrainedConfig, scheme: Scheme, device: str, dtype: torch.dtype, rotary: Any, blocks: list[GpuBlock],
    embedding: torch.Tensor, norm: torch.Tensor, head: GpuLinear,
) -> GpuModel:  # fmt: skip
    dim, kind = _head_dim(config), kv_kind(scheme.kv_keys)
    assert kind is not None
    return GpuModel(
        blocks, embedding, norm, head, config.num_attention_heads, config.num_key_value_heads, dim, config.rms_norm_eps, dim**-0.5,
        config.vocab_size, kind, scheme.kv_residual_window, dtype, device, rotary,
    )  # fmt: skip


def _check(config: PretrainedConfig, scheme: Scheme, device: str, dtype: torch.dtype, rotary: Any) -> None:
    refused = gpu_engine_refusal(config, scheme, device, dtype, rotary)
    if refused is not None:
        raise UnsupportedModelError(f"the GPU engine cannot run this model: {refused}", "run it through transformers")


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _sliding(config: PretrainedConfig, index: int) -> int:
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    slides = kinds[index] == "sliding_attention" if kinds else config.model_type == "mistral"
    return int(getattr(config, "sliding_window", None) or 0) if slides else 0


def _of_module(module: nn.Module, dtype: torch.dtype, device: str) -> GpuLinear:
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach()
    if isinstance(module, QuantLinear):
        method = module.quant_method
        return GpuLinear(method.selection.kernel, (method.request,), (method.packed(module),), bias)
    weight = module.get_parameter("weight").detach()
    request = KernelRequest(None, None, weight.shape[0], weight.shape[1], device, dtype)
    kernel = select(request).kernel
    return GpuLinear(kernel, (request,), (kernel.pack(weight, request),), bias)


def _join(linears: list[GpuLinear]) -> GpuLinear:
    """One linear of all of them: over one packed weight where the kernel can, else side by side."""
    if len(linears) == 1:
        return linears[0]
    kernel, first = linears[0].kernel, linears[0].requests[0]
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat([one for one in biases if one is not None])
    packed = [one for linear in linears for one in linear.packed]
    requests = tuple(request for linear in linears for request in linear.requests)
    same = all(
        one.kernel is kernel and (one.requests[0].weights, one.requests[0].input_activations) == (first.weights, first.input_activations)
        for one in linears
    )
    joined = None
    if same and isinstance(kernel, GpuKernel):
        joined = kernel.join(packed, first)
    elif same and kernel.name == "dense":
        joined = {"weight": torch.cat([one["weight"] for one in packed])}
    if joined is None:
        return GpuLinear(kernel, requests, tuple(packed), bias)
    whole = replace(first, out_features=sum(request.out_features for request in requests))
    return GpuLinear(kernel, (whole,), (joined,), bias)


def _share(modules: Sequence[nn.Module], linear: GpuLinear) -> GpuLinear:
    """Make the modules' tensors views of the joined ones."""
    if len(modules) > 1 and len(linear.packed) == 1:
        for name, tensor in linear.packed[0].items():
            first = 0
            for module in modules:
                own = getattr(module, name)
                if own.shape[1:] != tensor.shape[1:] or name in ("table", "input_scale"):
                    continue
                view = tensor[first : first + own.shape[0]]
                first += own.shape[0]
                if isinstance(own, nn.Parameter):
                    own.data = view
                else:
                    setattr(module, name, view)
    return linear


def random_quantized(rows: int, columns: int, spec: QuantSpec, generator: torch.Generator) -> QuantizedTensor:
    """Random codes with scales that make the weights about columns**-0.5 in size."""
    device = generator.device
    if spec.type == "int":
        span = 2 ** (spec.num_bits - 1)
        values = torch.randint(-span, span, (rows, columns), generator=generator, device=device, dtype=torch.int8)
        size = span / 1.7
    elif spec.num_bits == 8:
        values = torch.randn(rows, columns, generator=generator, device=device).to(value_dtype(spec))
        size = 1.0
    else:
        values = torch.randint(0, 2**spec.num_bits, (rows, columns), generator=generator, device=device, dtype=torch.uint8)
        size = 0.6 if spec.type == "nf" else 3.0
    shape, scale = scale_shape(spec, rows, columns), columns**-0.5 / size
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if spec.scale_dtype == "e8m0":
        scales = torch.full(shape, 120, dtype=torch.uint8, device=device)
    elif spec.scale_dtype == "float8_e4m3fn":
        scales = torch.full(shape, 1.0, device=device).to(torch.float8_e4m3fn)
    else:
        scales = torch.full(shape, scale, device=device).to(dtypes[spec.scale_dtype])
    zero = None if spec.symmetric else torch.zeros(shape, dtype=torch.int8, device=device)
    overall = torch.full((1,), scale, device=device) if spec.global_scale else None
    return QuantizedTensor(values, scales, spec, zero, global_scale=overall)
