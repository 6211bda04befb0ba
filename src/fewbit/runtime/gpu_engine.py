"""The decode engine on a GPU: ten kernels a block, and a whole step in one CUDA graph.

A step of a 3B model at 4 bits reads 1.7 GB: 0.5 ms on an H100. Launching its 400 kernels from Python takes ten times as long, so without a
graph every format would seem equally fast. A graph is captured once per number of sequences and replayed; lengths, positions and the next
tokens live on the device, so the same graph serves every step. `graphs_refusal` says why there is none: the interpreter runs on the CPU,
and a kernel may have to wait for the GPU (LLM.int8()).

    add, norm, quantize -> q, k, v -> bias, rotary embedding, into the cache -> attention -> combine
    -> (quantize) -> output -> add, norm, quantize -> gate, up -> SiLU -> (quantize) -> down

A product's parts (split K) are added up by the kernel that comes next; no kernel does only that. Values are rounded to the model's dtype
where transformers rounds them. The prompt goes through the same kernels, with torch's attention over what the cache keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from fewbit.errors import UsageError
from fewbit.kernels.triton.environment import on_device, room_for
from fewbit.kernels.triton.gpu_kernel import Rows
from fewbit.runtime.gpu_model import GpuBlock, GpuLinear, GpuModel

__all__ = ["GpuCache", "GpuEngine"]


@dataclass
class GpuCache:
    """Keys and values of some sequences with a fixed capacity, and what a step reads and writes.

    Attributes:
        layers: `attention.CacheLayer` of each block. rotary: cosine and sine.
        tokens: int64 [sequences], the next token of each. positions: int32, where it goes. ends: int32, positions + 1.
        lengths: tokens of each sequence, as the host counts them.
        logits: of the latest step, [sequences, vocabulary] in the model's dtype.
        graphs: captured steps by number of sequences.
    """

    layers: list[object]
    capacity: int
    rotary: tuple[torch.Tensor, torch.Tensor]
    tokens: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    lengths: list[int]
    logits: torch.Tensor
    rows: torch.Tensor
    graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Of keys and values."""
        return sum(layer.nbytes() for layer in self.layers)  # type: ignore[attr-defined]


