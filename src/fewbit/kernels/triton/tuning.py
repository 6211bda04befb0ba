"""Block sizes of the Triton kernels: a table by device class, read from `tuning.toml`, and a search where the table says nothing.

A device class is the name that torch gives the device, where one was measured (`NVIDIA H200`), else `default`: rows by rule. On a class
that was not measured `search` times a few candidates the first time that a shape is met, outside of CUDA graphs, and remembers the fastest
for the process; `FEWBIT_TRITON_SEARCH=0` turns that off. `benchmarks/gpu.py` searches on a class that was not measured, prints rows for the
table and goes on with them (`install`).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

import torch

from fewbit.kernels.triton.environment import interpreted

__all__ = ["Tiles", "candidates", "install", "is_measured", "rows_of", "search", "tiles_for"]


@dataclass(frozen=True)
class Tiles:
    """One row of the table.

    Attributes:
        tokens: the largest M it serves.
        swap: the weights are the first operand of the tensor core.
        block_m, block_n: outputs of a program.
        programs: K is cut into parts until there are about so many programs; 0: never.
        num_warps, num_stages: Triton's.
        split: parts that K is cut into; from `programs` and the shape.
    """

    tokens: int
    swap: bool
    block_m: int
    block_n: int
    programs: int
    num_warps: int
    num_stages: int
    split: int = 1

    def for_shape(self, tokens: int, outputs: int, chunks: int) -> Tiles:
        """The row with `split` for a product [tokens, outputs] over so many chunks of K; a part has at least four."""
        blocks = -(-tokens // self.block_m) * -(-outputs // self.block_n)
        return replace(self, split=max(1, min(self.programs // blocks, chunks // 4, 16)))


@cache
def _table() -> dict[str, tuple[bool, list[Tiles]]]:
    text = resources.files("fewbit.kernels.triton").joinpath("tuning.toml").read_text(encoding="utf-8")
    return {name: (section["measured"], [Tiles(**row) for row in section["rows"]]) for name, section in tomllib.loads(text).items()}


_INSTALLED: list[Tiles] = []


def install(rows: list[Tiles]) -> None:
    """Rows that come before the table's in this process; none: the table's again."""
    _INSTALLED[:] = rows


def rows_of(name: str) -> list[Tiles] | None:
    """Measured rows for a device that torch calls `name`; None where the table has none."""
    found = next((section for known, section in _table().items() if known != "default" and name.startswith(known)), None)
    return None if found is None or not found[0] else found[1]


@cache
def _device_class(device: str) -> str:
    if interpreted() or not device.startswith("cuda"):
        return "default"
    name = torch.cuda.get_device_name(device)
    return next((known for known in _table() if known != "default" and name.startswith(known)), "default")


def is_measured(device: str) -> bool:
    """Whether the rows for a device come from a measurement."""
    return bool(_INSTALLED) or _table()[_device_class(device)][0]


def tiles_for(tokens: int, device: str) -> Tiles:
    """Block sizes for M = `tokens` on a device, `split` still open."""
    rows = _INSTALLED or _table()[_device_class(device)][1]
    return next((row for row in rows if tokens <= row.tokens), rows[-1])


def candidates(tokens: int) -> list[Tiles]:
    """Rows worth trying for M = `tokens`: what `search` and `benchmarks/gpu.py` choose from."""
    if tokens <= 32:
        block_m = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
        return [
            Tiles(block_m, True, block_m, block_n, programs, warps, stages)
            for block_n, warps in ((32, 2), (64, 2), (64, 4), (128, 4), (256, 8))
            for programs in (264, 528, 1056)
            for stages in (3, 5)
        ]
    sizes = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (128, 256, 8))
    return [
        Tiles(tokens, swap, block_m, block_n, programs, warps, 3)
        for block_m, block_n, warps in sizes
        for programs in ((0, 264) if tokens <= 256 else (0,))
        for swap in (True, False)
    ]


_FOUND: dict[tuple[object, ...], Tiles] = {}


def search(key: tuple[object, ...], tokens: int, shape: tuple[int, int], device: str, run: Callable[[Tiles], object]) -> Tiles:
    """Block sizes for a product: of the table where the device was measured, else the fastest candidate.

    Args:
        key: what the times depend on besides M and the shape (the layout, the dtype).
        shape: outputs and chunks of K.
        run: computes the product with these block sizes.
    """
    rule = tiles_for(tokens, device).for_shape(tokens, *shape)
    if not device.startswith("cuda") or is_measured(device) or os.environ.get("FEWBIT_TRITON_SEARCH", "1") == "0":
        return rule
    whole = (device, tokens if tokens <= 64 else 1 << (tokens - 1).bit_length(), shape, key)
    if whole not in _FOUND:
        if torch.cuda.is_current_stream_capturing():
            return rule
        tried = {tiles: _milliseconds(run, tiles) for tiles in {rule, *(c.for_shape(tokens, *shape) for c in candidates(tokens))}}
        _FOUND[whole] = min(tried, key=tried.__getitem__)
    return _FOUND[whole]


def _milliseconds(run: Callable[[Tiles], object], tiles: Tiles) -> float:
    """Of the fastest of some calls; infinite where the block sizes do not fit into the device (shared memory, registers)."""
    from triton.runtime.errors import OutOfResources

    try:
        run(tiles)
    except OutOfResources:
        return float("inf")
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(4):
            run(tiles)
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 4)
    return min(times)
