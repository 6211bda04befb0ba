"""The memory bars of `fewbit quantize`: a model is larger than what is needed to quantize it.

    python benchmarks/quantize_memory.py --folder /where/20/GB/are/free        # about half an hour on two cores
    python benchmarks/quantize_memory.py --list

A checkpoint in the shapes of Llama-2-7B with random weights is written in real shards. RTN of all of it must stay below 2.5 GiB; GPTQ of a
slice of four blocks within

    the process itself + one block in working precision + 3 K^2 * 4 bytes for the widest input K + the budget for hidden states

The process itself is the same command on a tiny model of the same family: interpreter, libraries, calibration text. Peaks are VmHWM of a
process of its own, mapped file pages included. Time per GB of the source is printed with them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from _bars import Bar, NotMeasuredError, add_arguments, run_bars
from faults import write_tokenizer

SHAPES = "llama-2-7b"
GIB = 2**30
BUDGET_BYTES = 128 * 2**20
SHARD_BYTES = 2 * 10**9
SAMPLES, TOKENS, BLOCKS = 8, 512, 4


def write_checkpoint(directory: Path, num_layers: int | None, **changes: Any) -> Path:
    """Random weights in real shapes as a Hugging Face directory with shards.

    Args:
        num_layers: all when None.
        changes: of the configuration.
    """
    from fewbit.checkpoints.shards import write_tensors
    from fewbit.checkpoints.sources import RandomSource
    from fewbit.models.shapes import shapes_config

    directory.mkdir(parents=True)
    config = shapes_config(SHAPES)
    for name, value in changes.items():
        setattr(config, name, value)
    source = RandomSource(config, seed=0, num_layers=num_layers)
    shards: list[list[str]] = [[]]
    filled = 0
    sizes = {name: source.get(name).nbytes for name in source.names()}
    for name in source.names():
        if shards[-1] and filled + sizes[name] > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / file, {name: source.get(name) for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    source.config.architectures = ["LlamaForCausalLM"]
    source.config.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def quantize(model: Path, out: Path, *options: str) -> dict[str, Any]:
    """`fewbit quantize` in a process of its own; its result.

    Raises:
        NotMeasuredError: it failed; its last line is the reason.
    """
    command = [sys.executable, "-c", "from fewbit.cli import main; main()", "quantize", str(model), "--scheme", "W4A16"]
    process = subprocess.run([*command, "--out", str(out), "--json", *options], capture_output=True, text=True, check=False)
    shutil.rmtree(out, ignore_errors=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotMeasuredError(f"fewbit quantize ended with exit code {process.returncode}: {last}")
    result: dict[str, Any] = json.loads(process.stdout)
    return result


class Memory:
    """The measurements, each made once.

    Args:
        folder: where checkpoints are put; needs 20 GB.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cache  # noqa: B019  one object lives as long as the program
    def rtn(self) -> dict[str, Any]:
        """RTN of the whole model."""
        model = write_checkpoint(self._folder / "whole", None)
        try:
            return quantize(model, self._folder / "rtn", "--no-gate")
        finally:
            shutil.rmtree(model)

    @cache  # noqa: B019
    def gptq(self) -> tuple[dict[str, Any], int]:
        """GPTQ of the slice, and the bytes that it may take."""
        from fewbit.models.shapes import shapes_config

        options = ["--method", "gptq", "--samples", str(SAMPLES), "--sequence-length", str(TOKENS), "--no-gate"]
        options += ["--precision", "float32", "--memory", str(BUDGET_BYTES)]
        tiny = write_checkpoint(
            self._folder / "tiny", 2, hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4, vocab_size=512
        )
        baseline = quantize(tiny, self._folder / "tiny-out", *options)["peak_rss_bytes"]
        slice_of = write_checkpoint(self._folder / "slice", BLOCKS)
        try:
            result = quantize(slice_of, self._folder / "gptq", *options)
        finally:
            shutil.rmtree(slice_of)
        config = shapes_config(SHAPES)
        hidden, inner = config.hidden_size, config.intermediate_size
        block = 4 * (4 * hidden * hidden + 3 * hidden * inner + 2 * hidden)
        moments = 3 * max(hidden, inner) ** 2 * 4
        print(
            f"GPTQ slice: process {baseline / GIB:.2f} GiB, block {block / GIB:.2f}, moments {moments / GIB:.2f}, "
            f"hidden states {BUDGET_BYTES / GIB:.2f}; peak {result['peak_rss_bytes'] / GIB:.2f}",
            file=sys.stderr,
        )
        return result, baseline + block + moments + BUDGET_BYTES

    def rtn_peak(self) -> float:
        result = self.rtn()
        per_gb = result["duration_s"] / (result["source_bytes"] / 1e9)
        print(f"RTN: {result['source_bytes'] / 1e9:.1f} GB in {result['duration_s']:.0f} s, {per_gb:.1f} s per GB", file=sys.stderr)
        return float(result["peak_rss_bytes"] / GIB)

    def gptq_peak(self) -> float:
        result, allowed = self.gptq()
        seconds = sum(block["duration_s"] for block in result["blocks"])
        print(f"GPTQ: {seconds / BLOCKS:.0f} s per block, {seconds / (result['source_bytes'] / 1e9):.0f} s per GB", file=sys.stderr)
        return float(result["peak_rss_bytes"] / allowed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are put, 20 GB; a temporary folder when left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        memory = Memory(Path(folder))
        bars = [
            Bar("rtn-7b-peak", memory.rtn_peak, "<", 2.5, "GiB, VmHWM, RTN W4A16 of a Llama-2-7B-shaped checkpoint"),
            Bar("gptq-slice-peak", memory.gptq_peak, "<=", 1.0, "of process + one block + 3 K^2 * 4 bytes + hidden states, VmHWM"),
        ]
        return run_bars(bars, list_only=arguments.list, json_file=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
