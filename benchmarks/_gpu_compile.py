"""Kernels compiled for a GPU by a machine that need not have one: what fewbit launches is compiled and not run.

The launchers get tensors without memory (torch's `meta` device) and choose block sizes and constants as for real ones; a launch is noted
and compiled for a compute capability, into Triton's cache on disk. So `gpu_machine_code.py` sees every kernel that `gpu.py` will
launch, with its very constants, and `gpu.py` compiles on all cores before it takes times, instead of one after the other in between.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

__all__ = ["Launch", "compile_launch", "compile_many", "only_compile"]


class _Target:
    """Triton's driver where there is no device: it knows what to compile for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        """A number of its own for every capability, so that compiled kernels are not mixed up."""
        return self._capability

    def get_current_stream(self, device: int) -> int:
        """None is used."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self._capability, 32)


@dataclass(frozen=True)
class Launch:
    """A kernel with the constants and the types of one launch.

    Attributes:
        name: of the job that launched it first. grid: programs. arguments, options: of the launch.
    """

    name: str
    function: Any
    grid: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def only_compile(capability: int, jobs: Iterator[tuple[str, Callable[[], object]]]) -> tuple[list[Launch], dict[str, str]]:
    """The launches of jobs, each kernel with each set of constants and types once. From here on this process launches nothing.

    Args:
        capability: without the dot: 80, 89, 90.
        jobs: names, and calls that launch on tensors of the device `meta`.

    Returns:
        The launches; and jobs that raised something, by name.
    """
    driver.set_active(_Target(capability))
    found: dict[Any, Launch] = {}
    current = ""

    def note(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = self.device_caches[capability][-1]
        _, specialization, _ = binder(*arguments, debug=False, instrumentation_mode="", **options)
        key = (self.fn.__qualname__, str(specialization), str(sorted((k, str(v)) for k, v in options.items())))
        found.setdefault(key, Launch(current, self, grid, arguments, options))

    run, JITFunction.run, errors = JITFunction.run, note, {}
    try:
        for current, job in jobs:
            try:
                job()
            except Exception as error:  # said, not hidden: see the return value
                errors[current] = f"{type(error).__name__}: {error}"
    finally:
        JITFunction.run = run
    return list(found.values()), errors


def compile_launch(launch: Launch) -> Any:
    """Triton's compiled kernel; from its cache where it is there already."""
    return launch.function.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)


_TODO: list[Launch] = []


def _one(index: int) -> str | None:
    launch = _TODO[index]
    try:
        compile_launch(launch)
    except Exception as error:  # of one kernel: the others are still to be compiled
        return f"{launch.name}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return None


def compile_many(launches: list[Launch], processes: int, seconds: float) -> list[str]:
    """Compile in processes of their own, forked from this one, which must not have touched a GPU.

    Returns:
        What failed, one line each; and how many there was no time for.
    """
    _TODO[:] = launches
    end, failed, done = time.monotonic() + seconds, [], 0
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        results = pool.imap_unordered(_one, range(len(launches)), chunksize=1)
        for _ in launches:
            try:
                result = results.next(max(end - time.monotonic(), 0.1))
            except multiprocessing.TimeoutError:
                failed.append(f"no time for {len(launches) - done} kernels: they are compiled when they are met")
                break
            done += 1
            if result is not None:
                failed.append(result)
        pool.terminate()
    return failed


def meta(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor without memory of the same dtype."""
    return torch.empty(shape or tensor.shape, dtype=tensor.dtype, device="meta")


def on_meta(value: Any) -> Any:
    """A dataclass of tensors, or a dictionary of them, without memory."""
    if isinstance(value, dict):
        return {name: meta(tensor) for name, tensor in value.items()}
    return dataclasses.replace(value, **{name: meta(one) for name, one in vars(value).items() if isinstance(one, torch.Tensor)})
