"""Hardware counters over a few decode steps, read by `perf stat` attached to this very process.

Counters say why a step takes as long as it does (instructions for dequantization, misses of the last-level cache for weights that
stream), where times only say that it does. perf is asked for the usual events; those that the processor, the hypervisor or the system's
settings withhold are left out, and `Counters.note` says so. Values are per step.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

from fewbit.results import Counters

__all__ = ["measure_counters", "parse_perf_stat"]

_HARDWARE = ("cycles", "instructions", "cache-references", "cache-misses", "branch-misses", "stalled-cycles-backend")
_SOFTWARE = ("task-clock", "page-faults", "context-switches", "cpu-migrations")
_ATTACH_SECONDS = 0.3


def measure_counters(step: Callable[[], object], *, steps: int, device: str = "cpu") -> Counters:
    """Counters per decode step, or the reason why there are none.

    Args:
        step: runs one decode step.
        steps: how many are run while perf counts.
        device: where the model runs; a GPU's counters need its own profiler around the whole process.
    """
    if device.startswith("cuda"):
        return Counters(tool="ncu", values={}, note="a GPU's counters are read from outside: run `ncu --set full fewbit bench ...`")
    if platform.system() != "Linux" or shutil.which("perf") is None:
        return Counters(tool="perf", values={}, note="perf is not installed; on Linux it comes with the package linux-tools or linux-perf")
    events = ",".join((*_HARDWARE, *_SOFTWARE))
    command = ["perf", "stat", "-x", ",", "-e", events, "-p", str(os.getpid())]
    perf = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "LC_ALL": "C"})
    try:
        time.sleep(_ATTACH_SECONDS)  # asleep, this process adds nothing to what perf counts meanwhile
        for _ in range(steps):
            step()
        perf.send_signal(signal.SIGINT)
        _, report = perf.communicate(timeout=10)
    finally:
        if perf.poll() is None:
            perf.kill()
            perf.wait()
    return parse_perf_stat(report, steps=steps)


def parse_perf_stat(report: str, *, steps: int) -> Counters:
    """Counters per step from the comma-separated output of `perf stat -x,`: value, unit, event, ...; task-clock is in milliseconds."""
    values: dict[str, float] = {}
    missing: list[str] = []
    other: list[str] = []
    for line in report.splitlines():
        fields = line.split(",")
        event = fields[2].split(":")[0] if len(fields) > 2 else ""
        if event not in _HARDWARE + _SOFTWARE:
            other += [line.strip()] if line.strip() else []
        elif fields[0].startswith("<"):
            missing.append(event)
        else:
            values[event] = float(fields[0]) / steps
    if not values:
        return Counters(tool="perf", values={}, note=f"perf counts nothing here: {other[0] if other else 'no output'}")
    note = ""
    if missing:
        note = f"not counted on this machine: {', '.join(missing)}"
        if not any(event in values for event in _HARDWARE):
            note = f"no hardware counters on this machine (a virtual machine often hides them): {', '.join(missing)}"
    return Counters(tool="perf", values=values, note=note)
