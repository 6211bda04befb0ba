"""Native code of fewbit (src/native/). Missing when the package was installed without a C++ compiler."""

from typing import Any

import torch

def instruction_set() -> str:
    """The widest read loop that this CPU runs: `avx512`, `avx2` or `portable`."""

def read_bandwidth(bytes: int, threads: int, seconds: float = 1.0) -> float:
    """DRAM read bandwidth in 1e9 bytes per second.

    Args:
        bytes: size of the buffer; at least 512 MiB and several times the last-level cache for a figure that means something.
        threads: each reads its own contiguous part.
        seconds: how long to repeat the pass; the best one counts. Each of `read_loops` gets one pass at least.

    Raises:
        ValueError: fewer than one thread, fewer than 2 MiB per thread, negative time.
        MemoryError: the buffer cannot be allocated.
    """

def read_loops() -> list[tuple[int, int]]:
    """The read loops that this CPU runs: (prefetch distance in bytes, 0 for none; streams that each thread reads side by side)."""

class ReadBuffer:
    """A buffer for read passes that take turns with something else's.

    Args:
        bytes: size; rounded down to 2 MiB per thread.
        threads: each writes at first, and reads in every pass, its own contiguous part.
        huge_pages: ask for 2 MiB pages, or forbid them.

    Raises:
        ValueError: fewer than one thread, fewer than 2 MiB per thread.
        MemoryError: the buffer cannot be allocated.
    """

    def __init__(self, bytes: int, threads: int, huge_pages: bool = True) -> None: ...
    @property
    def bytes(self) -> int: ...
    def read(self, distance: int = 0, streams: int = 1) -> float:
        """One pass over the buffer; seconds from the first load of any thread to the last.

        Raises:
            ValueError: not one of `read_loops`.
        """

def least_squares_scales(
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    start: torch.Tensor,
    factors: torch.Tensor,
    out: torch.Tensor,
    low: int,
    high: int,
    threads: int,
) -> None:
    """The least squares scale of each group of a symmetric integer format that leaves the least error, over several starts.

    Args:
        weight: [rows, columns] float32, contiguous. importance: [columns] float32 or None.
        start: [rows, groups] float32, positive; `columns / groups` neighbours share a scale.
        factors: [n] float32, what the starts are multiplied with; negative ones turn the grid over.
        out: [rows, groups] float32, filled in; `start` where nothing is better than no codes at all.
        low, high: ends of the grid. threads: rows are split among them.

    Raises:
        ValueError: shapes that do not fit.
    """

def squared_error(
    weight: torch.Tensor, importance: torch.Tensor | None, scale: torch.Tensor, out: torch.Tensor, low: int, high: int, threads: int
) -> None:
    """Importance-weighted squared error of each group at `scale` [rows, groups] float32, into `out` of its shape.

    Raises:
        ValueError: shapes that do not fit.
    """

