"""A matrix transposed with its columns in another order, in one pass.

GPTQ works on W^T in the order of processing, so that a column is contiguous. torch gathers and transposes in two passes, each of which
reads or writes memory against its order: an eighth of the whole time on a block of Llama-2-7B. The extension reads strips of 32 rows,
which stay in the cache, and writes whole cache lines. The numbers are the same; nothing is computed.
"""

from __future__ import annotations

import torch

from fewbit.formats.native import native_extension

__all__ = ["gather_transposed", "scatter_transposed"]


def gather_transposed(source: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """out[k, r] = source[rows[r], columns[k]].

    Args:
        source: [n, m], float32. columns: int64 [K]. rows: int64 [R]; None for all of them in their order.

    Returns:
        [K, R], float32, contiguous.
    """
    native = native_extension() if source.device.type == "cpu" else None
    if native is None:
        chosen = source if rows is None else source.index_select(0, rows)
        return chosen.index_select(1, columns).T.contiguous()
    out = torch.empty(len(columns), source.shape[0] if rows is None else len(rows))
    native.gather_transposed(source.contiguous(), rows, columns, out, torch.get_num_threads())
    return out


def scatter_transposed(source: torch.Tensor, rows: slice, columns: torch.Tensor) -> torch.Tensor:
    """out[r, columns[k]] = source[k, rows.start + r]: the way back for some of the rows.

    Args:
        source: [K, R], float32, contiguous. rows: with start and stop. columns: int64 [K], a permutation.

    Returns:
        [rows, K], float32, contiguous.
    """
    native = native_extension() if source.device.type == "cpu" else None
    if native is None:
        return source[:, rows].T.contiguous().index_select(1, torch.argsort(columns))
    out = torch.empty(rows.stop - rows.start, len(columns))
    native.scatter_transposed(source, rows.start, columns, out, torch.get_num_threads())
    return out
