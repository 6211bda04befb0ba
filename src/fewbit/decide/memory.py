"""Whether a deployment fits: weights + KV cache + workspace + what the system needs, against the device's memory.

    weights     every tensor in its format, scales included, what stays in high precision in 16 bit      (exact)
    cache       sequences x the cache of one, windows and latent vectors counted                          (exact)
    workspace   inputs and outputs of the widest layers for the tokens computed at once, and logits       (rule of thumb)
    reserved    driver, runtime, operating system                                                         (rule of thumb)

The first two are most of it and are arithmetic; the other two are stated so that a reader can disagree. Runtimes compute prompts in chunks,
so the workspace does not grow with the prompt beyond `CHUNK_TOKENS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fewbit.formats.spec import Scheme
from fewbit.models.inventory import Inventory
from fewbit.predict.hardware import Hardware

__all__ = ["CHUNK_TOKENS", "MemoryNeed", "largest_batch", "largest_context", "memory_need", "workspace_bytes"]

CHUNK_TOKENS = 2048
_LIVE_HIDDEN, _LIVE_WIDE = 4, 2  # hidden states, and inputs and outputs of the widest linear, that live at the same time
_TYPICAL_BARE_LAYERS = 32
_LARGEST = 1 << 24


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a deployment takes on one device.

    Attributes:
        total: all of them. capacity: of the device. fits: total is at most capacity.
    """

    weights: float
    cache: float
    workspace: float
    reserved: float
    capacity: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.weights + self.cache + self.workspace + self.reserved

    @property
    def fits(self) -> bool:
        """Whether the device holds it."""
        return self.total <= self.capacity


def workspace_bytes(inventory: Inventory, batch: int, tokens: int) -> float:
    """Activations of the tokens that are computed at once, 16 bit, and float32 logits of one token per sequence.

    Args:
        batch: sequences. tokens: of prompts that wait to be computed, in all.
    """
    hidden, widest = inventory.hidden_size, 0
    for one in inventory.tensors:
        if one.linear and len(one.shape) == 2 and one.role not in ("embedding", "head", "vision"):
            widest = max(widest, one.shape[0])
    if not hidden:  # of a bare count: 12 hidden^2 weights in each of 32 layers
        hidden = round(math.sqrt(inventory.parameters / 12 / (inventory.layers or _TYPICAL_BARE_LAYERS)))
        widest = 4 * hidden
    at_once = max(batch, min(tokens, CHUNK_TOKENS))
    return 2.0 * at_once * (_LIVE_HIDDEN * hidden + _LIVE_WIDE * widest) + 4.0 * batch * inventory.vocabulary


def memory_need(
    inventory: Inventory, scheme: Scheme, cache: Scheme | None, hardware: Hardware, *, batch: int, context: int, prompt: int | None = None
) -> MemoryNeed:
    """What one device has to hold.

    Args:
        scheme: formats of the weights. cache: whose KV formats; None for BF16.
        batch: sequences at once. context: tokens that each has at the end.
        prompt: tokens of each prompt; `context` when None.

    Raises:
        FormatError: a group size that does not divide a linear.
    """
    return MemoryNeed(
        weights=inventory.bytes_in(scheme.weights),
        cache=batch * inventory.kv_bytes(context, cache),
        workspace=workspace_bytes(inventory, batch, batch * (context if prompt is None else prompt)),
        reserved=float(hardware.reserved_bytes),
        capacity=float(hardware.memory_bytes),
    )


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number up to `_LARGEST` that fits, by bisection; 0 when not even 1 does."""
    low, high = 0, 1
    while high < _LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch(inventory: Inventory, scheme: Scheme, cache: Scheme | None, hardware: Hardware, context: int) -> int | None:
    """Sequences of `context` tokens that fit at once; None where the cache is unknown and nothing would stop them."""
    if not inventory.kv:
        return None
    return _most(lambda batch: memory_need(inventory, scheme, cache, hardware, batch=batch, context=context).fits)


def largest_context(inventory: Inventory, scheme: Scheme, cache: Scheme | None, hardware: Hardware, batch: int) -> int | None:
    """Tokens that each of `batch` sequences can have, by memory and by the model's positions; None where the cache is unknown."""
    if not inventory.kv:
        return None
    most = _most(lambda tokens: memory_need(inventory, scheme, cache, hardware, batch=batch, context=tokens).fits)
    return most if inventory.max_context is None else min(most, inventory.max_context)
