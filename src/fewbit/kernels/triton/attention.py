"""One new token per sequence attends to a quantized KV cache, read as it is stored: no dequantized copy is written.

    INT8, FP8   a scale per token and head multiplies the score of a key, and the weight of a value: one product each, not one per channel
    INT4        affine in groups of 32 channels: unpacked and scaled in registers

**Split over the sequence** (Flash-Decoding, PyTorch blog 2023). A step has few rows: with a program per sequence and head most of a GPU
would idle. So each part of the cached tokens is a program, with a softmax of its own; `_combine` weighs the parts by their sums. Parts are
counted on the device from the sequence's length, so that one CUDA graph serves every length.

**Grouped queries** (arXiv 2305.13245). The heads that share a key are rows of one tensor-core tile: keys and values are read once for all.

Values and scales of head h of sequence b lie together, [sequences, kv heads, capacity, ...]; `append` writes them:

    none   the model's dtype [.., D]
    int8   int8 [.., D], scale bfloat16 [..]
    fp8    float8_e4m3fn [.., D], scale bfloat16 [..]
    int4   uint8 [.., D / 2]: channel c in the low half, c + D / 2 in the high half; scale bfloat16, zero point int8 [.., D / 32]

A scheme may keep the newest tokens in high precision (`window`): a ring of so many tokens beside the cache. Every token is quantized when
it comes, and read from the cache when it has left the ring. The order of tokens does not matter to attention, so a ring will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from fewbit.kernels.triton.cache_codes import INT4_GROUP, byte_numbers, int4_half
from fewbit.kernels.triton.environment import interpreted
from fewbit.kernels.triton.rows import _TRITON_DTYPES, _round, _to_e4m3

__all__ = ["INT4_GROUP", "CacheLayer", "append", "attend", "new_layer", "parts_for", "read"]

_GROUP = tl.constexpr(INT4_GROUP)
_SMALLEST = tl.constexpr(1.1754943508222875e-38)  # formats.scales.SMALLEST_SCALE of bfloat16: 2**-126
_PROGRAMS_PER_MULTIPROCESSOR, _LEAST_TOKENS, _MOST_PARTS = 16, 256, 64  # of a split over the sequence
_BLOCK_VALUES = 64 * 128  # of keys that a step of the loop reads, twice as many of 8 bits: with the values' in 3 stages less than 99 KiB


@dataclass(frozen=True)
class CacheLayer:
    """Keys and values of one layer.

    Attributes:
        kind: `none`, `int8`, `fp8` or `int4`.
        keys, values: [sequences, kv heads, capacity, D or D / 2].
        key_scale, value_scale: bfloat16 [sequences, kv heads, capacity] or [.., D / 32]; of one element for `none`.
        key_zero, value_zero: int8 [sequences, kv heads, capacity, D / 32] for `int4`, else of one element.
        key_ring, value_ring: [sequences, kv heads, window, D] in the model's dtype; of no token without a window.
    """

    kind: str
    keys: torch.Tensor
    values: torch.Tensor
    key_scale: torch.Tensor
    value_scale: torch.Tensor
    key_zero: torch.Tensor
    value_zero: torch.Tensor
    key_ring: torch.Tensor
    value_ring: torch.Tensor

    @property
    def window(self) -> int:
        """Newest tokens in high precision."""
        return self.key_ring.shape[2]

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, torch.Tensor))


def new_layer(
    kind: str, sequences: int, heads: int, capacity: int, dim: int, dtype: torch.dtype, device: str, window: int = 0
) -> CacheLayer:
    """An empty cache: heads are kv heads, D = `dim` a power of two."""
    stored = {"none": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[kind]
    width = dim // 2 if kind == "int4" else dim
    scales = (1,) if kind == "none" else (sequences, heads, capacity, *((dim // INT4_GROUP,) if kind == "int4" else ()))
    zeros = scales if kind == "int4" else (1,)
    ring = window if kind != "none" else 0

    def pair(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)

    return CacheLayer(
        kind,
        *pair((sequences, heads, capacity, width), stored),
        *pair(scales, torch.bfloat16),
        *pair(zeros, torch.int8),
        *pair((sequences, heads, ring, dim), dtype),
    )


@triton.jit
def _rounded_to_bf16(x):  # type: ignore[no-untyped-def]
    """A float32 to the nearest BF16, ties to even, still as float32: by its bits, the same everywhere."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _store(x, c, values_ptr, scale_ptr, zero_ptr, row, KIND: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """One head of one token, x [2, DIM / 2] (both halves of the channels c), into row `row` of the cache, quantized."""
    HALF: tl.constexpr = DIM // 2
    half = tl.arange(0, 2)[:, None]
    at = values_ptr + row * DIM + half * HALF + c[None, :]
    if KIND == "none":
        tl.store(at, x.to(values_ptr.dtype.element_ty))
    elif KIND == "int4":
        GROUPS: tl.constexpr = DIM // _GROUP
        groups = tl.reshape(x, (GROUPS, _GROUP))
        low = tl.minimum(tl.min(groups, axis=1), 0.0)
        high = tl.maximum(tl.max(groups, axis=1), 0.0)
        scale = tl.maximum(_rounded_to_bf16(tl.div_rn(high - low, 15.0)), _SMALLEST)
        zero = tl.minimum(tl.maximum(-8.0 - _round(tl.div_rn(low, scale)), -8.0), 7.0)
        quotient = _round(tl.div_rn(groups, tl.broadcast_to(scale[:, None], (GROUPS, _GROUP)))) + zero[:, None]
        codes = tl.reshape((tl.minimum(tl.maximum(quotient, -8.0), 7.0) + 8.0).to(tl.int32), (2, HALF))
        packed = tl.sum(codes << (4 * half), axis=0)
        tl.store(values_ptr + row * HALF + c, packed.to(tl.uint8))
        g = tl.arange(0, GROUPS)
        tl.store(scale_ptr + row * GROUPS + g, scale.to(tl.bfloat16))
        tl.store(zero_ptr + row * GROUPS + g, zero.to(tl.int8))
    else:
        largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
        divisor = 127.5 if KIND == "int8" else 448.0
        scale = tl.maximum(_rounded_to_bf16(tl.div_rn(largest, divisor)), _SMALLEST)
        quotient = tl.div_rn(x, tl.zeros_like(x) + scale)
        if KIND == "int8":
            tl.store(at, _round(tl.minimum(tl.maximum(quotient, -128.0), 127.0)).to(tl.int8))
        else:
            tl.store(at, _to_e4m3(quotient))
        tl.store(scale_ptr + row, scale.to(tl.bfloat16))


@triton.jit(do_not_specialize=["M", "capacity"])
def _append(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, query_norm_ptr, key_norm_ptr, cosine_ptr, sine_ptr, sequence_ptr, position_ptr, end_ptr, query_ptr,
    keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, key_zero_ptr, value_zero_ptr, key_ring_ptr, value_ring_ptr,
    M, capacity, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    SLOTS: tl.constexpr = WINDOW if WINDOW > 0 else 1
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    m = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    c = tl.arange(0, HALF)
    half = tl.arange(0, 2)[:, None]
    channel = head * DIM + half * HALF + c[None, :]
    x = tl.load(x_ptr + m * WIDTH + channel).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + (part * M + m) * WIDTH + channel).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + channel).to(tl.float32)
    x = x.to(DTYPE).to(tl.float32)
    position = tl.load(position_ptr + m)
    is_value = head >= HEADS + KV_HEADS
    if not is_value:
        if NORM:
            at = half * HALF + c[None, :]
            norm = tl.where(head < HEADS, tl.load(query_norm_ptr + at).to(tl.float32), tl.load(key_norm_ptr + at).to(tl.float32))
            mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / DIM
            x = (x * (1.0 / tl.sqrt_rn(mean + epsilon))).to(DTYPE).to(tl.float32)
            x = (x * norm).to(DTYPE).to(tl.float32)
        cosine = tl.load(cosine_ptr + position * HALF + c)[None, :]
        sine = tl.load(sine_ptr + position * HALF + c)[None, :]
        # rotate_half: the other half of the channels, the first negated
        other = tl.sum(tl.where(half == 0, x, 0.0), axis=0)[None, :]
        later = tl.sum(tl.where(half == 1, x, 0.0), axis=0)[None, :]
        turned = tl.where(half == 0, -later, other)
        x = ((x * cosine).to(DTYPE).to(tl.float32) + (turned * sine).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
    if head < HEADS:
        tl.store(query_ptr + (m * HEADS + head) * DIM + half * HALF + c[None, :], x.to(DTYPE))
    else:
        sequence = tl.load(sequence_ptr + m).to(tl.int64)
        kv = head - HEADS
        if is_value:
            kv = kv - KV_HEADS
        row = (sequence * KV_HEADS + kv) * capacity + position
        ring = ((sequence * KV_HEADS + kv) * WINDOW + position % SLOTS) * DIM
        newest = position + 0 * (half * HALF + c[None, :]) >= tl.load(end_ptr + m) - WINDOW
        if is_value:
            _store(x, c, values_ptr, value_scale_ptr, value_zero_ptr, row, KIND, DIM)
            if WINDOW > 0:
                tl.store(value_ring_ptr + ring + half * HALF + c[None, :], x.to(DTYPE), mask=newest)
        else:
            _store(x, c, keys_ptr, key_scale_ptr, key_zero_ptr, row, KIND, DIM)
            if WINDOW > 0:
                tl.store(key_ring_ptr + ring + half * HALF + c[None, :], x.to(DTYPE), mask=newest)


@triton.jit(do_not_specialize=["capacity", "first_part", "all_parts", "sliding"])
def _attend(  # type: ignore[no-untyped-def]
    query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, key_zero_ptr, value_zero_ptr, length_ptr,
    sums_ptr, largest_ptr, total_ptr, capacity, scale, first_part, all_parts, sliding,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, KIND: tl.constexpr,
    DTYPE: tl.constexpr, GROUPED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, WHOLE: tl.constexpr,
    ASSEMBLER: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    WORDED: tl.constexpr = (KIND == "int8" or KIND == "fp8") and DIM >= 128  # with 16 channels to a tile Triton has all warps do the same
    WORDS: tl.constexpr = DIM // 4
    both = tl.program_id(0)
    part = tl.program_id(1)
    sequence, kv = both // KV_HEADS, both % KV_HEADS
    g = tl.arange(0, BLOCK_G)
    c = tl.arange(0, DIM)
    h = tl.arange(0, HALF)
    w = tl.arange(0, WORDS)
    length = tl.load(length_ptr + sequence)
    if RING:  # the newest tokens, in any order
        begin, end = 0, tl.minimum(length, WINDOW)
    else:
        begin, end = 0, tl.maximum(length - WINDOW, 0)
        if sliding > 0:
            begin = tl.maximum(length - sliding, 0)
    parts = tl.num_programs(1)
    size = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), parts), BLOCK_T) * BLOCK_T
    first = begin + part * size
    last = tl.minimum(first + size, end)
    head = kv * GROUPED + g
    real = g < GROUPED
    row_of_query = (sequence * HEADS + head).to(tl.int64)
    if KIND == "int4":
        q = tl.load(query_ptr + row_of_query[:, None] * DIM + h[None, :], mask=real[:, None], other=0.0)
        q_high = tl.load(query_ptr + row_of_query[:, None] * DIM + HALF + h[None, :], mask=real[:, None], other=0.0)
        sums = tl.zeros((BLOCK_G, HALF), tl.float32)
        sums_high = tl.zeros((BLOCK_G, HALF), tl.float32)
    elif WORDED:  # channels 4 w, 4 w + 1, ..
        at = query_ptr + row_of_query[:, None] * DIM + 4 * w[None, :]
        q = tl.load(at, mask=real[:, None], other=0.0)
        q1 = tl.load(at + 1, mask=real[:, None], other=0.0)
        q2 = tl.load(at + 2, mask=real[:, None], other=0.0)
        q3 = tl.load(at + 3, mask=real[:, None], other=0.0)
        sums = tl.zeros((BLOCK_G, WORDS), tl.float32)
        sums1 = tl.zeros((BLOCK_G, WORDS), tl.float32)
        sums2 = tl.zeros((BLOCK_G, WORDS), tl.float32)
        sums3 = tl.zeros((BLOCK_G, WORDS), tl.float32)
    else:
        q = tl.load(query_ptr + row_of_query[:, None] * DIM + c[None, :], mask=real[:, None], other=0.0)
        sums = tl.zeros((BLOCK_G, DIM), tl.float32)
    largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < last
        row = both.to(tl.int64) * capacity + t
        if KIND == "int4":
            packed = tl.load(keys_ptr + row[:, None] * HALF + h[None, :], mask=inside[:, None], other=0)
            low = int4_half(packed, key_scale_ptr, key_zero_ptr, row, inside, 0, DIM, DTYPE)
            score = tl.dot(q, tl.trans(low), input_precision="ieee")
            high = int4_half(packed, key_scale_ptr, key_zero_ptr, row, inside, 1, DIM, DTYPE)
            score = tl.dot(q_high, tl.trans(high), score, input_precision="ieee")
        elif WORDED:
            words = tl.load(keys_ptr + row[:, None] * WORDS + w[None, :], mask=inside[:, None], other=0)
            score = tl.dot(q, tl.trans(byte_numbers(words, 0, KIND, DTYPE, ASSEMBLER)), input_precision="ieee")
            score = tl.dot(q1, tl.trans(byte_numbers(words, 1, KIND, DTYPE, ASSEMBLER)), score, input_precision="ieee")
            score = tl.dot(q2, tl.trans(byte_numbers(words, 2, KIND, DTYPE, ASSEMBLER)), score, input_precision="ieee")
            score = tl.dot(q3, tl.trans(byte_numbers(words, 3, KIND, DTYPE, ASSEMBLER)), score, input_precision="ieee")
            score *= tl.load(key_scale_ptr + row, mask=inside, other=0).to(tl.float32)[None, :]
        else:
            k = tl.load(keys_ptr + row[:, None] * DIM + c[None, :], mask=inside[:, None], other=0.0)
            score = tl.dot(q, tl.trans(k.to(DTYPE)), input_precision="ieee")
            if KIND != "none":
                score *= tl.load(key_scale_ptr + row, mask=inside, other=0).to(tl.float32)[None, :]
        score = tl.where(inside[None, :], score * (scale * 1.4426950408889634), float("-inf"))
        now = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp2(score - now[:, None])
        keep = tl.exp2(largest - now)
        largest = now
        total = total * keep + tl.sum(weight, axis=1)
        if KIND == "int4":
            packed = tl.load(values_ptr + row[:, None] * HALF + h[None, :], mask=inside[:, None], other=0)
            low = int4_half(packed, value_scale_ptr, value_zero_ptr, row, inside, 0, DIM, DTYPE)
            sums = tl.dot(weight.to(DTYPE), low, sums * keep[:, None], input_precision="ieee")
            high = int4_half(packed, value_scale_ptr, value_zero_ptr, row, inside, 1, DIM, DTYPE)
            sums_high = tl.dot(weight.to(DTYPE), high, sums_high * keep[:, None], input_precision="ieee")
        elif WORDED:
            weight *= tl.load(value_scale_ptr + row, mask=inside, other=0).to(tl.float32)[None, :]
            words = tl.load(values_ptr + row[:, None] * WORDS + w[None, :], mask=inside[:, None], other=0)
            p = weight.to(DTYPE)
            sums = tl.dot(p, byte_numbers(words, 0, KIND, DTYPE, ASSEMBLER), sums * keep[:, None], input_precision="ieee")
            sums1 = tl.dot(p, byte_numbers(words, 1, KIND, DTYPE, ASSEMBLER), sums1 * keep[:, None], input_precision="ieee")
            sums2 = tl.dot(p, byte_numbers(words, 2, KIND, DTYPE, ASSEMBLER), sums2 * keep[:, None], input_precision="ieee")
            sums3 = tl.dot(p, byte_numbers(words, 3, KIND, DTYPE, ASSEMBLER), sums3 * keep[:, None], input_precision="ieee")
        else:
            if KIND != "none":
                weight *= tl.load(value_scale_ptr + row, mask=inside, other=0).to(tl.float32)[None, :]
            v = tl.load(values_ptr + row[:, None] * DIM + c[None, :], mask=inside[:, None], other=0.0)
            sums = tl.dot(weight.to(DTYPE), v.to(DTYPE), sums * keep[:, None], input_precision="ieee")
    if WHOLE:  # one part: nothing is to be combined
        out = row_of_query
        sums /= total[:, None]
        if KIND == "int4":
            sums_high /= total[:, None]
        elif WORDED:
            sums1 /= total[:, None]
            sums2 /= total[:, None]
            sums3 /= total[:, None]
    else:
        out = row_of_query * all_parts + first_part + part
        tl.store(largest_ptr + out, largest, mask=real)
        tl.store(total_ptr + out, total, mask=real)
    if KIND == "int4":
        tl.store(sums_ptr + out[:, None] * DIM + h[None, :], sums.to(sums_ptr.dtype.element_ty), mask=real[:, None])
        tl.store(sums_ptr + out[:, None] * DIM + HALF + h[None, :], sums_high.to(sums_ptr.dtype.element_ty), mask=real[:, None])
    elif WORDED:
        at = sums_ptr + out[:, None] * DIM + 4 * w[None, :]
        tl.store(at, sums.to(sums_ptr.dtype.element_ty), mask=real[:, None])
        tl.store(at + 1, sums1.to(sums_ptr.dtype.element_ty), mask=real[:, None])
        tl.store(at + 2, sums2.to(sums_ptr.dtype.element_ty), mask=real[:, None])
        tl.store(at + 3, sums3.to(sums_ptr.dtype.element_ty), mask=real[:, None])
    else:
        tl.store(sums_ptr + out[:, None] * DIM + c[None, :], sums.to(sums_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["all_parts"])
def _combine(  # type: ignore[no-untyped-def]
    sums_ptr, largest_ptr, total_ptr, out_ptr, all_parts, DIM: tl.constexpr, BLOCK_P: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, DIM)
    inside = p < all_parts
    largest = tl.load(largest_ptr + row * all_parts + p, mask=inside, other=float("-inf"))
    weight = tl.exp2(largest - tl.max(largest, axis=0))
    total = tl.sum(weight * tl.load(total_ptr + row * all_parts + p, mask=inside, other=0), axis=0)
    sums = tl.load(sums_ptr + (row * all_parts + p)[:, None] * DIM + c[None, :], mask=inside[:, None], other=0)
    out = tl.sum(sums * weight[:, None], axis=0) / total
    tl.store(out_ptr + row * DIM + c, out.to(out_ptr.dtype.element_ty))


@cache
def _multiprocessors(device: str) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.startswith("cuda") else 132


def parts_for(capacity: int, pairs: int, device: str) -> int:
    """Parts that attention is cut into: enough programs that the last ones to run do not leave most of the GPU idle.

    Args:
        capacity: tokens that a sequence has room for.
        pairs: of a sequence and a kv head.
    """
    wanted = -(-_PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(str(device)) // pairs)
    return max(1, min(_MOST_PARTS, -(-capacity // _LEAST_TOKENS), wanted))


def append(
    x: torch.Tensor,
    layer: CacheLayer,
    dtype: torch.dtype,
    *,
    heads: int,
    bias: torch.Tensor | None,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    rotary: tuple[torch.Tensor, torch.Tensor],
    sequences: torch.Tensor,
    positions: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Bias, norm of heads, rotary embedding; keys and values go into the cache.

    Args:
        x: queries, keys and values of M tokens side by side, [M, (heads + 2 kv heads) D], or the parts of their sums [parts, M, ..].
        layer: is written to.
        dtype: of the model; values are rounded to it where transformers rounds them.
        heads: of queries.
        bias: [(heads + 2 kv heads) D] or None.
        norms: weights [D] of queries' and keys' RMSNorm and its epsilon, or None.
        rotary: cosine and sine, float32 [positions, D / 2].
        sequences, positions: int32 [M], where each token belongs.
        ends: int32 [M], tokens that its sequence has after this call.

    Returns:
        Queries, [M, heads, D] in `dtype`.
    """
    parts, tokens = (1 if x.ndim == 2 else x.shape[0]), x.shape[-2]
    _, kv_heads, capacity, _ = layer.keys.shape
    dim = layer.key_ring.shape[3]
    queries = torch.empty(tokens, heads, dim, dtype=dtype, device=x.device)
    _append[(tokens, heads + 2 * kv_heads)](
        x, x if bias is None else bias, x if norms is None else norms[0], x if norms is None else norms[1], *rotary, sequences, positions,
        ends, queries, layer.keys, layer.values, layer.key_scale, layer.value_scale, layer.key_zero, layer.value_zero, layer.key_ring,
        layer.value_ring, tokens, capacity, 0.0 if norms is None else norms[2], HEADS=heads, KV_HEADS=kv_heads, DIM=dim,
        WINDOW=layer.window, KIND=layer.kind, PARTS=parts, BIAS=bias is not None, NORM=norms is not None, DTYPE=_TRITON_DTYPES[dtype],
        num_warps=1,
    )  # fmt: skip
    return queries


