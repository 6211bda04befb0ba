"""The machine that kernels run on: processor, instruction sets, memory. Read from the operating system, nothing measured."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

__all__ = ["cpu_flags", "cpu_name", "memory_bytes", "peak_rss_bytes"]

_CPUINFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")


def cpu_flags() -> frozenset[str]:
    """Instruction sets as the operating system names them (`avx512_vnni`, `asimddp`, `i8mm`, ...); empty when it does not say."""
    if _CPUINFO.exists():
        return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())
    flags = _sysctl("-a") if platform.system() == "Darwin" else ""
    on = (line for line in flags.splitlines() if line.startswith("hw.optional.arm.FEAT_") and line.endswith(": 1"))
    return frozenset(line.removeprefix("hw.optional.arm.FEAT_").removesuffix(": 1").lower() for line in on)


def cpu_name() -> str:
    """The processor's name, for example `AMD EPYC 9354`; the architecture when the system does not name it."""
    named = _cpuinfo("model name") if _CPUINFO.exists() else ""
    if platform.system() == "Darwin":
        named = _sysctl("-n", "machdep.cpu.brand_string")
    return named or platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int | None:
    """The largest resident memory that this process has had (VmHWM, mapped file pages included); None where the system does not say."""
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    found = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _cpuinfo(key: str) -> str:
    """The first value of a key in Linux's /proc/cpuinfo; empty when there is none."""
    for line in _CPUINFO.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _sysctl(*arguments: str) -> str:
    """What macOS's sysctl prints; empty when it fails."""
    done = subprocess.run(["sysctl", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
