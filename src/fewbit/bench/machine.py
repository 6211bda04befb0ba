"""What this machine can do, measured in the run that uses it: DRAM read bandwidth, GEMM rate, time of a smallest operation.

A decode step cannot be faster than its bytes over the read bandwidth, its operations over the GEMM rate, or its operators times the
framework's time per operator. Data sheets give none of these for the cores, the memory channels and the neighbours that a process really
has (a virtual machine above all), so they are measured, in a few seconds.

Bandwidth: the best pass of reading a buffer that no cache can hold (at least 8 times the last-level cache). The small native probe
`fewbit._native` reads with plain vector loads in each thread and nothing else; without it a torch sum over the same buffer stands in, and
`MachineResult.bandwidth_method` says which it was. The best pass counts, not the mean: interference only ever slows a pass down.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fewbit.results import MachineResult

__all__ = ["last_level_cache_bytes", "measure_gemm", "measure_machine", "measure_null_op", "measure_read_bandwidth", "synchronize"]

_MIN_BUFFER_BYTES = 512 * 2**20
_MAX_BUFFER_BYTES = 2 * 2**30
_DEVICE_BUFFER_BYTES = 4 * 2**30
_NATIVE_SECONDS_PER_PASS = 0.12
_NULL_OPS = 2000


def measure_machine(*, quick: bool = False, device: str = "cpu") -> MachineResult:
    """Measures this machine; about 3 seconds, with `quick` about 1.

    Args:
        quick: fewer passes and smaller products, for tests and smoke runs.
        device: `cpu` or a torch device name.
    """
    bandwidth, method = measure_read_bandwidth(passes=3 if quick else 8, device=device)
    return MachineResult(
        read_bandwidth_gb_s=bandwidth,
        bandwidth_method=method,
        gemm_gflop_s=measure_gemm(budget_s=0.3 if quick else 1.2, device=device),
        gemm_dtype="bfloat16",
        time_per_null_op_us=measure_null_op(device=device),
    )


def synchronize(device: str | torch.device) -> None:
    """Waits until the device has done what was asked of it; the CPU always has."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()


def last_level_cache_bytes(sysfs: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache of the first core; 32 MiB where the system does not tell (macOS)."""
    sizes = [path.read_text().strip() for path in sysfs.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units]
    return max(found, default=32 * 2**20)


def measure_read_bandwidth(*, passes: int, device: str = "cpu") -> tuple[float, str]:
    """(1e9 bytes per second of the best pass, how it was measured)."""
    if torch.device(device).type != "cpu":
        return _torch_read_bandwidth(_DEVICE_BUFFER_BYTES, passes, device)
    buffer_bytes = min(max(_MIN_BUFFER_BYTES, 8 * last_level_cache_bytes()), _MAX_BUFFER_BYTES)
    try:
        native = importlib.import_module("fewbit._native")
    except ImportError:  # an installation without a compiler has no native probe; the method says so
        return _torch_read_bandwidth(buffer_bytes, passes, device)
    threads = torch.get_num_threads()
    bandwidth = float(native.read_bandwidth(buffer_bytes, threads, _NATIVE_SECONDS_PER_PASS * passes))
    return bandwidth, f"native {native.instruction_set()} read of {buffer_bytes / 2**20:.0f} MiB, {threads} threads, best pass"


def _torch_read_bandwidth(buffer_bytes: int, passes: int, device: str) -> tuple[float, str]:
    buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    best = best_seconds(buffer.sum, repetitions=passes, device=device)
    where = f"{torch.get_num_threads()} threads" if torch.device(device).type == "cpu" else device
    return buffer_bytes / best / 1e9, f"torch sum over {buffer_bytes / 2**20:.0f} MiB, {where}, best of {passes}"


def measure_gemm(*, budget_s: float, device: str = "cpu") -> float:
    """1e9 operations per second of the best BF16 matrix product among a few shapes, in about `budget_s` seconds.

    The sizes grow while one more product fits in the budget: a processor without BF16 instructions gets its answer from the small one.
    """
    sizes = (512, 1024, 2048) if torch.device(device).type == "cpu" else (2048, 4096, 8192)
    deadline = time.perf_counter() + budget_s
    best = 0.0
    for size in sizes:
        operations = 2 * size**3
        if best and operations / (best * 1e9) * 2 > deadline - time.perf_counter():
            break
        a = torch.randn(size, size, device=device).to(torch.bfloat16)
        b = torch.randn(size, size, device=device).to(torch.bfloat16)
        product = torch.empty(size, size, device=device, dtype=torch.bfloat16)
        torch.mm(a, b, out=product)  # the first call builds the product's plan
        for _ in range(8):
            seconds = best_seconds(lambda a=a, b=b, out=product: torch.mm(a, b, out=out), repetitions=1, device=device)  # type: ignore[misc]
            best = max(best, operations / seconds / 1e9)
            if time.perf_counter() > deadline:
                break
    return best


def measure_null_op(*, device: str = "cpu") -> float:
    """Microseconds that the framework needs for one operation on one element: the best mean of five rounds."""
    x = torch.ones(1, device=device)

    def round_of_ops() -> None:
        for _ in range(_NULL_OPS):
            x.add_(0.0)

    return best_seconds(round_of_ops, repetitions=5, device=device) / _NULL_OPS * 1e6


def best_seconds(work: Callable[[], object], *, repetitions: int, device: str) -> float:
    """Seconds of the fastest repetition of `work`."""
    best = float("inf")
    for _ in range(repetitions):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
