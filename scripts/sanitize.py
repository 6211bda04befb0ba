"""The native code under AddressSanitizer and UndefinedBehaviorSanitizer: `fewbit._native` is built with them, and its tests run on it.

    python scripts/sanitize.py                          # build in build/sanitize, then every test of the native code
    python scripts/sanitize.py --program                # only the C++ program that compares the kernels of all instruction sets
    python scripts/sanitize.py -- tests/kernels/cpu -k fuzz
    python scripts/sanitize.py --sanitizers thread      # data races of the thread pool, another build

A read past the end of a weight, an overflowing integer or a misaligned access ends the run with the line that did it. Tensors of torch are
watched as well, because their memory comes from the same `malloc`. The installed extension is not touched: a pytest plugin (this
file, too) puts the watched one in its place.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/kernels/cpu", "tests/runtime/test_engine.py", "tests/formats/test_scale_search.py", "tests/methods/test_permute.py")
_EXTENSION = "FEWBIT_WATCHED_EXTENSION"
_LIBRARIES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python and torch leave memory to the system at their end
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "report_signal_unsafe=0:ignore_noninstrumented_modules=1",
}


def run_program(sanitizers: str) -> int:
    """Build and run `kernel_tests` (tests/native); its exit code."""
    folder = ROOT / "build" / f"sanitize-program-{sanitizers.replace(',', '-')}"
    _build(folder, sanitizers, "-DFEWBIT_KERNEL_TESTS=ON")
    return subprocess.run([folder / "kernel_tests"], env={**_OPTIONS, **os.environ}, check=False).returncode


def build(sanitizers: str) -> Path:
    """Build the extension with sanitizers; its file."""
    folder = ROOT / "build" / f"sanitize-{sanitizers.replace(',', '-')}"
    nanobind = subprocess.run([sys.executable, "-m", "nanobind", "--cmake_dir"], capture_output=True, text=True, check=True).stdout.strip()
    _build(folder, sanitizers, f"-Dnanobind_DIR={nanobind}", f"-DPython_EXECUTABLE={sys.executable}")
    return next(file for file in folder.glob("_native*") if file.suffix == ".so")


def _build(folder: Path, sanitizers: str, *options: str) -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *options, "-DCMAKE_BUILD_TYPE=None", f"-DFEWBIT_SANITIZE={sanitizers}"]
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], check=True)


def _library(name: str) -> str:
    """The compiler's run-time library, which has to be loaded before anything else."""
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def pytest_configure() -> None:
    """As a plugin (`-p sanitize`): the watched extension is `fewbit._native` before anybody imports it."""
    file = os.environ[_EXTENSION]
    loader = importlib.machinery.ExtensionFileLoader("fewbit._native", file)
    spec = importlib.util.spec_from_file_location("fewbit._native", file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["fewbit._native"] = module
    import fewbit

    fewbit._native = module  # type: ignore[attr-defined]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitizers", default="address,undefined", help="as the compiler's -fsanitize takes them")
    parser.add_argument("--program", action="store_true", help="only the C++ program of tests/native, no Python")
    parser.add_argument("tests", nargs="*", help="of pytest; those of the native code when left out")
    arguments = parser.parse_args()
    failed = 0 if arguments.tests else run_program(arguments.sanitizers)
    if failed or arguments.program:
        return failed
    extension = build(arguments.sanitizers)
    environment = {**_OPTIONS, **os.environ, _EXTENSION: str(extension), "OMP_NUM_THREADS": "1"}
    libraries = [_library(_LIBRARIES[name]) for name in arguments.sanitizers.split(",") if name in _LIBRARIES]
    environment["LD_PRELOAD"] = " ".join([*libraries, _library("libstdc++.so")])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "sanitize"]
    return subprocess.run([*command, *(arguments.tests or TESTS)], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
