"""A process that answers "run one timed pass" over a pipe, so that the passes of several libraries can take turns on the same cores.

Each library needs an environment of its own, and a process that stays: loading and packing weights takes far longer than a pass. The driver
(`_interleaved.py`) starts `python peers/NAME.py`, writes one JSON object per line to its standard input and reads one per line from its
standard output:

    {"op": "setup", "key": "a", "case": {...}}     -> {"bytes": ..., "calls": ..., ...}     what the pass reads and computes
    {"op": "pass", "key": "a"}                     -> {"seconds": ..., "delay": ..., "runtime": ...}
    {"op": "drop"}                                 -> {}                                    forget every setup
    anything that fails                            -> {"error": "what was wrong"}

A pass that returns a float says itself how many seconds of it count.

`delay` is the time that the process's threads stood ready and waited for a core during the pass (the second field of
`/proc/self/task/*/schedstat`): on a machine that is shared, a pass with much of it measured the others.

After two warm-up passes the busiest threads are pinned, one per core. A library's two threads that the system has put on one core would be
timed at half speed, and which of the libraries that happens to is chance. A pass runs under real-time priority where the system grants it
(root), so that other processes wait for the pass and not the pass for them.

Standard library only: this file runs in every environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Setup", "serve", "thread_times"]

Pass = Callable[[], object]
Setup = Callable[[dict[str, Any]], tuple[Pass, dict[str, Any]]]

_TASKS = "/proc/self/task"


def thread_times() -> dict[int, tuple[int, int]]:
    """Nanoseconds (running, waiting for a core) of each thread of this process; empty where the system does not tell."""
    found = {}
    try:
        tasks = os.listdir(_TASKS)
    except OSError:
        return {}
    for task in tasks:
        try:
            with open(f"{_TASKS}/{task}/schedstat", encoding="ascii") as file:
                running, waiting, _ = file.read().split()
        except (OSError, ValueError):  # the thread has just ended, or a kernel without schedstat
            continue
        found[int(task)] = (int(running), int(waiting))
    return found


def _schedule(policy: int, priority: int) -> None:
    """Let every thread of this process run under a policy; without the right to do so nothing changes."""
    for task in thread_times():
        with contextlib.suppress(OSError):
            os.sched_setscheduler(task, policy, os.sched_param(priority))


def _measured(work: Pass) -> dict[str, float]:
    before = thread_times()
    start = time.perf_counter()
    own = work()
    seconds = own if isinstance(own, float) else time.perf_counter() - start
    after = thread_times()
    running = sum(now[0] - before.get(task, (0, 0))[0] for task, now in after.items())
    waiting = sum(now[1] - before.get(task, (0, 0))[1] for task, now in after.items())
    return {"seconds": seconds, "delay": waiting / 1e9, "runtime": running / 1e9}


def _pin_busiest(before: dict[int, tuple[int, int]], cores: list[int]) -> None:
    """One core for each of the threads that ran most since `before`, when there are several; threads that hardly ran stay as they are."""
    ran = {task: now[0] - before.get(task, (0, 0))[0] for task, now in thread_times().items()}
    most = max(ran.values(), default=0)
    busiest = sorted((task for task in ran if ran[task] * 10 > most), key=lambda task: -ran[task])[: len(cores)]
    if len(busiest) < 2:
        return
    main = threading.get_native_id()
    busiest.sort(key=lambda task: task != main)  # it serves several cases: always on the first core
    for core, task in zip(cores, busiest, strict=False):
        os.sched_setaffinity(task, {core})


def serve(setup: Setup) -> None:
    """Answer requests until standard input ends.

    Args:
        setup: makes a pass from a case, and says what is worth knowing about it. What fails in it is told to the driver.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    passes: dict[str, Pass] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["op"] == "setup":
                if cores:
                    os.sched_setaffinity(0, cores)  # threads that a library starts now inherit it
                work, answer = setup(request["case"])
                work()
                before = thread_times()
                work()
                _pin_busiest(before, cores)
                passes[request["key"]] = work
            elif request["op"] == "pass":
                if hasattr(os, "sched_setscheduler"):  # for the pass alone: what spins between passes must not hold up the next contender
                    _schedule(os.SCHED_RR, 1)
                try:
                    answer = _measured(passes[request["key"]])
                finally:
                    if hasattr(os, "sched_setscheduler"):
                        _schedule(os.SCHED_OTHER, 0)
            else:
                passes.clear()
                answer = {}
        except Exception as error:  # whatever a peer raises becomes its row's reason
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
