"""Section 1: what the device can do, by the same clock as everything after it."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import torch
import triton
import triton.language as tl
from _gpu_common import Settings, random_rows, time_calls

__all__ = ["describe", "measure_machine"]


@triton.jit
def _read(x_ptr, out_ptr, per_program, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, per_program, BLOCK):
        total ^= tl.load(x_ptr + program * per_program + start + tl.arange(0, BLOCK))
    tl.store(out_ptr + program * BLOCK + tl.arange(0, BLOCK), total)


def describe(settings: Settings) -> dict[str, Any]:
    """Device, driver and versions."""
    facts: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    if not settings.cuda:
        return facts | {"device": "Triton's interpreter on the CPU", "interpreted": True}
    properties = torch.cuda.get_device_properties(settings.device)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return facts | {
        "device": properties.name, "interpreted": False, "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None), "cuda": torch.version.cuda, "driver": driver.stdout.strip(),
    }  # fmt: skip


def measure_machine(settings: Settings) -> None:
    """The facts `facts` and `machine`: GB/s of copies (read and written) and reads, TFLOP/s of products, microseconds of a launch."""
    settings.write(fact="facts", **{"is": describe(settings)})
    size, side = (1 << 30, 8192) if settings.cuda else (1 << 16, 64)
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=settings.device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], settings)
    result: dict[str, Any] = {"copy_gb_s": 2 * size / copy / 1e6, "read_gb_s": _read_rate(settings, source)}
    x = random_rows(settings, side, side)
    codes = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=settings.device)
    result["bf16_tflop_s"] = _rate(settings, "bf16 product", side, lambda: torch.nn.functional.linear(x, x))
    result["int8_tflop_s"] = _rate(settings, "int8 product", side, lambda: torch._int_mm(codes, codes.t()))
    if not settings.cuda or torch.cuda.get_device_capability(settings.device) >= (8, 9):
        eight, one = x.to(torch.float8_e4m3fn), torch.ones((), device=settings.device)
        result["fp8_tflop_s"] = _rate(
            settings, "fp8 product", side, lambda: torch._scaled_mm(eight, eight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        )
    small = torch.zeros(1, device=settings.device)
    for name, graph in (("launch_us", False), ("launch_in_graph_us", True)):
        result[name] = 1e3 * time_calls([lambda: small.add_(1.0)] * (256 if settings.cuda else 4), settings, graph=graph)
    settings.write(fact="machine", **{"is": result})


def _read_rate(settings: Settings, source: torch.Tensor) -> float:
    """GB/s of the fastest of some ways to read: the shares of bandwidth are of this."""
    times = []
    for programs, block in ((1024, 2048), (2048, 1024), (4096, 2048), (16384, 4096)) if settings.cuda else ((4, 256),):
        sums = torch.empty(programs * block, dtype=torch.int32, device=settings.device)
        per_program = source.numel() // programs
        times.append(time_calls([lambda p=programs, b=block, s=sums, n=per_program: _read[(p,)](source, s, n, BLOCK=b)], settings))
    return source.nbytes / min(times) / 1e6


def _rate(settings: Settings, name: str, side: int, call: Any) -> float | None:
    milliseconds = settings.attempt(name, lambda: time_calls([call], settings))
    return None if milliseconds is None else 2 * side**3 / milliseconds / 1e9
