"""What the sections of `gpu.py` share: settings, the clock, timing over rotated copies under a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["Clock", "Settings", "copies_for", "random_rows", "time_calls"]


class Clock:
    """The time that a section may take; what does not fit is listed as skipped, not dropped silently."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.skipped: list[str] = []

    def allows(self, what: str) -> bool:
        """Whether there is time left; notes `what` when there is none."""
        if time.monotonic() < self._end:
            return True
        self.skipped.append(what)
        return False


@dataclass
class Settings:
    """How to run.

    Attributes:
        device: `cuda`, or `cpu` where Triton's interpreter runs.
        tiny: the smallest sizes: whether everything works, no figure means anything.
        dtype: of activations; float32 in the interpreter, whose BF16 is cut off.
        seconds: for a section.
        failures: what went wrong on the way, by name.
    """

    device: str
    tiny: bool
    dtype: torch.dtype
    seconds: float
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether figures are measurements."""
        return self.device.startswith("cuda")

    def attempt(self, name: str, run: Callable[[], float | None]) -> float | None:
        """A figure, or None with the reason in `failures`: one contender that fails does not end the run."""
        try:
            return run()
        except Exception as error:  # a peer may raise anything
            self.failures[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            return None


def copies_for(nbytes: int, settings: Settings) -> int:
    """Copies of a weight that together exceed four times the second-level cache, at least two and at most 64."""
    if not settings.cuda:
        return 1
    cache = getattr(torch.cuda.get_device_properties(settings.device), "L2_cache_size", 64 << 20)
    return min(max(2, -(-4 * cache // max(nbytes, 1)) + 1), 64)


def random_rows(settings: Settings, *shape: int, seed: int = 0) -> torch.Tensor:
    """Normal values in the settings' dtype."""
    generator = torch.Generator(settings.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=settings.device, dtype=settings.dtype)


def time_calls(calls: Sequence[Callable[[], object]], settings: Settings, *, graph: bool = True, replays: int = 15) -> float:
    """Milliseconds of one call, median over replays of all of them in turn.

    Args:
        calls: the same work over different memory, so that no cache helps.
        graph: capture them; False shows what launching costs. On the CPU they are called once and timed by the wall clock.
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
    times = []
    for _ in range(replays):
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        if graph:
            captured.replay()
        else:
            for call in rounds:
                call()
        end_event.record()
        end_event.synchronize()
        times.append(begin_event.elapsed_time(end_event) / len(rounds))
    return statistics.median(times[len(times) // 4 :])
