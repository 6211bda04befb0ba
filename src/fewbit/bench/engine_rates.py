"""What the engine needs besides products with weights: attention over the cache, and everything between the products.

Both are measured on small models that are made for it, with every product left out (`Engine.emptied`), so that nothing else is in the time:

    attention   nanoseconds per cached token and key head, by head dimension, by how many query heads share a key head, and by the cache's
                format: keys and values are read and dequantized once for all of them, scores and sums are computed for each
    prefill     the same per pair of a new token and one that it sees
    overhead    a step over an almost empty cache: a constant for barriers and launches, and so much per number that goes into or comes out
                of a product (norms, activation functions, residuals, rounding)

The caches together are larger than the last-level cache, as those of a real batch are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from fewbit.bench.kernel_rates import MEASURED_KERNELS, RatePlan, measure_kernel_rates
from fewbit.bench.machine import measure_read_bandwidth
from fewbit.bench.undisturbed import Passes
from fewbit.kernels.base import Compute
from fewbit.kernels.cpu.extension import missing_native, native, use_torch_threads
from fewbit.results import AttentionRate, EngineRates

__all__ = ["AttentionPlan", "measure_engine_rates"]

# Operators of a step as `predict.outline` counts them.
_OPERATORS_PER_LAYER, _OPERATORS_OUTSIDE = 12, 4
_CACHES = {"BF16": ("none", 0), "KV-INT8": ("int8", 0), "KV-FP8": ("fp8", 0), "KV-INT4": ("int4", 32)}
_VOCABULARY = 64
_PASSES = 3


@dataclass(frozen=True)
class AttentionPlan:
    """Which attention is measured: every head dimension with every group of query heads, and the quantized caches with one query head."""

    dims: tuple[int, ...] = (64, 128)
    groups: tuple[int, ...] = (1, 2, 4, 6, 7, 8)
    layers: int = 4
    kv_heads: int = 2
    sequences: int = 8
    tokens: int = 4096
    prompt: int = 1024
    rounds: int = 3


_QUICK_KERNELS = RatePlan((1, 8, 64), (128, 256), 1 << 17, 256, cache_share=0.0, rounds=1, budget_s=0.0)
_QUICK_ATTENTION = AttentionPlan((64,), (1, 4), 1, 2, 1, 256, 128, 1)


def measure_engine_rates(
    *,
    quick: bool = False,
    kernels: Sequence[tuple[str, Compute]] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> EngineRates | None:
    """Rates of this machine's CPU kernels and engine, about a minute; None without the native extension.

    Args:
        quick: small sizes and one geometry of attention, for tests.
        kernels: (scheme, compute mode) to measure; all of `MEASURED_KERNELS` when None.
        progress: called with (steps done, steps in all, what is next).
    """
    if missing_native() is not None:
        return None
    say = progress or (lambda *_: None)
    kernels = MEASURED_KERNELS if kernels is None else kernels
    total = len(kernels) + 2
    say(0, total, "bandwidth")
    before = measure_read_bandwidth(passes=1 if quick else 4)[0]
    rates = measure_kernel_rates(kernels, _QUICK_KERNELS if quick else RatePlan(), lambda done, what: say(1 + done, total, what))
    say(total - 1, total, "attention")
    attention = _attention(_QUICK_ATTENTION if quick else AttentionPlan())
    operator_us, ns_per_activation = _overhead(quick=quick)
    after = measure_read_bandwidth(passes=1 if quick else 4)[0]
    return EngineRates((before + after) / 2, use_torch_threads(), rates, attention, operator_us, ns_per_activation)


class _Model:
    """An engine of some layers without products, and a cache.

    Args:
        layers, heads, kv_heads, dim, hidden, intermediate: the model's shape.
        sequences, capacity: the cache's. cache: a key of `_CACHES`.
    """

    def __init__(
        self, layers: int, heads: int, kv_heads: int, dim: int, hidden: int, intermediate: int, sequences: int, capacity: int, cache: str
    ) -> None:
        width, kv_width = heads * dim, kv_heads * dim
        shapes = [(width, hidden), (kv_width, hidden), (kv_width, hidden), (hidden, width), (intermediate, hidden), (intermediate, hidden)]
        self.activations = layers * sum(map(sum, [*shapes, (hidden, intermediate)])) + hidden + _VOCABULARY
        linears = [_zeros(*shape) for shape in [*shapes, (hidden, intermediate)]]
        norm, embedding = torch.ones(hidden), torch.zeros(_VOCABULARY, hidden, dtype=torch.bfloat16)
        head = _zeros(_VOCABULARY, hidden)
        self._kept = (norm, embedding, linears, head)  # the native engine points to them
        layer = native.engine_layer(hidden, dim, norm, norm, None, None, linears, [None] * 7, 0)
        self._engine = native.Engine(
            embedding, [layer] * layers, norm, head, None,
            heads=heads, kv_heads=kv_heads, dim=dim, intermediate=intermediate, epsilon=1e-6, scale=dim**-0.5, bf16=True,
        )  # fmt: skip
        self._engine.set_emptied(True)
        history, window = _CACHES[cache]
        self._cache = native.EngineCache(layers, sequences, kv_heads, dim, capacity, history, "bfloat16", window)
        self._rotary = torch.ones(capacity, dim // 2), torch.zeros(capacity, dim // 2)

    def decode(self, length: int, rows: int, passes: int) -> tuple[float, float]:
        """(milliseconds of attention, of the whole step), medians; `rows` sequences with so many tokens each."""
        for sequence in range(rows):
            self._cache.fill(sequence, length)
        tokens, logits = torch.zeros(rows, dtype=torch.long), torch.empty(rows, _VOCABULARY)
        best = torch.empty(rows, dtype=torch.long)
        attention, whole = Passes(), Passes()

        def step() -> float:
            started = time.perf_counter()
            self._engine.decode(self._cache, *self._rotary, tokens, logits, best)
            elapsed = 1e3 * (time.perf_counter() - started)
            for sequence in range(rows):
                self._cache.crop(sequence, length)
            return elapsed

        step()
        for _ in range(passes):
            whole.run(step)
            attention.values.append(self._engine.times.attention)
        attention.waiting = whole.waiting
        return attention.median(), whole.median()

    def prefill(self, length: int, count: int) -> float:
        """Milliseconds of attention of `count` new tokens (at most a chunk of the engine's, 512) behind `length` others."""
        self._cache.fill(0, length)
        logits, best = torch.empty(1, _VOCABULARY), torch.empty(1, dtype=torch.long)
        times = Passes()

        def chunk() -> float:
            self._engine.prefill(self._cache, *self._rotary, 0, torch.zeros(count, dtype=torch.long), logits, best)
            self._cache.crop(0, length)
            return self._engine.times.attention

        for _ in range(_PASSES):
            times.run(chunk)
        return times.median()


def _zeros(rows: int, columns: int) -> native.Linear:
    return native.dense_linear(torch.zeros(rows, columns, dtype=torch.bfloat16))


def _attention(plan: AttentionPlan) -> list[AttentionRate]:
    """Every geometry in rounds, for the same reason as the kernels; the median of the rounds."""
    use_torch_threads()
    found: dict[tuple[str, str, int, int], list[float]] = defaultdict(list)
    new, before = plan.prompt // 2, plan.prompt - plan.prompt // 2
    pairs = new * before + new * (new + 1) / 2
    for _ in range(plan.rounds):
        for dim in plan.dims:
            for group in plan.groups:
                model = _attention_model(plan, dim, group, "BF16")
                found["decode", "BF16", dim, group].append(_per_token(model, plan))
                found["prefill", "BF16", dim, group].append(1e6 * model.prefill(before, new) / pairs / (plan.layers * plan.kv_heads))
            for cache in list(_CACHES)[1:]:
                found["decode", cache, dim, 1].append(_per_token(_attention_model(plan, dim, 1, cache), plan))
    return [AttentionRate(*key, median(values)) for key, values in found.items()]


def _attention_model(plan: AttentionPlan, dim: int, group: int, cache: str) -> _Model:
    heads = group * plan.kv_heads
    return _Model(plan.layers, heads, plan.kv_heads, dim, 64, 64, plan.sequences, plan.tokens + 1, cache)


def _per_token(model: _Model, plan: AttentionPlan) -> float:
    """Nanoseconds per cached token and key head; what a step costs over an empty cache belongs to the overhead."""
    long, short = (model.decode(length, plan.sequences, _PASSES)[0] for length in (plan.tokens, 1))
    return 1e6 * max(long - short, 0.0) / (plan.layers * plan.kv_heads * plan.sequences * (plan.tokens - 1))


def _overhead(*, quick: bool) -> tuple[float, float]:
    """(microseconds per operator, nanoseconds per number that goes into or comes out of a product)."""
    layers, rows = (2, 4) if quick else (12, 32)
    model = _Model(layers, 16, 4, 64, 1024, 4096, rows, 16, "BF16")
    passes = 3 if quick else 40
    one, many = (model.decode(1, count, passes)[1] for count in (1, rows))
    per_activation = max(many - one, 0.0) / (rows - 1) / model.activations  # milliseconds
    constant = max(one - per_activation * model.activations, 0.0)
    return 1e3 * constant / (_OPERATORS_PER_LAYER * layers + _OPERATORS_OUTSIDE), 1e6 * per_activation