def gather_transposed(source: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """out[k, r] = source[rows[r], columns[k]], float32; all rows in their order when `rows` is None. Indices are int64.

    Raises:
        ValueError: an index outside of the matrix, or an `out` of another shape than [columns, rows].
    """

def scatter_transposed(source: torch.Tensor, first: int, columns: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """out[r, columns[k]] = source[k, first + r], float32; `columns` is an int64 permutation.

    Raises:
        ValueError: an index outside of the matrix, or shapes that do not fit.
    """

def threads() -> int:
    """Threads of the CPU kernels, the caller's included."""

def set_threads(count: int) -> None:
    """Replace the threads of the CPU kernels.

    Raises:
        ValueError: not 1 to 1024.
    """

class rows:
    """Row kernels of single instruction sets (a submodule, for tests): one dimension, contiguous, float32."""

    @staticmethod
    def instruction_sets() -> list[str]: ...
    @staticmethod
    def quantize(instruction_set: str, x: torch.Tensor, range: float, static_scale: float, codes: torch.Tensor) -> tuple[float, int]: ...
    @staticmethod
    def normalize(instruction_set: str, x: torch.Tensor, weight: torch.Tensor, factor: float, round: bool, out: torch.Tensor) -> None: ...
    @staticmethod
    def widen(instruction_set: str, x: torch.Tensor, out: torch.Tensor) -> None: ...
    @staticmethod
    def sum_of_squares(instruction_set: str, x: torch.Tensor) -> float: ...

def weight_memory(bytes: int) -> Any:
    """uint8 [bytes] of zeros for packed weights, in huge pages where the system has them; for `torch.utils.dlpack.from_dlpack`."""

def int_instruction_sets() -> list[str]:
    """Instruction sets for integer products on this CPU, the best first: `avx512-vnni`, `avx512vl-vnni`, `avx-vnni`, `avx2`, `portable`."""

class Linear:
    """A weight [out_features, in_features] in its packed form. Shares the memory of the tensors it was made from and keeps them alive."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def tile(self) -> int:
        """Output features that are computed together."""
    @property
    def bytes(self) -> int:
        """Read per pass at one token."""
    def apply(self, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """y = x @ W.T + bias on all threads.

        Args:
            x: [rows, in_features] float32 or bfloat16, columns next to each other.
            y: [rows, out_features] float32 or bfloat16, columns next to each other; filled in.
            bias: [out_features] float32 or None.

        Raises:
            ValueError: shapes, strides or dtypes that do not fit.
        """

def multiply_in_turn(linears: list[Linear], x: torch.Tensor, y: list[torch.Tensor]) -> None:
    """y[i] = x @ W_i.T for one linear after the other, without leaving C++: what a decode step costs in products.

    Args:
        x: [rows, in], float32 or bfloat16; rows may be apart. y: float32 [rows, out] each, contiguous, filled in.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """

def float_instruction_sets() -> list[str]:
    """Instruction sets for products of floats on this CPU, the best first: `avx512`, `avx2`, `portable`."""

def dense_linear(weight: torch.Tensor, instruction_set: str = "") -> Linear:
    """A weight in high precision, not copied.

    Args:
        weight: [out, in] float32 or bfloat16, columns next to each other.
        instruction_set: one of `float_instruction_sets`; empty: the best.

    Raises:
        ValueError: dtype or strides that do not fit, or an instruction set that this CPU lacks.
    """

def digit_instruction_sets() -> list[str]:
    """Instruction sets for exact integer products on this CPU, the best first: `avx512-vnni`, `avx2`, `portable`."""

def digit_linear(
    tiles: torch.Tensor,
    out_features: int,
    in_features: int,
    format: str,
    scale_type: str,
    affine: bool,
    block: int,
    blocks: int,
    factor: float = 1.0,
    instruction_set: str = "",
) -> Linear:
    """A weight of small integers that multiplies exact inputs; layout in src/native/cpu/digit_dot.hpp.

    Args:
        tiles: uint8 [ceil(out / 64), bytes of a tile], beginning on a cache line.
        format: `int8`, `int4`, `int3`, `int2` or `e2m1`.
        scale_type: `float32`, `bfloat16`, `e8m0` or `e4m3`.
        affine: headers hold zero points.
        block: columns that share an input scale. blocks: of a group of columns that share a weight scale.
        factor: of the whole weight.
        instruction_set: one of `digit_instruction_sets`; empty: the best.

    Raises:
        ValueError: sizes that do not fit, or an instruction set that this CPU lacks.
    """

def table_linear(
    tiles: torch.Tensor,
    out_features: int,
    in_features: int,
    format: str,
    bfloat16_scales: bool,
    group: int,
    table: torch.Tensor | None = None,
    instruction_set: str = "",
) -> Linear:
    """A weight in a table of 16 numbers or in FP8 that multiplies float32 inputs; layout in src/native/cpu/table_dot.hpp.

    Args:
        tiles: uint8 [ceil(out / 64), bytes of a tile].
        format: `table16`, `e4m3` or `e5m2`.
        bfloat16_scales: scales are BF16, else float32.
        group: columns that share a scale.
        table: float32 [16], for `table16`; copied.
        instruction_set: one of `float_instruction_sets`; empty: the best.

    Raises:
        ValueError: sizes that do not fit, or an instruction set that this CPU lacks.
    """

def int_linear(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out_features: int,
    in_features: int,
    group: int,
    bits: int,
    range: float = 127.0,
    static_scale: float = 0.0,
    instruction_set: str = "",
) -> Linear:
    """A weight of 2, 3, 4 or 8 bits that multiplies INT8 activations; layouts in src/native/cpu/int_dot.hpp.

    Tiles may be any distance apart, each on a cache line; what belongs to one tile is contiguous.

    Args:
        codes: uint8 [tiles, lines, 64].
        scales: bfloat16 [tiles, pairs of groups, 16, 2], float32 [tiles, groups, 16] or, per channel, float32 [tiles, 16].
        zeros: int8 [tiles, groups, 16] (channel: [tiles, 1, 16]) or None.
        group: columns of the input that share a scale.
        range: the largest magnitude of a group becomes this code.
        static_scale: the inputs' scale when it was calibrated; 0: computed from the values.
        instruction_set: empty: the best of this CPU.

    Raises:
        ValueError: shapes that do not fit, or an instruction set that this CPU lacks.
    """

def engine_instruction_set() -> str:
    """The instruction set of the engine's own kernels: `avx512`, `avx2` or `portable`."""

def reference_linear(weight: torch.Tensor) -> Linear:
    """A float32 weight [out, in], multiplied the plain way, for tests."""

class EngineCache:
    """Keys and values of `sequences` sequences of at most `capacity` tokens; formats: none, float32, bfloat16, int8, fp8, int4."""

    def __init__(
        self, layers: int, sequences: int, kv_heads: int, dim: int, capacity: int, history: str, window: str, window_tokens: int
    ) -> None: ...
    def length(self, sequence: int) -> int: ...
    def crop(self, sequence: int, length: int) -> None: ...
    def fill(self, sequence: int, length: int) -> None:
        """For timings: the sequence has `length` tokens of arbitrary finite values.

        Raises:
            ValueError: no such sequence, or no room for the tokens.
        """

    @property
    def capacity(self) -> int: ...
    @property
    def sequences(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def bytes_per_token(self) -> float: ...
    @property
    def constant_bytes(self) -> int: ...

class EngineLayer:
    """The linears and norms of one decoder layer."""

def engine_layer(
    hidden: int,
    dim: int,
    input_norm: torch.Tensor,
    post_norm: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    linears: list[Linear],
    biases: list[torch.Tensor | None],
    sliding: int,
) -> EngineLayer:
    """Norms and biases are float32; linears and biases in the order q, k, v, o, gate, up, down."""

class EngineTimes:
    """Milliseconds of one pass."""

    total: float
    attention_projections: float
    attention: float
    ffn: float
    head: float
    layers: float

class Engine:
    """A decoder of the Llama kind; see src/native/cpu/engine. It points to the tensors and linears it was made from."""

    def __init__(
        self,
        embedding: torch.Tensor,
        layers: list[EngineLayer],
        final_norm: torch.Tensor,
        head: Linear,
        head_bias: torch.Tensor | None,
        heads: int,
        kv_heads: int,
        dim: int,
        intermediate: int,
        epsilon: float,
        scale: float,
        bf16: bool,
    ) -> None: ...
    def prefill(
        self,
        cache: EngineCache,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        sequence: int,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        best: torch.Tensor,
    ) -> None: ...
    def decode(
        self, cache: EngineCache, cosine: torch.Tensor, sine: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor, best: torch.Tensor
    ) -> None: ...
    @property
    def times(self) -> EngineTimes: ...
    def set_emptied(self, emptied: bool) -> None: ...
