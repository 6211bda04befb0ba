"""Make the virtual environments of the peers: `benchmarks/.peers/NAME`, one each, because their requirements contradict each other.

    python benchmarks/peers/environments.py               # all
    python benchmarks/peers/environments.py autoround hqq

torch comes first, of the version that fewbit is developed with, from wherever pip finds it (`--torch-index` names an index, such as that
of the CPU builds). Then come the versions pinned in NAME.txt beside this file, all of them named there and installed without looking at
their requirements: nothing can replace torch or pull in a build for CUDA. Packages that come as sources are built with the environment's
own setuptools; HQQ's build would compile CUDA kernels and is told not to.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["PEERS", "TORCH", "interpreter", "lock_file"]

TORCH = "torch==2.13.0"
PEERS = ("llmcompressor", "gptqmodel", "autoround", "hqq", "modelopt")
_HERE = Path(__file__).parent
_ROOT = _HERE.parent / ".peers"
_STAMP = ".installed"
_BUILD = {"setuptools", "wheel"}


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
    if peer not in PEERS:
        raise ValueError(f"unknown peer '{peer}', choose one of {', '.join(PEERS)}")
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
    _pip(peer, TORCH, *(["--index-url", torch_index] if torch_index else []))
    _pip(peer, *build)
    _pip(peer, "--no-deps", "--no-build-isolation", "--requirement", str(lock_file(peer)))
    # Their own claims about torch may contradict ours; what counts is that the package can be imported.
    module = {"autoround": "auto_round"}.get(peer, peer)
    subprocess.run([_python(peer), "-c", f"import {module}"], check=True, stdout=subprocess.DEVNULL, env=_environment())


def _pip(peer: str, *arguments: str) -> None:
    command = [str(_python(peer)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env=_environment())


def _environment() -> dict[str, str]:
    return {**os.environ, "DISABLE_CUDA": "1"}  # HQQ's setup.py reads it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"{', '.join(PEERS)}; all when left out")
    parser.add_argument("--torch-index", metavar="URL", help="the index that torch is taken from")
    arguments = parser.parse_args()
    for peer in arguments.peers or PEERS:
        print(interpreter(peer, torch_index=arguments.torch_index))


if __name__ == "__main__":
    main()
