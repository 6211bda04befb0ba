"""Write the versions installed in this environment to requirements-lock.txt.

    make lock

The file is a pip constraints file: it says which version of a package to take if something asks for it, and installs nothing itself.
Local version labels (`2.13.0+cpu`) are left out, so that the CPU and the CUDA build of torch both satisfy it, and so are torch's CUDA
libraries, which torch pins itself.
"""

from __future__ import annotations

import argparse
import platform
import re
from importlib.metadata import distributions
from pathlib import Path

NOT_LOCKED = re.compile(r"fewbit|pip|setuptools|wheel|nvidia-.*|cuda-.*|triton")
LOCK = Path(__file__).parents[1] / "requirements-lock.txt"


def locked_versions() -> list[str]:
    """`name==version` of every installed distribution, sorted."""
    pins = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if not NOT_LOCKED.fullmatch(name):
            pins[name] = f"{name}=={distribution.version.split('+')[0]}"
    return [pins[name] for name in sorted(pins)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=LOCK)
    arguments = parser.parse_args()
    header = [
        f"# Written by `make lock` with Python {platform.python_version()} on {platform.system()} {platform.machine()}.",
        "# A pip constraints file: `make setup` applies it, so that the figures in BENCHMARKS.md can be reproduced.",
        "# `make setup LOCK=` takes the newest versions instead.",
    ]
    arguments.out.write_text("\n".join([*header, *locked_versions()]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
