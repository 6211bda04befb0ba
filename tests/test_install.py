"""An installation without a C++ compiler: a wheel in pure Python, which runs everything, names what it lacks and lets `--strict` refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# In one process: each of them would load torch. A line per command: its exit code, then what it said.
COMMANDS = """
import contextlib, io, json, sys
from fewbit.cli import main

for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code or 0, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has this one's packages, and of fewbit only the wheel."""
    folder = tmp_path_factory.mktemp("install")
    environment = {**os.environ, "CXX": str(folder / "no-such-compiler")}
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run([*build, "-C", f"build-dir={folder / 'build'}"], env=environment, capture_output=True, text=True, check=False)
    if "No module named" in done.stderr:
        pytest.skip(f"the build tools are not installed here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    venv.EnvBuilder(with_pip=False).create(folder / "venv")
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "packages_of_the_tests.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def said(python: Path) -> dict[str, tuple[int, str]]:
    """Exit code and output of commands, by the words that tell them apart."""
    generate = ["generate", "--max-new-tokens", "2", "--prompt", "def f("]
    commands = {
        "version": ["--version"],
        "kernels": ["kernels"],
        "int8-activations": [*generate, "--scheme", "W4A16", "--compute", "int8-activations"],
        "slow": [*generate, "--scheme", "W3A16"],
        "strict": [*generate, "--scheme", "W3A16", "--strict"],
        "engine": [*generate, "--scheme", "W4A16", "--runtime", "engine"],
    }
    environment = {**os.environ, "COLUMNS": "400"}
    environment.pop("PYTHONPATH", None)
    arguments = [str(python), "-c", COMMANDS, json.dumps(list(commands.values()))]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, cwd=python.parent)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (code, text) for name, (code, text) in zip(commands, answers, strict=True)}


def test_what_is_missing_is_said_with_what_to_do(said):
    code, text = said["version"]
    assert code == 0 and "native extension: missing" in text and "compiler" in text
    code, text = said["kernels"]
    assert code == 0
    line = next(line for line in text.splitlines() if line.startswith("missing: "))
    for name in ("cpu-int4", "cpu-int8", "cpu-int3-exact", "cpu-nf4", "cpu-w8a8"):
        assert name in line
    assert "C++ compiler" in line and "pip install" in text


def test_everything_still_runs(said):
    for name in ("int8-activations", "slow"):
        code, text = said[name]
        assert code == 0, text
    assert "cpu-int3-exact" in said["slow"][1] and "native code" in said["slow"][1]


def test_strict_refuses_the_slow_path(said):
    code, text = said["strict"]
    assert code == 2 and "cpu-int3-exact" in text and "native code" in text and "Traceback" not in text


def test_the_engine_is_refused_by_name(said):
    code, text = said["engine"]
    assert code == 2 and "native code" in text and "Traceback" not in text
