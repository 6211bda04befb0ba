"""Times of several contenders in turns: one pass of each, again and again, and only the passes that had the cores to themselves.

On a shared machine the memory bandwidth differs by a factor of two between hours, and a neighbour that wakes up takes half a core. So no
contender is timed after another; all of them are loaded, each in a process of its own (`peers/_worker.py`), and their passes take turns.
A pass counts when its threads waited for a core during less than a fiftieth of it. What is compared are medians of counted passes.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _bars import NotMeasuredError

__all__ = ["MAX_DELAY", "MIN_PASSES", "Contender", "PeerError", "Series", "Worker", "interleave"]

MAX_DELAY = 0.02  # of a pass's time, summed over its threads
# A pass longer than a second cannot escape the share of each second that Linux keeps from real-time processes: 50 ms, of two threads. It
# makes all of them slower alike; shorter passes by up to a twentieth less.
MAX_DELAY_LONG, _SECOND = 0.15, 0.95
MIN_PASSES = 5
_PAUSE = 0.004  # seconds between passes: threads that spin while they wait for work go to sleep
# Linux stops real-time processes for the last twentieth of each second that they fill. After a second's rest a pass of less than 0.95 s is
# spared.
_LONG, _REST = 0.1, 1.0


class PeerError(Exception):
    """A peer that does not start or refuses a case; the message is its own."""


class Worker:
    """A peer's process.

    Args:
        name: for messages.
        python: the interpreter of its environment.
        script: its file in `peers/`.
        threads: for OMP_NUM_THREADS and the like; the cases name it, too.
    """

    def __init__(self, name: str, python: Path | str, script: Path, *, threads: int, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, **(env or {})}
        self._process = subprocess.Popen(
            [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            PeerError: the answer is an error, or the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"{self.name}'s process ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process; one that has ended already, or was killed, is no error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@dataclass
class Series:
    """The passes of one contender: seconds of those that count, how many did not; the fastest of all is told, never compared."""

    kept: list[float] = field(default_factory=list)
    dropped: int = 0
    fastest: float = float("inf")
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, answer: Mapping[str, float]) -> None:
        """Take a worker's answer; the pass counts when its threads waited for at most `MAX_DELAY` (`MAX_DELAY_LONG`) of it."""
        self.fastest = min(self.fastest, answer["seconds"])
        max_delay = MAX_DELAY if answer["seconds"] < _SECOND else MAX_DELAY_LONG
        if answer["delay"] <= max_delay * answer["seconds"]:
            self.kept.append(answer["seconds"])
        else:
            self.dropped += 1

    def median(self) -> float:
        """Seconds of the median pass.

        Raises:
            NotMeasuredError: too few passes count.
        """
        if len(self.kept) < MIN_PASSES:
            raise NotMeasuredError(f"{len(self.kept)} of {len(self.kept) + self.dropped} passes had the cores to themselves")
        return statistics.median(self.kept)


@dataclass(frozen=True)
class Contender:
    """A pass that is set up in a worker under `key`."""

    name: str
    worker: Worker
    key: str
    facts: dict[str, Any]


def interleave(contenders: Sequence[Contender], *, passes: int, limit_seconds: float) -> dict[str, Series]:
    """Run passes in turns until each contender has `passes` that count, or the time is up. There is a rest before and after long ones.

    Half the time is added while somebody lacks a pass or two of the `MIN_PASSES` that a median needs.

    A contender that fails on the way keeps what it has; its reason goes to stderr.
    """
    series = {contender.name: Series(facts=contender.facts) for contender in contenders}
    running, deadline, last = list(contenders), time.monotonic() + limit_seconds, 0.0
    while running and (time.monotonic() < deadline or (time.monotonic() < deadline + limit_seconds / 2 and _nearly(series))):
        for contender in list(running):
            fastest = series[contender.name].fastest
            time.sleep(_REST if last > _LONG or _LONG < fastest < float("inf") else _PAUSE)
            try:
                answer = contender.worker.ask(op="pass", key=contender.key)
                series[contender.name].add(answer)
                last = answer["seconds"]
            except PeerError as error:
                print(error, file=sys.stderr)
                running.remove(contender)
        running = [contender for contender in running if len(series[contender.name].kept) < passes]
    return series


def _nearly(series: Mapping[str, Series]) -> bool:
    """Whether one or two passes more would decide."""
    fewest = min(len(found.kept) for found in series.values())
    return MIN_PASSES - 2 <= fewest < MIN_PASSES