def attend(queries: torch.Tensor, layer: CacheLayer, lengths: torch.Tensor, scale: float, *, parts: int, sliding: int = 0) -> torch.Tensor:
    """Attention of one token of each of the first B sequences.

    Args:
        queries: [B, heads, D].
        lengths: int32 [B], tokens cached, the new one included.
        scale: of the scores.
        parts: programs per sequence and kv head.
        sliding: tokens that are seen, the new one included; 0: all.

    Returns:
        [B, heads, D] in the queries' dtype.
    """
    batch, heads, dim = queries.shape
    _, kv_heads, capacity, _ = layer.keys.shape
    every, out = parts + (1 if layer.window else 0), torch.empty_like(queries)
    whole = every == 1
    sums = out if whole else torch.empty(batch, heads, every, dim, dtype=torch.float32, device=queries.device)
    largest, total = (out if whole else torch.empty(batch, heads, every, dtype=torch.float32, device=queries.device) for _ in range(2))
    grouped = heads // kv_heads
    words = layer.kind in ("int8", "fp8") and dim >= 128  # see WORDED
    constants = {
        "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "WINDOW": layer.window, "DTYPE": _TRITON_DTYPES[queries.dtype],
        "GROUPED": grouped, "BLOCK_G": max(16, triton.next_power_of_2(grouped)), "WHOLE": whole, "ASSEMBLER": not interpreted(),
        "num_warps": 4,
    }  # fmt: skip
    block = _BLOCK_VALUES // max(dim, 128)
    codes = (tensor.view(torch.int32) if words else tensor for tensor in (layer.keys, layer.values))
    stored = (*codes, layer.key_scale, layer.value_scale, layer.key_zero, layer.value_zero)
    _attend[(batch * kv_heads, parts)](
        queries, *stored, lengths, sums, largest, total, capacity, scale, 0, every, sliding, RING=False, KIND=layer.kind, num_stages=3,
        BLOCK_T=2 * block if words else block, **constants,
    )  # fmt: skip
    if layer.window:
        ring = (layer.key_ring, layer.value_ring, *stored[2:])
        _attend[(batch * kv_heads, 1)](
            queries, *ring, lengths, sums, largest, total, layer.window, scale, parts, every, sliding, RING=True, KIND="none", num_stages=2,
            BLOCK_T=block, **constants,
        )  # fmt: skip
    if whole:
        return out
    _combine[(batch * heads,)](sums, largest, total, out, every, DIM=dim, BLOCK_P=triton.next_power_of_2(every), num_warps=4)
    return out


def read(layer: CacheLayer, sequence: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence as the cache keeps them, dequantized: [kv heads, length, D]. For prompts; a step never does this."""
    both = (
        (layer.keys, layer.key_scale, layer.key_zero, layer.key_ring),
        (layer.values, layer.value_scale, layer.value_zero, layer.value_ring),
    )
    result = []
    for stored, scale, zero, ring in both:
        codes = stored[sequence, :, :length]
        if layer.kind == "none":
            result.append(codes.to(dtype))
            continue
        step = scale[sequence, :, :length].float()
        if layer.kind == "int4":
            numbers = torch.cat([codes & 15, codes >> 4], -1).float() - 8.0
            groups = numbers.unflatten(-1, (-1, INT4_GROUP)) - zero[sequence, :, :length, :, None].float()  # type: ignore[no-untyped-call]
            numbers = (groups * step[..., None]).flatten(-2)
        else:
            numbers = codes.float() * step[..., None]
        numbers = numbers.to(dtype)
        newest = torch.arange(max(length - layer.window, 0), length, device=stored.device)
        if layer.window:
            numbers[:, newest] = ring[sequence][:, newest % layer.window].to(dtype)
        result.append(numbers)
    return result[0], result[1]
