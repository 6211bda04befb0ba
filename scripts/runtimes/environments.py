"""Make the environments of the runtimes that `fewbit verify` asks: FEWBIT_ENVS/NAME, one each.

    python scripts/runtimes/environments.py                    # all of them; `make runtimes` is this
    python scripts/runtimes/environments.py transformers vllm

torch comes first, of the version that fewbit is developed with, from wherever pip finds it (`--torch-index` names an index, such as that of
the CPU builds). Then come the versions pinned in NAME.txt beside this file; where it names every package, without looking at their
requirements, so that nothing can replace torch or pull in a build for CUDA. llama.cpp is built from its sources, which takes minutes and
needs a C++ compiler. The environments hold nothing of a clone of fewbit: clones share them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TORCH = "torch==2.13.0"
STAMP = ".installed"
# What must import before an environment counts as made.
MODULES = {
    "transformers": "transformers, gptqmodel, bitsandbytes, torchao, gguf, compressed_tensors",
    "llamacpp": "llama_cpp",
    "vllm": "vllm",
    "openvino": "openvino_genai",
    "lmeval": "lm_eval",
}
WITHOUT_TORCH = {"llamacpp", "openvino", "lmeval"}
COMPLETE = {"transformers", "vllm"}  # their files name every package; the requirements contradict each other


def directory() -> Path:
    """FEWBIT_ENVS, or the user's cache, as fewbit itself looks for them."""
    given = os.environ.get("FEWBIT_ENVS")
    return Path(given) if given else Path.home() / ".cache" / "fewbit" / "envs"


def python_of(name: str) -> Path:
    """The interpreter of an environment."""
    return directory() / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def digest(name: str) -> str:
    """What an environment was made from."""
    return hashlib.sha256((TORCH + sys.version + (HERE / f"{name}.txt").read_text(encoding="utf-8")).encode()).hexdigest()


def imports(name: str) -> bool:
    """Whether the environment is there and its packages import."""
    python = python_of(name)
    return python.is_file() and subprocess.run([python, "-c", f"import {MODULES[name]}"], capture_output=True).returncode == 0


def make(name: str, torch_index: str | None) -> Path:
    """Make an environment unless it is there already.

    Raises:
        subprocess.CalledProcessError: pip failed, in its own words on stderr.
    """
    stamp = directory() / name / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest(name) and imports(name):
        return python_of(name)
    print(f"installing {name} into {directory() / name}", file=sys.stderr, flush=True)
    venv.EnvBuilder(with_pip=True, clear=True).create(directory() / name)
    constraints = directory() / name / "constraints.txt"
    constraints.write_text(f"{TORCH}\n", encoding="utf-8")
    if name not in WITHOUT_TORCH:
        pip(name, TORCH, *(["--index-url", torch_index] if torch_index else []))
    if name in COMPLETE:
        pip(name, "setuptools", "wheel")
        pip(name, "--no-deps", "--no-build-isolation", "--requirement", str(HERE / f"{name}.txt"))
    else:
        pip(name, "--constraint", str(constraints), "--requirement", str(HERE / f"{name}.txt"))
    subprocess.run([python_of(name), "-c", f"import {MODULES[name]}"], check=True, stdout=subprocess.DEVNULL)
    stamp.write_text(digest(name), encoding="utf-8")
    return python_of(name)


def pip(name: str, *arguments: str) -> None:
    """Install into an environment."""
    command = [python_of(name), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "DISABLE_CUDA": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MODULES)}; all when left out")
    parser.add_argument("--torch-index", metavar="URL", help="the index that torch is taken from")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(MODULES))
    if unknown:
        parser.error(f"unknown environment {', '.join(unknown)}, choose from {', '.join(MODULES)}")
    for name in arguments.names or MODULES:
        print(make(name, arguments.torch_index))


if __name__ == "__main__":
    main()
