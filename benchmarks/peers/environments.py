"""Make the virtual environments of the peers: `benchmarks/.peers/NAME`, one each, because their requirements contradict each other.

    python benchmarks/peers/environments.py                  # all
    python benchmarks/peers/environments.py autoround hqq
    python benchmarks/peers/environments.py bitsandbytes llamacpp onnxruntime openvino      # those of cpu_kernels.py and decode.py

torch comes first where the peer needs it, of the version that fewbit is developed with, from wherever pip finds it (`--torch-index` names
an index, such as that of the CPU builds). Then come the versions pinned in NAME.txt beside this file, all of them named there and installed
without looking at their requirements: nothing can replace torch or pull in a build for CUDA. Packages that come as sources are built with
the environment's own setuptools; HQQ's build would compile CUDA kernels and is told not to.

llama.cpp is no package: it is built from the source that llama-cpp-python carries, for this machine's instruction sets (cmake and a C++
compiler), into libraries and llama-quantize, llama-bench, llama-batched-bench. torch itself is measured in fewbit's environment.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

__all__ = ["KERNEL_PEERS", "LLAMACPP", "PEERS", "TORCH", "interpreter", "llamacpp", "lock_file"]

TORCH = "torch==2.13.0"
LLAMACPP = "llama_cpp_python-0.3.36"
PEERS = ("llmcompressor", "gptqmodel", "autoround", "hqq")  # of quality_vs_peers.py
KERNEL_PEERS = ("bitsandbytes", "llamacpp", "onnxruntime", "openvino")
_OTHERS = ("modelopt",)  # writes checkpoints that tests/runtimes reads
_ALL = (*PEERS, *KERNEL_PEERS, *_OTHERS)
_HERE = Path(__file__).parent
_ROOT = _HERE.parent / ".peers"
_STAMP = ".installed"
_BUILD = {"setuptools", "wheel"}
_WITHOUT_TORCH = {"onnxruntime", "openvino"}
_MODULES = {"autoround": "auto_round", "openvino": "openvino_genai"}
_TOOLS = ("llama-quantize", "llama-bench", "llama-batched-bench")


def lock_file(peer: str) -> Path:
    """The pinned versions of a peer's environment."""
    return _HERE / f"{peer}.txt"


def _python(peer: str) -> Path:
    return _ROOT / peer / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _digest(peer: str) -> str:
    return hashlib.sha256((TORCH + sys.version + lock_file(peer).read_text(encoding="utf-8")).encode()).hexdigest()


def interpreter(peer: str, *, torch_index: str | None = None) -> Path:
    """The interpreter of a peer's environment, which is made first when it is missing or of other versions.

    Raises:
        ValueError: no such peer.
        subprocess.CalledProcessError: pip failed; its own words are on stderr.
    """
    known = [name for name in _ALL if name != "llamacpp"]
    if peer not in known:
        raise ValueError(f"unknown peer '{peer}', choose one of {', '.join(known)}")
    stamp = _ROOT / peer / _STAMP
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != _digest(peer):
        _install(peer, torch_index)
        stamp.write_text(_digest(peer), encoding="utf-8")
    return _python(peer)


def _install(peer: str, torch_index: str | None) -> None:
    print(f"installing {peer} into {_ROOT / peer}", file=sys.stderr, flush=True)
    venv.EnvBuilder(with_pip=True, clear=True).create(_ROOT / peer)
    requirements = lock_file(peer).read_text(encoding="utf-8").splitlines()
    build = [line for line in requirements if line.split("==")[0] in _BUILD]
    if peer not in _WITHOUT_TORCH:
        _pip(peer, TORCH, *(["--index-url", torch_index] if torch_index else []))
    if build:
        _pip(peer, *build)
    _pip(peer, "--no-deps", "--no-build-isolation", "--requirement", str(lock_file(peer)))
    # Their own claims about torch may contradict ours; what counts is that the package can be imported.
    module = _MODULES.get(peer, peer)
    subprocess.run([_python(peer), "-c", f"import {module}"], check=True, stdout=subprocess.DEVNULL, env=_environment())


def llamacpp() -> Path:
    """The folder of llama.cpp: `build/bin` with its libraries and tools, beside the sources of llama-cpp-python. Built when it is missing.

    Raises:
        subprocess.CalledProcessError: pip, cmake or the compiler failed.
        OSError: there is no cmake.
    """
    folder = _ROOT / "llamacpp"
    version = folder / "version.txt"
    if version.is_file() and version.read_text(encoding="utf-8").strip() == LLAMACPP.rpartition("-")[2]:
        return folder
    print(f"building llama.cpp in {folder}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "build", ignore_errors=True)
    requirement = LLAMACPP.replace("_", "-").replace("-0", "==0", 1)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    subprocess.run([*download, "--dest", str(folder), requirement], check=True)
    with tarfile.open(folder / f"{LLAMACPP}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "BUILD_SHARED_LIBS": "ON",
        "GGML_NATIVE": "ON",
        "LLAMA_CURL": "OFF",
        "LLAMA_OPENSSL": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_SERVER": "OFF",
        "LLAMA_BUILD_TOOLS": "ON",
        "LLAMA_BUILD_COMMON": "ON",
    }
    source, build = folder / LLAMACPP / "vendor" / "llama.cpp", folder / "build"
    defined = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", str(source), "-B", str(build), *defined], check=True, stdout=sys.stderr)
    targets = ("ggml", "llama", *_TOOLS)
    subprocess.run(
        ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1), "--target", *targets], check=True, stdout=sys.stderr
    )
    version.write_text(LLAMACPP.rpartition("-")[2] + "\n", encoding="utf-8")
    return folder


def _pip(peer: str, *arguments: str) -> None:
    command = [str(_python(peer)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env=_environment())


def _environment() -> dict[str, str]:
    return {**os.environ, "DISABLE_CUDA": "1"}  # HQQ's setup.py reads it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"{', '.join(_ALL)}; all when left out")
    parser.add_argument("--torch-index", metavar="URL", help="the index that torch is taken from")
    arguments = parser.parse_args()
    for peer in arguments.peers or _ALL:
        print(llamacpp() if peer == "llamacpp" else interpreter(peer, torch_index=arguments.torch_index))


if __name__ == "__main__":
    main()
