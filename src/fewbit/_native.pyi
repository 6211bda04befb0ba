"""Native code of fewbit (src/native/). Missing when the package was installed without a C++ compiler."""

import torch

def instruction_set() -> str:
    """The widest read loop that this CPU runs: `avx512`, `avx2` or `portable`."""

def read_bandwidth(bytes: int, threads: int, seconds: float = 1.0) -> float:
    """DRAM read bandwidth in 1e9 bytes per second.

    Args:
        bytes: size of the buffer; at least 512 MiB and several times the last-level cache for a figure that means something.
        threads: each reads its own contiguous part.
        seconds: how long to repeat the pass; the best one counts. Each prefetch distance gets one pass at least.

    Raises:
        ValueError: fewer than one thread, fewer than 2 MiB per thread, negative time.
        MemoryError: the buffer cannot be allocated.
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
