"""Block sizes of the Triton kernels: a table by device class, read from `tuning.toml`.

A device class is the compute capability with the device's name in front where one was measured (`NVIDIA H200`), else `default`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

import torch

from fewbit.kernels.triton.environment import interpreted

__all__ = ["Tiles", "tiles_for"]


@dataclass(frozen=True)
class Tiles:
    """One row of the table.

    Attributes:
        tokens: the largest M it serves. gemv: no tensor cores.
        block_m, block_n: outputs of a program. block_words: words of codes per step along K.
        split: parts that K is cut into (GEMV). num_warps, num_stages: Triton's.
    """

    tokens: int
    gemv: bool
    block_m: int
    block_n: int
    block_words: int
    split: int
    num_warps: int
    num_stages: int


@cache
def _table() -> dict[str, list[Tiles]]:
    text = resources.files("fewbit.kernels.triton").joinpath("tuning.toml").read_text(encoding="utf-8")
    return {name: [Tiles(**row) for row in section["rows"]] for name, section in tomllib.loads(text).items()}


@cache
def _device_class(device: str) -> str:
    if interpreted() or not torch.cuda.is_available():
        return "default"
    name = torch.cuda.get_device_name(device)
    return next((known for known in _table() if known != "default" and name.startswith(known)), "default")


def tiles_for(tokens: int, device: str) -> Tiles:
    """Block sizes for M = `tokens` on a device."""
    rows = _table()[_device_class(device)]
    return next((row for row in rows if tokens <= row.tokens), rows[-1])
