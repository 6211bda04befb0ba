"""Block sizes for this device: per number of tokens the candidate with the best geometric mean over shapes, INT4 in groups of 128."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from _gpu_common import Clock, Settings, copies_for, random_rows, time_calls

from fewbit.formats.spec import get_scheme
from fewbit.kernels.triton.layout import layout_of, pack
from fewbit.kernels.triton.tuning import Tiles, candidates, tiles_for
from fewbit.kernels.triton.weight_only import multiply
from fewbit.runtime.gpu_model import random_quantized

__all__ = ["SHAPES", "STEPS", "as_toml", "measure_tiles", "rows_from"]

SHAPES = ((8192, 28672), (4096, 11008), (4096, 4096), (22016, 2048))
STEPS = ((8, 1), (16, 16), (32, 32), (64, 64), (128, 128), (1048576, 1024))  # largest M of a row, and the M it is measured at


def measure_tiles(settings: Settings, seconds: float) -> None:
    """Rows `tuning`: the mean time of each candidate, as a share of the best one's where there is one."""
    clock, spec = Clock(seconds, settings), get_scheme("W4A16").weights
    assert spec is not None
    generator = torch.Generator(settings.device).manual_seed(0)
    weights = []
    for out, columns in ((32, 256),) if settings.tiny else SHAPES:
        first = pack(random_quantized(out, columns, spec, generator))
        size = sum(tensor.nbytes for tensor in first.values())
        more = [{name: tensor.clone() for name, tensor in first.items()} for _ in range(min(copies_for(size, settings), 16) - 1)]
        weights.append((out, columns, [first, *more]))
    for tokens, m in STEPS[:1] if settings.tiny else STEPS:
        tried = [tiles_for(m, settings.device), *candidates(m)]
        for tiles in dict.fromkeys(tried[:2] if settings.tiny else tried):
            what = f"tune M={m} {tiles.block_m}x{tiles.block_n} {tiles.programs} {tiles.num_warps} {tiles.num_stages} {tiles.swap}"
            if clock.allows(what):
                settings.attempt(what, lambda t=tiles, m=m, n=tokens: _candidate(settings, weights, t, m, n, spec))


def _candidate(settings: Settings, weights: list[Any], tiles: Tiles, m: int, tokens: int, spec: Any) -> None:
    logarithms = []
    for out, columns, copies in weights:
        x, layout = random_rows(settings, m, columns), layout_of(spec, columns)
        own = tiles.for_shape(m, out, layout.chunks)
        calls = [lambda c=c, x=x, la=layout, t=own: multiply(x, c, la, t) for c in copies]
        logarithms.append(math.log(time_calls(calls, settings, milliseconds=6)))
    mean = math.exp(sum(logarithms) / len(logarithms))
    row = dataclasses.asdict(tiles) | {"tokens": tokens, "split": 1}
    settings.record("tuning", {"tiles": row, "ms": mean, "by_shape_ms": [math.exp(value) for value in logarithms]})


def rows_from(report: dict[str, Any]) -> list[Tiles]:
    """The best row for each number of tokens; nothing where one of them has none."""
    best: dict[int, dict[str, Any]] = {}
    for row in report.get("tuning", ()):
        tokens = row["tiles"]["tokens"]
        if tokens not in best or row["ms"] < best[tokens]["ms"]:
            best[tokens] = row
    if set(best) != {tokens for tokens, _ in STEPS}:
        return []
    return [Tiles(**best[tokens]["tiles"]) for tokens, _ in STEPS]


def as_toml(device: str, rows: list[Tiles]) -> str:
    """A section for `src/fewbit/kernels/triton/tuning.toml`."""
    lines = [
        f"  {{ tokens = {t.tokens}, swap = {str(t.swap).lower()}, block_m = {t.block_m}, block_n = {t.block_n}, programs = {t.programs}, "
        f"num_warps = {t.num_warps}, num_stages = {t.num_stages} }},"
        for t in rows
    ]
    return "\n".join([f'["{device}"]', "measured = true", "rows = [", *lines, "]"])
