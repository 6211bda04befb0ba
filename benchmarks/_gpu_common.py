"""What the sections of `gpu.py` share: settings, the journal, the clock, timing over rotated copies under a CUDA graph.

Every section runs in a process of its own (`_gpu_sections`) and writes what it finds to a journal, one JSON object a line, as it goes:

    {"begin": NAME}                an attempt; a section that is started again leaves out the last one that had begun, and what was done
    {"done": NAME}                 it came to its end
    {"row": TABLE, "of": {...}}    a measurement
    {"failed": NAME, "why": ...}   a contender that failed
    {"skipped": NAME}              there was no time for it
    {"fact": KEY, "is": ...}       anything else
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["BROKEN_DEVICE", "Clock", "Settings", "copies_for", "random_rows", "time_calls"]

BROKEN_DEVICE = 3  # exit code of a section whose CUDA context no longer works: the parent starts it again without the attempt that broke it
_LARGEST_L2 = 64 << 20  # where the device does not say
_MILLISECONDS = 50.0  # of replays that one figure is taken from


class Clock:
    """The time that a section may take; what does not fit is listed as skipped, not dropped silently."""

    def __init__(self, seconds: float, settings: Settings) -> None:
        self._end = time.monotonic() + seconds
        self._settings = settings

    def allows(self, what: str) -> bool:
        """Whether there is time left; notes `what` when there is none."""
        if time.monotonic() < self._end:
            return True
        self._settings.write(skipped=what)
        return False


@dataclass
class Settings:
    """How to run, and where to write.

    Attributes:
        device: `cuda`, or `cpu` where Triton's interpreter runs.
        tiny: the smallest sizes: whether everything works, no figure means anything.
        dtype: of activations; float32 in the interpreter, whose BF16 is cut off.
        journal: the file of this section; None: nothing is kept.
        leave_out: attempts that an earlier process of this section has made, or broke down in.
    """

    device: str
    tiny: bool
    dtype: torch.dtype
    journal: Path | None = None
    leave_out: frozenset[str] = frozenset()

    @property
    def cuda(self) -> bool:
        """Whether figures are measurements."""
        return self.device.startswith("cuda")

    def write(self, **entry: Any) -> None:
        """Append one line to the journal."""
        if self.journal is not None:
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, default=str) + "\n")

    def record(self, table: str, row: dict[str, Any]) -> None:
        """Keep a measurement."""
        self.write(row=table, of=row)

    def attempt(self, name: str, run: Callable[[], Any]) -> Any:
        """What `run` returns, or None with the reason in the journal: one contender that fails does not end the run.

        After an error that leaves the CUDA context unusable (an illegal access) nothing measured in this process would mean anything:
        it ends with `BROKEN_DEVICE`.
        """
        if name in self.leave_out:
            return None
        self.write(begin=name)
        try:
            result = run()
            self.write(done=name)
            return result
        except Exception as error:  # a peer may raise anything
            lines = str(error).strip().splitlines() or [""]
            self.write(failed=name, why=f"{type(error).__name__}: {lines[0][:300]}")
            if self.cuda and _breaks_the_device(error):
                os._exit(BROKEN_DEVICE)
        if self.cuda:  # what a failed attempt held is free now: the next one may need it in one piece
            torch.cuda.empty_cache()
        return None


def _breaks_the_device(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return False
    text = str(error)
    return "CUDA error" in text or "Triton Error [CUDA]" in text or "CUBLAS_STATUS_EXECUTION_FAILED" in text


def copies_for(nbytes: int, settings: Settings) -> int:
    """Copies of a weight that together exceed four times the second-level cache, at least two."""
    if not settings.cuda:
        return 1
    cache = getattr(torch.cuda.get_device_properties(settings.device), "L2_cache_size", _LARGEST_L2)
    return max(2, -(-4 * cache // max(nbytes, 1)) + 1)


def random_rows(settings: Settings, *shape: int, seed: int = 0) -> torch.Tensor:
    """Normal values in the settings' dtype."""
    generator = torch.Generator(settings.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=settings.device, dtype=settings.dtype)


def time_calls(
    calls: Sequence[Callable[[], object]], settings: Settings, *, graph: bool = True, milliseconds: float = _MILLISECONDS
) -> float:
    """Milliseconds of one call, median over replays of all of them in turn.

    Args:
        calls: the same work over different memory, so that no cache helps.
        graph: capture them; False shows what launching costs. On the CPU they are called once and timed by the wall clock.
        milliseconds: of replays that the median is taken over, at least 3 replays and at most 25.
    """
    if not settings.cuda:
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) * 1e3 / len(calls)
    rounds = [*calls] * max(1, -(-8 // len(calls)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    if graph:
        with torch.cuda.graph(captured):
            for call in rounds:
                call()

    def replay() -> float:
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        if graph:
            captured.replay()
        else:
            for call in rounds:
                call()
        end_event.record()
        end_event.synchronize()
        return float(begin_event.elapsed_time(end_event))

    replay()  # the first one uploads the graph
    once = max(replay(), 1e-3)
    times = [replay() for _ in range(int(min(max(milliseconds / once, 3), 25)))]
    return statistics.median(times) / len(rounds)
