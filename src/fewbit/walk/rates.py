"""How fast this machine does what a quantization consists of, measured in a second or two.

Estimates from data sheets are worth little: what counts are the threads, the memory channels and the neighbours that this very process has.
Five rates are enough (`walk.estimate` says what they are multiplied with):

    matrix products in the working precision, and in float32     forward passes; second moments, factorizations, checks
    one elementwise pass over memory                             reading, converting, dequantizing
    writing to the output's disk, flushed                        finished blocks, shards
    hashing                                                      source, finished blocks
    the rounding method itself, on a small weight                per weight and per column: two sizes, two unknowns

The rounding is timed by calling it, with the very settings that will be used; so a new method needs no figure here.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fewbit.errors import FormatError
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.methods.rtn import rtn
from fewbit.methods.statistics import InputStatistics
from fewbit.walk.methods import ROUNDING_STEPS
from fewbit.walk.settings import WalkSettings

__all__ = ["Rates", "measure_rates"]

_GEMM_SIZE = 1536
_GEMM_BUDGET_S = 0.3
_PASS_ELEMENTS = 1 << 24  # 64 MiB of float32
_DISK_BYTES = 48 << 20
_ROWS = (128, 640)
_NULL_OPS = 1000


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Attributes:
        flops, float32_flops: operations per second of a matrix product in the working precision and in float32.
        pass_s: seconds per element of an elementwise operation that reads and writes float32 in memory.
        op_s: seconds of the smallest operation: the framework's own time.
        write_bytes_s, hash_bytes_s: bytes per second.
        rounding_s, rounding_column_s: seconds per weight and per column of a weight, of the chain's rounding.
        rtn_s: seconds per weight of rounding to nearest.
    """

    flops: float
    float32_flops: float
    pass_s: float
    op_s: float
    write_bytes_s: float
    hash_bytes_s: float
    rounding_s: float
    rounding_column_s: float
    rtn_s: float


def measure_rates(scheme: Scheme, settings: WalkSettings, dtype: torch.dtype, directory: Path) -> Rates:
    """Measure this machine, in about two seconds.

    Args:
        scheme, settings: what will be done.
        dtype: the working precision.
        directory: an existing folder on the disk that the checkpoint is written to.
    """
    assert scheme.weights is not None
    x = torch.ones(_PASS_ELEMENTS)
    x.mul_(1.0)
    pass_s = _best(lambda: x.mul_(1.0), 2) / _PASS_ELEMENTS
    one = torch.ones(1)
    op_s = _best(lambda: [one.add_(0.0) for _ in range(_NULL_OPS)], 2) / _NULL_OPS
    float32 = _gemm(torch.float32)
    data = memoryview(x[: _DISK_BYTES // 4].numpy().tobytes())
    hash_s = _best(lambda: hashlib.sha256(data[: 8 << 20]).digest(), 1)
    per_weight, per_column = _rounding(scheme.weights, settings)
    return Rates(
        flops=float32 if dtype == torch.float32 else _gemm(dtype),
        float32_flops=float32,
        pass_s=pass_s,
        op_s=op_s,
        write_bytes_s=_write(data, directory),
        hash_bytes_s=(8 << 20) / hash_s,
        rounding_s=per_weight,
        rounding_column_s=per_column,
        rtn_s=_rtn(scheme.weights),
    )


def _best(work: Callable[[], object], repetitions: int) -> float:
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _gemm(dtype: torch.dtype) -> float:
    """Operations per second; the mean and not the best, because neighbours will be there later, too."""
    a, b = (torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(dtype) for _ in range(2))
    small = a[:256] @ b  # the first product sets the library up, and a slow machine is measured on this one alone
    seconds = _best(lambda: torch.mm(a[:256], b, out=small), 1)
    if seconds > _GEMM_BUDGET_S:
        return 2 * 256 * _GEMM_SIZE**2 / seconds
    out, count, start = torch.empty_like(a), 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < _GEMM_BUDGET_S:
        torch.mm(a, b, out=out)
        count += 1
    return 2 * count * _GEMM_SIZE**3 / (time.perf_counter() - start)


def _write(data: memoryview, directory: Path) -> float:
    """Bytes per second, flushed to the disk."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - start)


def _weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def _columns(spec: QuantSpec) -> int:
    """A width that the format divides."""
    size = spec.group_size or 1
    return -(-256 // size) * size


def _rtn(spec: QuantSpec) -> float:
    weight = _weight(_ROWS[1], _columns(spec))
    return _best(lambda: rtn(weight, spec), 2) / weight.numel()


def _rounding(spec: QuantSpec, settings: WalkSettings) -> tuple[float, float]:
    """Seconds per weight and per column of the chain's rounding: t = columns * (per_column + rows * per_weight)."""
    step, columns = ROUNDING_STEPS[settings.recipe.rounding], _columns(spec)
    statistics = step.needs(settings).statistics(columns)
    tokens = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(1))
    _feed(statistics, tokens)
    try:
        step.apply([_weight(_ROWS[0], columns)], spec, statistics, settings)  # what is set up once is not counted
        times = [_best(lambda rows=rows: step.apply([_weight(rows, columns)], spec, statistics, settings), 2) for rows in _ROWS]  # type: ignore[misc]
    except FormatError:  # a chain that the plan refuses elsewhere, with its reason
        return 0.0, 0.0
    per_weight = max(times[1] - times[0], 0.0) / (_ROWS[1] - _ROWS[0]) / columns
    return per_weight, max(times[0] / columns - _ROWS[0] * per_weight, 0.0)


def _feed(statistics: InputStatistics, tokens: torch.Tensor) -> None:
    statistics.update(tokens, tokens)
