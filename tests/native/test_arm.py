"""The kernels for Arm: compiled with a cross compiler, run on emulated CPUs against the portable kernels (kernel_tests.cpp).

The whole extension, engine and bindings included, is compiled and linked as well; without an interpreter for Arm nothing imports it.
What the emulated CPU says of itself decides which kernels run, so the choice at run time is seen to work, too. How fast they are cannot be
seen here.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
TOOLCHAIN = Path(__file__).parent / "aarch64.cmake"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in ("cmake", COMPILER, EMULATOR) if shutil.which(tool) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian: g++-aarch64-linux-gnu, qemu-user)")

# What the emulator calls a CPU, and the sets of instructions for integer products that it has: SMMLA, SDOT, neither.
CPUS = {"max": ["neon-i8mm", "neon-dotprod", "neon"], "neoverse-n1": ["neon-dotprod", "neon"], "cortex-a57": ["neon"]}


@pytest.fixture(scope="module")
def program() -> Path:
    return _build("kernel-tests-aarch64", "-DFEWBIT_KERNEL_TESTS=ON", "-DCMAKE_EXE_LINKER_FLAGS=-static") / "kernel_tests"


def _build(name: str, *options: str) -> Path:
    """Built once and kept; only changed sources are compiled again."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}", *options]
        for command in (configure, ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "warning" not in done.stderr, done.stderr
    return folder


@pytest.mark.parametrize("cpu", CPUS)
def test_every_instruction_set_gives_what_the_portable_kernels_give(program, cpu):
    done = subprocess.run([EMULATOR, "-cpu", cpu, str(program)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {family: sets.split() for family, sets in (line.split(": ")[:2] for line in done.stdout.splitlines() if ": " in line)}
    assert found["int8-activations"] == [*CPUS[cpu], "portable"]
    assert found["exact"] == [name for name in CPUS[cpu] if name != "neon-i8mm"] + ["portable"]
    assert found["rows"] == found["tables"] == found["dense"] == ["neon", "portable"]


@pytest.mark.heavy
def test_the_whole_extension_compiles_and_links():
    cmake = subprocess.run([sys.executable, "-m", "nanobind", "--cmake_dir"], capture_output=True, text=True, check=True).stdout.strip()
    include = f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}"
    folder = _build(
        "extension-aarch64", f"-Dnanobind_DIR={cmake}", f"-DPython_EXECUTABLE={sys.executable}", include, "-DCMAKE_BUILD_TYPE=None"
    )
    library = next(file for file in folder.glob("_native*.so"))

    def tool(name: str, *arguments: str) -> str:
        return subprocess.run([f"aarch64-linux-gnu-{name}", *arguments, str(library)], capture_output=True, text=True, check=True).stdout

    assert "AArch64" in tool("readelf", "--file-header")
    assert " T PyInit__native" in tool("nm", "--dynamic", "--defined-only")
    # What it leaves to others is Python's and the libraries'. A kernel that only other CPUs have would be here by its name.
    undefined = tool("nm", "--dynamic", "--undefined-only", "--demangle").splitlines()
    assert not [line for line in undefined if "fewbit" in line]
