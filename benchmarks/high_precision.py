"""The baseline's product (`kernels.high_precision`) against plain `torch.nn.functional.linear`, in BF16 on the CPU.

    python benchmarks/high_precision.py

Both sides take turns in one process; what is compared are medians of each side's passes. No number of tokens may be slower than torch's
own choice; where this CPU multiplies BF16 in hardware the paths are the same ones and the ratio is about 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from _bars import Bar, add_arguments, run_bars
from torch.nn.functional import linear as plain

from fewbit.kernels.high_precision import fastest_path, linear

SHAPES = ((4096, 4096), (8960, 1536))  # out, in
ROWS = (1, 8, 32, 128, 1024)
_SECONDS = 2.0
_MAX_PASSES = 60


def _ours(x: torch.Tensor, weight: torch.Tensor) -> None:
    with fastest_path(x.shape[0], x.device):
        linear(x, weight)


@torch.inference_mode()
def ratio(rows: int, shape: tuple[int, int]) -> float:
    """Time of F.linear over time of the baseline's product."""
    x = torch.randn(rows, shape[1]).bfloat16()
    weights = [torch.randn(shape).bfloat16() for _ in range(8)]  # more than the caches hold
    sides: tuple[Callable[[torch.Tensor, torch.Tensor], object], ...] = (plain, _ours)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + _SECONDS
    turn = 0
    while turn < 4 or (time.perf_counter() < end and turn < _MAX_PASSES):
        for side, kept in zip(sides, times, strict=True):
            begun = time.perf_counter()
            side(x, weights[turn % len(weights)])
            kept.append(time.perf_counter() - begun)
        turn += 1
    theirs, ours = (statistics.median(kept[1:]) for kept in times)
    print(f"{rows:5} tokens, {shape[0]} x {shape[1]}: F.linear {theirs * 1e3:8.2f} ms, here {ours * 1e3:8.2f} ms", flush=True)
    return theirs / ours


BARS = [
    Bar(f"bf16-{outputs}x{inputs}-m{rows}", partial(ratio, rows, (outputs, inputs)), ">=", 0.95, "time of F.linear over ours")
    for outputs, inputs in SHAPES
    for rows in ROWS
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    return run_bars(BARS, list_only=options.list, json_file=options.json)


if __name__ == "__main__":
    sys.exit(main())
