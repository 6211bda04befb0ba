"""The reverse: checkpoints that other tools made are read by fewbit, and dequantize to the very numbers that the tools' own code gives.

    make test-runtimes                                      # the tools that are installed
    FEWBIT_MADE=DIR FEWBIT_HEAVY=1 pytest tests/runtimes/test_reverse.py     # keeps what they make in DIR, and takes what is there

`_tools.py` runs under each tool's Python, `_llamacpp.py` under llama.cpp's. Where a tool dequantizes into 16 bits, ours are rounded once to
the same dtype: the product of a code and a stored scale is exact in float32, so nothing else may differ.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fewbit
from fewbit.checkpoints.gguf_source import GgufSource
from fewbit.checkpoints.runtimes import get_runtime, kind_of
from fewbit.checkpoints.sources import TensorSource, open_source
from fewbit.models.reference import reference_model_dir
from fewbit.workflows.convert import convert_checkpoint
from fewbit.workflows.foreign.environments import environments_directory, interpreter
from fewbit.workflows.inspect import inspect_checkpoint

pytestmark = pytest.mark.heavy

TOOLS = Path(__file__).with_name("_tools.py")
LLAMA_CPP = Path(__file__).with_name("_llamacpp.py")
PEERS = Path(__file__).parents[2] / "benchmarks" / ".peers"
CASES = [
    line.strip().split('"')[1] for line in TOOLS.read_text(encoding="utf-8").partition("CASES:")[2].splitlines() if line.startswith('    "')
]


# llama.cpp's own types that need no measured importances
LLAMA_TYPES = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "iq3_s", "iq4_nl", "iq4_xs", "tq2_0",
)  # fmt: skip


def python_of(case: str) -> Path | None:
    """The interpreter that has the tool of a case; None when it is not installed."""
    tool = case.partition("-")[0]
    name = "transformers" if tool in ("bnb", "torchao", "gptqmodel") else tool
    places = (environments_directory() / name, PEERS / name)
    return next((place / "bin" / "python" for place in places if (place / "bin" / "python").is_file()), None)


def run(*command: object) -> None:
    """A tool, in its own environment; what it leaves in its working directory lies beside what it was asked to write."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        cwd=Path(str(command[-1])).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def is_read(path: Path) -> None:
    """By `fewbit.load` and `fewbit inspect`, without a complaint."""
    with torch.inference_mode():
        logits = fewbit.load(path).model(torch.arange(32)[None]).logits
    assert bool(logits.isfinite().all())
    assert not inspect_checkpoint(path).problems


def in_bitsandbytes_order(source: TensorSource, name: str, directory: Path) -> torch.Tensor:
    """A weight of LLM.int8 from our codes, in the library's order of operations: (code x SCB) x 1/127, where we have code x (SCB / 127)."""
    prefix = name.removesuffix(".weight")
    q, largest = source.get_quantized(prefix), load_file(directory / "model.safetensors")[f"{prefix}.SCB"].unsqueeze(1)
    assert q is not None
    assert torch.equal(q.scale, largest / 127)
    assert torch.equal(source.get(name), q.values * q.scale)
    return q.values * largest * 7.874015718698502e-3  # the constant in bitsandbytes.functional.int8_vectorwise_dequant


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("FEWBIT_MADE")
    return Path(kept).absolute() if kept else tmp_path_factory.mktemp("made")


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_checkpoint_is_read_bit_for_bit(case: str, folder: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    python, out = python_of(case), folder / case
    if not out.with_name(f"{case}.safetensors").is_file():
        if python is None:
            pytest.skip("the tool is not installed: make runtimes, or benchmarks/peers/environments.py")
        run(python, TOOLS, case, tiny_llama_dir, out)
    theirs = load_file(out.with_name(f"{case}.safetensors"))
    directory = next((path.parent for path in sorted(out.rglob("config.json"))), out)
    source = open_source(directory)
    assert kind_of(directory).title
    assert len(source.quantized_linears) == len(theirs) == 14
    for name, weight in theirs.items():
        ours = in_bitsandbytes_order(source, name, directory) if case == "bnb-int8" else source.get(name).to(weight.dtype)
        assert torch.equal(ours, weight.cpu()), name
    is_read(directory)
    convert_checkpoint(directory, layout="dense-float32", out=tmp_path / "dense")
    dense = open_source(tmp_path / "dense")
    assert all(torch.equal(dense.get(name), source.get(name)) for name in theirs)


@pytest.fixture(scope="session")
def dense_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, whose matrices have whole super-blocks of 256."""
    path = tmp_path_factory.mktemp("dense") / "model.gguf"
    convert_checkpoint(reference_model_dir(), layout="gguf-dense", out=path)
    return path


@pytest.mark.parametrize("kind", LLAMA_TYPES)
def test_a_file_of_llama_cpps_quantizer_is_read_bit_for_bit(kind: str, folder: Path, dense_gguf: Path, tmp_path: Path) -> None:
    python = interpreter(get_runtime("llama.cpp"))
    out = folder / f"llamacpp-{kind}.gguf"
    if not out.with_suffix(".npz").is_file():
        if python is None:
            pytest.skip("llama.cpp is not installed: make runtimes")
        run(python, LLAMA_CPP, kind, dense_gguf, out)
    source, compared = open_source(out), 0
    assert isinstance(source, GgufSource)
    with np.load(out.with_suffix(".npz")) as theirs:
        for name in source.linears:
            weight = source.get(f"{name}.weight")
            # the rows of q and k are in llama.cpp's order in the file: put ours there
            order = source.order(f"{name}.weight")
            ours = (weight if order is None else weight[order]).flatten()
            assert torch.equal(ours, torch.from_numpy(theirs[source.disk_name(f"{name}.weight")])), name
            compared += 1
    assert compared == 42
    is_read(out)
    convert_checkpoint(out, layout="dense-float32", out=tmp_path / "dense")
    dense = open_source(tmp_path / "dense")
    assert all(torch.equal(dense.get(f"{name}.weight"), source.get(f"{name}.weight")) for name in source.linears)
