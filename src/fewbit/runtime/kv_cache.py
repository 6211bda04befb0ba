"""The KV cache, in high precision or quantized, on transformers' Cache interface: any model that takes `past_key_values` takes this one.

Per layer, keys and values [batch, kv_heads, tokens, head_dim] are two streams. A stream is

    history   quantized, packed densely, in buffers that grow by half (so a step copies nothing but itself)
    window    the newest tokens in high precision; when a token leaves the window, it is quantized into the history

What shares a scale is the scheme's QuantSpec:

    token     one token of one head                     INT8, FP8: head_dim bytes + one scale
    group     32 neighbours of one token of one head    INT4 affine: 16 + 2 + 1 bytes for 32 values = 4.75 bits
    channel   32 tokens of one channel of one head      KIVI's keys (arXiv 2402.02750): the outliers of keys sit in fixed channels, so a
              scale per channel keeps them from ruining the others. 32 tokens enter the history at once, so the window holds
              up to 31 tokens more than the scheme says.

In memory, for n tokens of capacity and a unit of u tokens (32 for `channel`, else 1), each with [batch, kv_heads] in front:

    values       uint8 [n / u, u * head_dim * num_bits / 8]
    scale        [n / u, scales per unit]           in the spec's scale dtype
    zero_point   int8, like scale, when affine

Keys arrive after their rotary embedding and are stored so. `update` returns what attention reads: the history dequantized into one
fresh tensor, then the window. This dequantized copy exists for one layer at a time; memory that stays is the packed one. Tokens that
leave the window in a call are read quantized in that very call. A cache that is read many times for each token that enters (a text
in chunks of 16 tokens, each of which reads all before it) may keep the dequantized history beside the packed one, a *shadow*: the same
values, decoded once instead of once per chunk. Layers with a sliding window keep all tokens too, and the mask hides
the older ones: simple, and exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from fewbit.errors import FormatError, MeasurementError, UnsupportedModelError
from fewbit.formats.packing import pack_values, unpack_values
from fewbit.formats.quantize import dequantize_dynamic, quantize_dynamic
from fewbit.formats.spec import QuantSpec, Scheme

__all__ = ["KVCache", "KVLayer"]

_FIRST_CAPACITY = 64  # tokens


class _GrowingBuffer:
    """A tensor [batch, heads, capacity, ...] that rows are appended to; the capacity grows by half at a time."""

    def __init__(self, like: torch.Tensor, capacity: int) -> None:
        """Args: like: [batch, heads, rows, ...] gives dtype, device and the other dimensions; its contents are not taken."""
        self.storage = like.new_empty((*like.shape[:2], max(capacity, 1), *like.shape[3:]))
        self.length = 0

    def append(self, rows: torch.Tensor) -> None:
        needed = self.length + rows.shape[2]
        if needed > self.storage.shape[2]:
            old = self.storage
            self.storage = old.new_empty((*old.shape[:2], max(needed, old.shape[2] * 3 // 2), *old.shape[3:]))
            self.storage[:, :, : self.length] = old[:, :, : self.length]
        self.storage[:, :, self.length : needed] = rows
        self.length = needed

    def rows(self) -> torch.Tensor:
        """What was appended: a view [batch, heads, length, ...]."""
        return self.storage[:, :, : self.length]

    def select_batch(self, indices: torch.Tensor) -> None:
        self.storage = self.storage.index_select(0, indices.to(self.storage.device))

    def nbytes(self) -> int:
        return self.storage.untyped_storage().nbytes()

    def bytes_per_row(self) -> float:
        """Of one batch entry."""
        return self.nbytes() / (self.storage.shape[0] * self.storage.shape[2])


class _History:
    """Quantized tokens of one stream, in units of `unit` tokens."""

    def __init__(self, spec: QuantSpec, like: torch.Tensor, *, shadow: bool) -> None:
        """Args: like: [batch, heads, any, head_dim] gives shapes, dtype and device. shadow: also keep what is stored, dequantized."""
        # One calibrated scale for all is what servers need; here every token gets its own as it arrives, which is finer.
        self.spec = spec = replace(spec, strategy="token") if spec.strategy == "tensor" else spec
        self.unit = spec.group_size if spec.strategy == "channel" and spec.group_size is not None else 1
        self.head_dim = like.shape[3]
        self.dtype = like.dtype
        # One unit of zeros, quantized, tells the shapes and dtypes of what will be stored.
        parts = self._encode(like.new_zeros((*like.shape[:2], self.unit, self.head_dim)))
        self.buffers = [_GrowingBuffer(part, _FIRST_CAPACITY // self.unit) for part in parts]
        self.shadow = _GrowingBuffer(like, _FIRST_CAPACITY) if shadow else None

    @property
    def tokens(self) -> int:
        return self.buffers[0].length * self.unit

    def append(self, x: torch.Tensor) -> None:
        """Quantize x [batch, heads, k * unit, head_dim]."""
        parts = self._encode(x)
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer.append(part)
        if self.shadow is not None:
            self.shadow.append(self._decode(parts))

    def dequantized(self) -> torch.Tensor:
        """[batch, heads, tokens, head_dim] in the model's dtype."""
        return self._decode([buffer.rows() for buffer in self.buffers]) if self.shadow is None else self.shadow.rows()

    def _decode(self, parts: list[torch.Tensor]) -> torch.Tensor:
        packed, scale, *rest = parts
        values = unpack_values(packed, self.spec, self.unit * self.head_dim)
        values = values.reshape(*values.shape[:2], -1, self.head_dim)
        zero_point = rest[0] if rest else None
        return dequantize_dynamic(values, scale, zero_point, self.spec, self.dtype)

    def crop(self, tokens: int) -> torch.Tensor:
        """Keep `tokens` tokens in whole units; returns the rest of a cut unit, dequantized: [batch, heads, tokens % unit, head_dim]."""
        rest = self.dequantized()[:, :, tokens - tokens % self.unit : tokens]
        for buffer in self.buffers:
            buffer.length = tokens // self.unit
        if self.shadow is not None:
            self.shadow.length = tokens - tokens % self.unit
        return rest

    def _encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x as rows of units: packed values, scale and, when affine, zero point."""
        values, scale, zero_point = quantize_dynamic(x, self.spec)
        batch, heads = x.shape[:2]
        packed = pack_values(values.reshape(batch, heads, -1, self.unit * self.head_dim), self.spec)
        return [packed, scale] if zero_point is None else [packed, scale, zero_point]


class _Stream:
    """Keys or values of one layer: the history and the window of newest tokens."""

    def __init__(self, spec: QuantSpec | None, window: int, like: torch.Tensor, *, shadow: bool) -> None:
        self.window_tokens = window
        self.history = None if spec is None else _History(spec, like, shadow=shadow)
        # In high precision everything is window; beside a history the window never holds more than this.
        capacity = _FIRST_CAPACITY if self.history is None else window + self.history.unit - 1
        self.window = _GrowingBuffer(like, capacity)

    @property
    def tokens(self) -> int:
        return self.window.length + (self.history.tokens if self.history else 0)

    def append(self, x: torch.Tensor) -> torch.Tensor:
        """Append x [batch, heads, new, head_dim]; returns [batch, heads, tokens, head_dim], which must not be changed."""
        if self.history is None:
            self.window.append(x)
            return self.window.rows()
        recent = torch.cat([self.window.rows(), x], dim=2)
        leaving = max(recent.shape[2] - self.window_tokens, 0) // self.history.unit * self.history.unit
        if leaving:
            self.history.append(recent[:, :, :leaving])
            recent = recent[:, :, leaving:]
        self.window.length = 0
        self.window.append(recent)
        if not self.history.tokens:
            return recent
        history = self.history.dequantized()
        return torch.cat([history, recent], dim=2) if recent.shape[2] else history

    def crop(self, tokens: int) -> None:
        """Keep the oldest `tokens` tokens."""
        stored = self.history.tokens if self.history else 0
        if tokens >= stored or self.history is None:
            self.window.length = tokens - stored
            return
        self.window.length = 0
        self.window.append(self.history.crop(tokens))

    def buffers(self) -> list[_GrowingBuffer]:
        shadow = [self.history.shadow] if self.history and self.history.shadow else []
        return [*(self.history.buffers if self.history else ()), *shadow, self.window]

    def bytes_per_token(self) -> float:
        if self.history is None:
            return self.window.bytes_per_row()
        return sum(buffer.bytes_per_row() for buffer in self.history.buffers) / self.history.unit

    def constant_bytes(self) -> int:
        return (
            0
            if self.history is None or self.window_tokens + self.history.unit == 1
            else self.window.nbytes() // self.window.storage.shape[0]
        )


class KVLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values in a scheme's formats; tensors are [batch, kv_heads, tokens, head_dim]."""

    is_croppable = True
    is_sliding = False

    def __init__(self, scheme: Scheme, dtype: torch.dtype, *, shadow: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scheme = scheme
        self._dtype = dtype
        self._shadow = shadow
        self._streams: tuple[_Stream, _Stream] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers for tensors of this shape."""
        window = self._scheme.kv_residual_window
        pairs = ((self._scheme.kv_keys, key_states), (self._scheme.kv_values, value_states))
        for spec, states in pairs:
            if spec is not None and spec.strategy == "group" and states.shape[-1] % (spec.group_size or 1):
                raise FormatError(
                    f"KV group size {spec.group_size} does not divide the model's head_dim {states.shape[-1]}",
                    "use KV-INT8 or KV-FP8, one scale per head",
                )
        keys, values = (_Stream(spec, window, states.to(self._dtype), shadow=self._shadow) for spec, states in pairs)
        self._streams = (keys, values)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append and return what attention reads, in the dtype of the cache."""
        if self._streams is None:
            self.lazy_initialization(key_states, value_states)
        assert self._streams is not None
        keys, values = self._streams
        return keys.append(key_states.to(self._dtype)), values.append(value_states.to(self._dtype))

    def get_seq_length(self) -> int:
        """Tokens that are cached."""
        return 0 if self._streams is None else self._streams[0].tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that attention will see, offset of the first)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; their number is given negative, as transformers does. (A positive number meant the length to keep up to
        transformers 5.17 and is an error since: guessing would drop the wrong tokens.)"""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        if self._streams is not None and tokens_to_remove:
            kept = max(self.get_seq_length() + tokens_to_remove, 0)
            for stream in self._streams:
                stream.crop(kept)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self._streams = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Batch entry i becomes what beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch entry `repeats` times."""
        if self._streams is not None:
            batch = self._streams[0].window.storage.shape[0]
            self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these batch entries."""
        for buffer in self.buffers():
            buffer.select_batch(indices)

    def buffers(self) -> list[_GrowingBuffer]:
        """All buffers of keys and values."""
        return [buffer for stream in self._streams or () for buffer in stream.buffers()]

    def streams(self) -> tuple[_Stream, ...]:
        """Keys and values; empty before the first update."""
        return self._streams or ()


class KVCache(Cache):
    """The cache of a whole model.

    Args:
        config: of the model; a layer per hidden layer.
        scheme: formats of keys and values, and the window; without formats everything is kept in `dtype`.
        dtype: of the model's activations.
        shadow: keep the quantized history dequantized, too. Reads are the same values and faster, memory is that of both.

    Raises:
        UnsupportedModelError: the model has layers without a KV cache (linear attention, state spaces).
    """

    def __init__(self, config: PretrainedConfig, scheme: Scheme, dtype: torch.dtype = torch.bfloat16, *, shadow: bool = False) -> None:
        text = config.get_text_config(decoder=True)
        foreign = {
            kind for kind in getattr(text, "layer_types", None) or () if not kind.endswith("attention") or kind == "linear_attention"
        }
        if foreign:
            raise UnsupportedModelError(
                f"models of type '{config.model_type}' have layers without keys and values ({', '.join(sorted(foreign))})",
                "compare a transformer model",
            )
        self.scheme = scheme
        self._layers = [KVLayer(scheme, dtype, shadow=shadow) for _ in range(text.num_hidden_layers)]
        super().__init__(layers=list(self._layers))

    def nbytes(self) -> int:
        """Bytes of all buffers as allocated, capacity that is not used yet included, for the whole batch."""
        return sum(buffer.nbytes() for layer in self._layers for buffer in layer.buffers())

    def bytes_per_token(self) -> float:
        """Bytes that one more token of one sequence takes in the long run, scales and zero points included; from the stored tensors.

        Raises:
            MeasurementError: nothing was cached yet, so there are no tensors.
        """
        if not any(layer.is_initialized for layer in self._layers):
            raise MeasurementError("the KV cache is empty, its bytes cannot be measured", "run a token through the model first")
        return sum(stream.bytes_per_token() for layer in self._layers for stream in layer.streams())

    def constant_bytes(self) -> int:
        """Bytes per sequence that do not grow: the window in high precision. 0 when there is no quantized history."""
        return sum(stream.constant_bytes() for layer in self._layers for stream in layer.streams())
