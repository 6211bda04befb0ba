"""Whether Triton kernels can run here, and why not.

The interpreter (`TRITON_INTERPRET=1`, set before Triton is imported) runs the same kernels on the CPU with NumPy, slowly: that is how they
are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

from fewbit.errors import KernelError

__all__ = ["interpreted", "on_device", "preference", "refuse_device", "room_for"]

_MINIMUM_CAPABILITY = (8, 0)  # Ampere: BF16 tensor cores


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def preference() -> int:
    """Added to the priority of Triton's kernels: in the interpreter they come before the CPU's own: that is why it was switched on."""
    return 100 if interpreted() else 0


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def refuse_device(device: str, minimum: tuple[int, int] = _MINIMUM_CAPABILITY) -> str | None:
    """None when Triton kernels can run on `device` ("cpu", "cuda", "cuda:1"); else the reason with the numbers.

    Args:
        minimum: CUDA compute capability that the kernel needs.
    """
    kind = device.partition(":")[0]
    if kind == "cpu" and interpreted():
        return None if _has_triton() else "Triton is not installed (pip install triton)"
    if kind != "cuda":
        return f"runs on NVIDIA GPUs, not on {kind}"
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    if torch.version.hip is not None:
        return "runs on NVIDIA GPUs, not on AMD's"  # which torch calls "cuda", too
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < minimum:
        name = torch.cuda.get_device_name(device)
        return f"needs compute capability {minimum[0]}.{minimum[1]}; {name} has {capability[0]}.{capability[1]}"
    return None


def on_device(device: torch.device | str) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments are on: within this context that is `device`."""
    return torch.cuda.device(device) if str(device).startswith("cuda") else nullcontext()


@contextmanager
def room_for(what: str, device: torch.device | str, remedy: str) -> Iterator[None]:
    """Within this context a GPU without memory is an error that names `what` needed it.

    Raises:
        KernelError: out of memory; the free and the whole memory are in the message.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if torch.cuda.is_available():
            free, whole = (size / 2**30 for size in torch.cuda.mem_get_info(device))
            seen = f" ({free:.1f} of {whole:.1f} GiB are free on {device})"
        else:
            seen = f" on {device}"
        raise KernelError(f"no memory for {what}{seen}", remedy) from error
