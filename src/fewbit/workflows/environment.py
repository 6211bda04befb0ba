"""`fewbit --version`: what a bug report and a reproduction need to know about this machine and its software.

Figures hold for a thread count, a CPU and versions of the libraries under them: two results are compared with these in view. Nothing here
leaves the machine; it is printed, and written into the results file that the user asked for.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec

import torch

import fewbit
from fewbit.kernels.environment import cpu_flags, cpu_name, memory_bytes
from fewbit.results import Environment

__all__ = ["environment", "environment_lines"]

# The libraries that a figure can depend on.
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "numpy", "pydantic")
# Of the hundred flags of a CPU, those that a kernel can depend on.
_RELEVANT_FLAGS = ("avx", "amx", "fma", "f16c", "neon", "asimd", "dotprod", "i8mm", "sve", "bf16", "fp16")


def environment(device: str = "cpu") -> Environment:
    """The machine, and the versions of everything that a figure can depend on.

    Args:
        device: where the measured model runs: `cpu`, or a torch device such as `cuda`.
    """
    return Environment(
        fewbit=fewbit.__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=platform.platform(),
        cpu=cpu_name(),
        cpu_flags=sorted(flag for flag in cpu_flags() if any(part in flag for part in _RELEVANT_FLAGS)),
        cpu_cores=_usable_cores(),
        memory_bytes=memory_bytes(),
        device=torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
        threads=torch.get_num_threads(),
        versions=_versions(),
    )


def environment_lines(environment: Environment) -> list[str]:
    """The environment for a person, one fact a line; the first line is the version alone."""
    native = "yes" if find_spec("fewbit._native") else "missing: install again with a C++ compiler"
    return [
        f"fewbit {environment.fewbit}",
        f"Python: {environment.python}",
        f"platform: {environment.platform}",
        f"CPU: {environment.cpu}, {environment.cpu_cores} cores, {environment.memory_bytes / 2**30:.1f} GiB",
        f"CPU flags: {' '.join(environment.cpu_flags) or 'none that a kernel uses'}",
        f"device: {environment.device}, {environment.threads} threads",
        f"native extension: {native}",
        *(f"{name}: {version}" for name, version in environment.versions.items()),
    ]


def _usable_cores() -> int:
    """Cores that this process may run on, which in a container or under taskset are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch"] = torch.__version__  # with the local label that says CPU or CUDA
    return versions