class GpuEngine:
    """Runs a model.

    Args:
        model: `gpu_model.model_of` or `random_model`.
        graphs: capture decode steps where that is possible.
    """

    def __init__(self, model: GpuModel, *, graphs: bool = True) -> None:
        self.model = model
        self._refusal = self._refuse_graphs(graphs)

    def graphs_refusal(self) -> str | None:
        """Why steps are launched kernel by kernel; None when they are replayed from a graph."""
        return self._refusal

    def _refuse_graphs(self, wanted: bool) -> str | None:
        if not wanted:
            return "not asked for"
        if not self.model.device.startswith("cuda"):
            return f"the model is on {self.model.device}"
        held_up = next((linear.kernel.name for linear in self.model.linears() if not linear.capturable), None)
        return None if held_up is None else f"kernel '{held_up}' waits for the GPU in every linear"

    def new_cache(self, capacity: int, sequences: int = 1) -> GpuCache:
        """An empty cache with room for `capacity` tokens of each of `sequences`.

        Raises:
            UsageError: no token or no sequence. KernelError: the device has too little memory.
        """
        from fewbit.kernels.triton.attention import new_layer  # imports Triton

        if capacity < 1 or sequences < 1:
            raise UsageError(f"a cache for {sequences} sequences of {capacity} tokens", "ask for at least one of each")
        m = self.model
        what = f"the cache of {sequences} sequences of {capacity} tokens"
        with room_for(what, m.device, "use fewer sequences or tokens, or a KV format with fewer bits (KV-FP8, KV-INT4)"):
            layers: list[object] = [new_layer(m.kv, sequences, m.kv_heads, capacity, m.dim, m.dtype, m.device, m.window) for _ in m.blocks]
            positions, ends = (torch.full((sequences,), start, dtype=torch.int32, device=m.device) for start in (0, 1))
            rows = torch.arange(sequences, dtype=torch.int32, device=m.device)
            tokens = torch.zeros(sequences, dtype=torch.long, device=m.device)
            logits = torch.zeros(sequences, m.vocabulary, dtype=m.dtype, device=m.device)
            return GpuCache(layers, capacity, m.rotary_tables(capacity), tokens, positions, ends, [0] * sequences, logits, rows)

    @torch.inference_mode()
    def prefill(self, input_ids: torch.Tensor, cache: GpuCache, sequence: int = 0) -> torch.Tensor:
        """Append a prompt to one sequence.

        Args:
            input_ids: int64 [n].

        Returns:
            Logits after the last token, [vocabulary]; `cache.tokens[sequence]` is the likeliest next token.

        Raises:
            UsageError: no token, or more than the cache has room for. KernelError: the device has too little memory.
        """
        count = input_ids.shape[0]
        self._check_room(cache, [sequence], count)
        with on_device(self.model.device), room_for(f"a prompt of {count} tokens", self.model.device, "give the prompt in shorter pieces"):
            return self._prefill(input_ids, cache, sequence)

    def _prefill(self, input_ids: torch.Tensor, cache: GpuCache, sequence: int) -> torch.Tensor:
        m, count, start = self.model, input_ids.shape[0], cache.lengths[sequence]
        end = start + count
        place = torch.full((count,), sequence, dtype=torch.int32, device=m.device)
        positions = torch.arange(start, end, dtype=torch.int32, device=m.device)
        ends = torch.full_like(positions, end)
        stream = F.embedding(input_ids.to(m.device), m.embedding).to(m.dtype)
        x: torch.Tensor | None = None
        for block, layer in zip(m.blocks, cache.layers, strict=True):
            queries = self._queries(block, layer, x, stream, cache, place, positions, ends)
            attended = _attend_prompt(queries, layer, block, sequence, start, m.scale)
            x = self._after_attention(block, attended, stream)
        logits = self._logits(x, stream, last=True)[0]
        cache.lengths[sequence] = end
        cache.positions[sequence], cache.ends[sequence] = end, end + 1
        cache.tokens[sequence] = logits.argmax()
        cache.logits[sequence] = logits
        return logits

    @torch.inference_mode()
    def decode(self, cache: GpuCache, tokens: torch.Tensor | None = None, sequences: int | None = None) -> torch.Tensor:
        """One step of the first sequences: append a token to each.

        Args:
            tokens: int64 [n]; None: the likeliest after the latest step, which are on the device already.
            sequences: n, where `tokens` is None; all of the cache when that is None, too.

        Returns:
            Logits [n, vocabulary], overwritten by the next step; `cache.tokens[:n]` are the likeliest next tokens.

        Raises:
            UsageError: a sequence is full. KernelError: the device has too little memory.
        """
        n = tokens.shape[0] if tokens is not None else sequences or len(cache.lengths)
        self._check_room(cache, range(n), 1)
        if tokens is not None:
            cache.tokens[:n] = tokens.to(self.model.device)
        with on_device(self.model.device), room_for(f"a step of {n} sequences", self.model.device, "generate fewer sequences at once"):
            if self._refusal is not None:
                self._step(cache, n)
            else:
                if n not in cache.graphs:
                    cache.graphs[n] = self._capture(cache, n)
                cache.graphs[n].replay()
        for sequence in range(n):
            cache.lengths[sequence] += 1
        return cache.logits[:n]

    def _capture(self, cache: GpuCache, n: int) -> torch.cuda.CUDAGraph:
        """Steps before the capture compile and choose kernels; what they write is written again, in the same places."""
        before = [tensor.clone() for tensor in (cache.tokens, cache.positions, cache.ends)]

        def restore() -> None:
            for tensor, old in zip((cache.tokens, cache.positions, cache.ends), before, strict=True):
                tensor.copy_(old)

        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step(cache, n)
                restore()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(cache, n)
        restore()
        return graph

    def _step(self, cache: GpuCache, n: int) -> None:
        """One token of each of n sequences; reads and writes the cache's tensors only."""
        from fewbit.kernels.triton.attention import CacheLayer, attend, parts_for

        m = self.model
        positions, ends, rows = cache.positions[:n], cache.ends[:n], cache.rows[:n]
        stream = F.embedding(cache.tokens[:n], m.embedding).to(m.dtype)
        parts = parts_for(cache.capacity, n * m.kv_heads, m.device)
        x: torch.Tensor | None = None
        for block, layer in zip(m.blocks, cache.layers, strict=True):
            assert isinstance(layer, CacheLayer)
            queries = self._queries(block, layer, x, stream, cache, rows, positions, ends)
            attended = attend(queries, layer, ends, m.scale, parts=parts, sliding=block.sliding)
            x = self._after_attention(block, attended, stream)
        logits = self._logits(x, stream)
        cache.logits[:n] = logits
        cache.tokens[:n] = logits.argmax(-1)
        positions += 1
        ends += 1

    def _rows(
        self, x: torch.Tensor, linear: GpuLinear, *, norm: torch.Tensor | None = None, stream: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> Rows:  # fmt: skip
        from fewbit.kernels.triton.rows import process_rows

        m = self.model
        if norm is None and linear.inputs is None:
            return Rows(x)
        pair = None if norm is None else (norm, m.epsilon)
        return process_rows(x, m.dtype, bias=bias, residual=stream, norm=pair, inputs=linear.inputs, static=linear.static)

    def _queries(
        self, block: GpuBlock, layer: object, x: torch.Tensor | None, stream: torch.Tensor, cache: GpuCache, sequences: torch.Tensor,
        positions: torch.Tensor, ends: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """From the parts of the block before (None: the first) to queries; keys and values go into the cache."""
        from fewbit.kernels.triton.attention import CacheLayer, append

        assert isinstance(layer, CacheLayer)
        if x is None:
            rows = self._rows(stream, block.qkv, norm=block.input_norm)
        else:
            rows = self._rows(x, block.qkv, norm=block.input_norm, stream=stream)
        norms = None if block.head_norms is None else (*block.head_norms, self.model.epsilon)
        return append(
            block.qkv.sums(rows), layer, self.model.dtype, heads=self.model.heads, bias=block.qkv.bias, norms=norms, rotary=cache.rotary,
            sequences=sequences, positions=positions, ends=ends,
        )  # fmt: skip

    def _after_attention(self, block: GpuBlock, attended: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """The rest of a block: the parts of what its MLP adds to the stream."""
        from fewbit.kernels.triton.rows import silu_product

        x = block.output.sums(self._rows(attended.flatten(1), block.output))
        rows = self._rows(x, block.gate_up, norm=block.post_norm, stream=stream, bias=block.output.bias)
        product = silu_product(block.gate_up.sums(rows), self.model.dtype)
        return block.down.sums(self._rows(product, block.down))

    def _logits(self, x: torch.Tensor | None, stream: torch.Tensor, last: bool = False) -> torch.Tensor:
        from fewbit.kernels.triton.rows import finish

        assert x is not None
        rows = self._rows(x, self.model.head, norm=self.model.norm, stream=stream)
        if last:
            rows = Rows(rows.values[-1:].contiguous(), None if rows.scale is None else rows.scale[-1:].contiguous())
        return finish(self.model.head.sums(rows), self.model.head.bias, self.model.dtype)

    def _check_room(self, cache: GpuCache, sequences: range | list[int], count: int) -> None:
        longest = max(cache.lengths[sequence] for sequence in sequences)
        if count < 1 or longest + count > cache.capacity:
            raise UsageError(
                f"{count} tokens do not fit behind the {longest} of a cache for {cache.capacity}", "make a cache with more capacity"
            )


def _attend_prompt(queries: torch.Tensor, layer: object, block: GpuBlock, sequence: int, start: int, scale: float) -> torch.Tensor:
    """Attention of new tokens [n, heads, D] over all that the cache keeps of a sequence, as it keeps them."""
    from fewbit.kernels.triton.attention import CacheLayer, read

    assert isinstance(layer, CacheLayer)
    count = queries.shape[0]
    keys, values = read(layer, sequence, start + count, queries.dtype)
    mask, causal = None, start == 0
    if start or (block.sliding and block.sliding < start + count):
        at = torch.arange(start, start + count, device=queries.device)[:, None]
        seen = torch.arange(start + count, device=queries.device)[None]
        mask, causal = (seen <= at) & ((seen > at - block.sliding) if block.sliding else True), False
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).contiguous()
