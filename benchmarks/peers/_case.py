"""The weight, the inputs and the expected outputs of a kernel benchmark's case, the same for every contender. numpy only.

    case = {"n": 4096, "k": 4096, "m": 1, "copies": 36, "threads": 2, "contender": "...", ...}

The weight is 256 random rows, one below the other until there are n of them: a peer's quantizer need not be waited for over 45 million
weights, and no kernel's time depends on the values. Each copy differs in a few entries, so that no library can merge them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["BLOCK_ROWS", "block", "distinct", "expected", "inputs", "relative_error", "tiled"]

BLOCK_ROWS = 256


def block(case: dict[str, Any]) -> np.ndarray:
    """The rows that the weight repeats, float32 [256, k]."""
    return np.random.default_rng(0).standard_normal((BLOCK_ROWS, case["k"]), dtype=np.float32) * np.float32(0.02)


def inputs(case: dict[str, Any]) -> np.ndarray:
    """Activations, float32 [m, k]."""
    return np.random.default_rng(1).standard_normal((case["m"], case["k"]), dtype=np.float32)


def tiled(rows: np.ndarray, n: int) -> np.ndarray:
    """[n, ...] of the rows repeated; a copy of its own."""
    return np.concatenate([rows] * -(-n // rows.shape[0]))[:n]


def distinct(packed: np.ndarray, index: int) -> np.ndarray:
    """A copy of packed bytes that differs from every other copy: the index in the first four bytes."""
    copy = np.array(packed, copy=True)
    copy.view(np.uint8).reshape(-1)[:4] ^= np.frombuffer(np.uint32(index).tobytes(), np.uint8)
    return copy


def expected(case: dict[str, Any]) -> np.ndarray:
    """x W^T in float64 for the first 256 output features, [m, 256]."""
    result: np.ndarray = inputs(case).astype(np.float64) @ block(case).astype(np.float64).T
    return result


def relative_error(y: np.ndarray, case: dict[str, Any]) -> float:
    """Root of the relative squared error of y [m, n], without the first row, which differs between copies."""
    right = expected(case)[:, 1:]
    difference = np.asarray(y, np.float64).reshape(case["m"], -1)[:, 1:BLOCK_ROWS] - right
    return float(np.sqrt((difference**2).sum() / (right**2).sum()))
