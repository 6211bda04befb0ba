"""Times of passes that had the cores to themselves, on a machine that is shared.

Linux counts for every thread how long it stood ready and waited for a core (the second field of `/proc/self/task/*/schedstat`). A pass
during which the threads of this process waited for more than a fiftieth of it measured the neighbours, and two threads that wait for each
other at a barrier pay for it twice. Such passes do not count; where too few are left, those that waited least do. Elsewhere every pass
counts.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

__all__ = ["Passes", "waited_seconds"]

_TASKS = Path("/proc/self/task")
_MOST_WAITING = 0.02
_LEAST_SHARE = 1 / 3


def waited_seconds() -> float:
    """Seconds that the threads of this process have waited for a core so far, together; 0 where the system does not say."""
    total = 0
    with contextlib.suppress(OSError):
        for task in os.listdir(_TASKS):
            with contextlib.suppress(OSError, ValueError, IndexError):  # the thread has just ended
                total += int((_TASKS / task / "schedstat").read_text().split()[1])
    return total / 1e9


@dataclass
class Passes:
    """Passes of one kind: what each gave, and the share of its time that threads waited."""

    values: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.values)

    def run(self, work: Callable[[], float | None]) -> None:
        """One pass.

        Args:
            work: returns what is kept of the pass; None: its seconds.
        """
        before = waited_seconds()
        started = time.perf_counter()
        value = work()
        seconds = time.perf_counter() - started
        self.values.append(seconds if value is None else value)
        self.waiting.append((waited_seconds() - before) / seconds)

    def undisturbed(self) -> list[float]:
        """Of the passes that count: those that hardly waited, at least a third of all."""
        ranked = sorted(zip(self.waiting, self.values, strict=True))
        least = max(1, round(len(ranked) * _LEAST_SHARE))
        return [value for place, (waiting, value) in enumerate(ranked) if place < least or waiting <= _MOST_WAITING]

    def median(self) -> float:
        """Of those that count."""
        return median(self.undisturbed())
