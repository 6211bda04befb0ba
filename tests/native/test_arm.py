"""The kernels for Arm: compiled with a cross compiler, run on emulated CPUs against the portable kernels (kernel_tests.cpp).

What the emulated CPU says of itself decides which kernels run, so the choice at run time is seen to work, too. How fast they are cannot be
seen here.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "kernel-tests-aarch64"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in ("cmake", COMPILER, EMULATOR) if shutil.which(tool) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian: g++-aarch64-linux-gnu, qemu-user)")

# What the emulator calls a CPU, and the sets of instructions for integer products that it has: SMMLA, SDOT, neither.
CPUS = {"max": ["neon-i8mm", "neon-dotprod", "neon"], "neoverse-n1": ["neon-dotprod", "neon"], "cortex-a57": ["neon"]}


@pytest.fixture(scope="module")
def program() -> Path:
    """Built once and kept; only changed sources are compiled again."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    options = {
        "FEWBIT_KERNEL_TESTS": "ON",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_EXE_LINKER_FLAGS": "-static",
    }
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-S", str(ROOT), "-B", str(FOLDER), *(f"-D{name}={value}" for name, value in options.items())]
        for command in (configure, ["cmake", "--build", str(FOLDER), "--parallel", str(os.cpu_count() or 1)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "warning" not in done.stderr, done.stderr
    return FOLDER / "kernel_tests"


@pytest.mark.parametrize("cpu", CPUS)
def test_every_instruction_set_gives_what_the_portable_kernels_give(program, cpu):
    done = subprocess.run([EMULATOR, "-cpu", cpu, str(program)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {family: sets.split() for family, sets in (line.split(": ")[:2] for line in done.stdout.splitlines() if ": " in line)}
    assert found["int8-activations"] == [*CPUS[cpu], "portable"]
    assert found["exact"] == [name for name in CPUS[cpu] if name != "neon-i8mm"] + ["portable"]
    assert found["rows"] == found["tables"] == found["dense"] == ["neon", "portable"]
