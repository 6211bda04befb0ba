"""What a step must read and compute, counted from the modules that are there, not from a formula per architecture.

A decode step reads every linear's weight once, lm_head included, and of the embedding table one row, which is not counted. With tied
embeddings the head's bytes are the table's. An unfused kernel also writes and reads dequantized copies (`Kernel.weight_traffic_bytes`),
and attention reads the cached keys and values; through transformers a quantized cache is dequantized into a copy that is written and
read, too. Operations: two per weight and token, and four per cached token and head dimension for the scores and their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fewbit.bench.overhead import linears
from fewbit.bench.scaling import LayerScale, decoder_blocks
from fewbit.models.accounting import kv_bytes_per_token, kv_scheme_bytes_per_token, kv_shape
from fewbit.models.families import operator_class
from fewbit.runtime.linear import QuantLinear
from fewbit.runtime.load import LoadedModel

__all__ = ["StepCost", "linear_bytes", "step_cost"]


@dataclass(frozen=True)
class StepCost:
    """What one pass over the model moves and computes, scaled to the whole stack.

    Attributes:
        weight_bytes: resident bytes of the weights it reads.
        traffic_bytes: these, the copies of unfused kernels, and the cache.
        operations: multiplications and additions, each counted as one.
    """

    weight_bytes: int
    traffic_bytes: int
    operations: int


def linear_bytes(module: nn.Module) -> tuple[int, int]:
    """(resident bytes, bytes of traffic at M = 1) of one linear's weight."""
    if isinstance(module, QuantLinear):
        method = module.quant_method
        packed = method.packed(module)
        resident = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
        return resident, method.selection.kernel.weight_traffic_bytes(packed, method.request)
    weight = module.get_parameter("weight")
    return weight.numel() * weight.element_size(), weight.numel() * weight.element_size()


def step_cost(loaded: LoadedModel, scale: LayerScale, *, tokens: int, context: int, cache_copies: bool = True) -> StepCost:
    """The cost of passing `tokens` new tokens of one sequence through the model, with `context` tokens cached before them.

    The head computes logits for the last token only, as `runtime.generate` asks it to. `cache_copies`: attention reads a dequantized copy
    of a quantized cache (transformers), not the cache itself (the engine).
    """
    stack_prefix = decoder_blocks(loaded.model)[0] + "."
    model_type = loaded.model.config.model_type
    weight, traffic, operations = _Sum(scale), _Sum(scale), _Sum(scale)
    for name, module in linears(loaded.model):
        in_stack = name.startswith(stack_prefix)
        rows = 1 if operator_class(name, model_type) == "lm_head" else tokens
        resident, moved = linear_bytes(module)
        weight.add(resident, in_stack)
        traffic.add(moved, in_stack)
        operations.add(2 * module.in_features * module.out_features * rows, in_stack)
    layers, _, head_dim = kv_shape(loaded.config)
    heads = loaded.config.get_text_config(decoder=True).num_attention_heads
    seen = context * tokens + tokens * (tokens + 1) // 2  # causal: token i of the new ones sees the context and itself with those before it
    operations.add(4 * layers * heads * head_dim * seen, in_stack=True)
    traffic.add(_cache_bytes_per_token(loaded, cache_copies) * (context + tokens), in_stack=True)
    return StepCost(weight_bytes=weight.total(), traffic_bytes=traffic.total(), operations=operations.total())


def _cache_bytes_per_token(loaded: LoadedModel, copies: bool) -> float:
    stored = kv_scheme_bytes_per_token(loaded.config, loaded.scheme)
    return stored if loaded.scheme.kv_keys is None or not copies else stored + 2 * kv_bytes_per_token(loaded.config, None)


class _Sum:
    """A figure that adds up over the linears, with the part inside the layers kept apart for scaling."""

    def __init__(self, scale: LayerScale) -> None:
        self._scale = scale
        self._whole = 0.0
        self._stack = 0.0

    def add(self, value: float, in_stack: bool) -> None:
        self._whole += value
        self._stack += value if in_stack else 0.0

    def total(self) -> int:
        return round(self._scale.scale(self._whole, self._stack))
