"""fewbit's Triton kernels compiled for GPUs that are not here: do registers spill, how many instructions does a weight take?

    python benchmarks/gpu_machine_code.py                  # capability 9.0
    python benchmarks/gpu_machine_code.py --capability 80
    python benchmarks/gpu_machine_code.py --every          # each kernel with each set of constants that gpu.py launches: minutes

Triton brings NVIDIA's assembler and disassembler, so machine code can be had without a GPU. An H100 issues about 4 instructions per 4-bit
weight in the time in which its memory delivers one (132 multiprocessors x 128 lanes x 1.7 GHz over 6.7e12 weights/s), an H200 about 3: a
kernel with more in its inner loop cannot reach the bandwidth, whatever a tuner does. Fewer is necessary, not sufficient. What Triton makes
of the same kernel depends on its version: count with the one that will run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from _bars import Bar, run_bars
from _gpu_compile import Launch, compile_launch, only_compile
from _gpu_launches import Job, attention_job, engine_job, jobs, product_job

from fewbit.formats.spec import get_scheme
from fewbit.kernels.triton.linear import TritonUnfused, TritonWeightOnly
from fewbit.kernels.triton.w8a8 import TritonW8A8
from fewbit.models.shapes import shapes_config

_ALONE = ("W4A16", "W4A16-ASYM", "W8A16", "FP8A16", "NF4", "MXFP4", "NVFP4", "W3A16", "W2A16")
_SHAPE = (8192, 28672)
_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory that a program may have


def main_jobs(fp8: bool) -> Iterator[Job]:
    """What a decode step launches, a large product of each format, and attention over each cache."""
    for name in _ALONE:
        yield f"{name} M=1", lambda n=name: product_job(get_scheme(n), TritonWeightOnly(), *_SHAPE, 1)
    for m in (16, 64, 1024):
        yield f"W4A16 M={m}", lambda m=m: product_job(get_scheme("W4A16"), TritonWeightOnly(), *_SHAPE, m)
    for name in ("W8A8", "FP8", "FP8-BLOCK") if fp8 else ("W8A8",):
        for m in (1, 1024):
            yield f"{name} M={m}", lambda n=name, m=m: product_job(get_scheme(n), TritonW8A8(), *_SHAPE, m)
    yield "NF4 unfused", lambda: product_job(get_scheme("NF4"), TritonUnfused(), *_SHAPE, 1)
    for kind in ("none", "int8", "fp8", "int4") if fp8 else ("none", "int8", "int4"):
        yield f"attention {kind}", lambda k=kind: attention_job(k, 8, 32768)
    yield "step W4A16", lambda: engine_job(shapes_config("qwen2.5-3b"), get_scheme("W4A16"), fp8, [(1, 216)], (16,), None, None)
    yield "step W8A8", lambda: engine_job(shapes_config("qwen2.5-3b"), get_scheme("W8A8"), fp8, [(1, 216)], (), None, None)


def machine_code(launch: Launch) -> tuple[list[str], int]:
    """Disassembled lines and bytes of shared memory."""
    compiled = compile_launch(launch)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
    return text.splitlines(), compiled.metadata.shared


def instructions(lines: list[str]) -> Counter[str]:
    """Instructions by name."""
    found = (re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\S+\s+)?([A-Z0-9]+)", line) for line in lines)
    return Counter(match.group(1) for match in found if match)


def longest_loop(lines: list[str]) -> list[str]:
    """The lines of the longest loop: from a label to the branch back to it."""
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L")}
    spans = [(0, 0)]
    for i, line in enumerate(lines):
        match = re.search(r"BRA[^;`]*`\((\.L\S+)\)", line)
        if match and labels.get(match.group(1), i) < i:
            spans.append((labels[match.group(1)], i))
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return lines[first : last + 1]


def per_number(launch: Launch, lines: list[str]) -> float | None:
    """Instructions in the loop for each stored number that the loop reads: a weight, or a channel of a key or value."""
    threads, options = 32 * launch.options["num_warps"], launch.options
    if launch.function.fn.__name__ == "_multiply":
        numbers = options["BLOCK_N"] * options["LANES"] * 16
    elif launch.function.fn.__name__ == "_attend":
        numbers = 2 * options["BLOCK_T"] * options["DIM"]
    else:
        return None
    return instructions(longest_loop(lines)).total() * threads / numbers


def main() -> int:
    """Compile, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, choices=sorted(_SHARED), help="without the dot")
    parser.add_argument("--only", default="", help="jobs whose names begin so")
    parser.add_argument("--every", action="store_true", help="every launch of gpu.py, one line for each that spills or is too large")
    parser.add_argument("--loop", action="store_true", help="print the longest loop of each kernel, too")
    parser.add_argument("--list", action="store_true", help="name the bars, compile nothing")
    options = parser.parse_args()
    spills, largest, failed, counted = 0, 0, 0, {}
    fp8 = options.capability >= 89
    if not options.list:
        sections = ("tune", "kernels", "end-to-end", "cache", "correctness")
        made = jobs(sections, ("qwen2.5-3b", "llama-3-8b"), fp8) if options.every else main_jobs(fp8)
        launches, errors = only_compile(options.capability, (job for job in made if job[0].startswith(options.only)))
        for name, reason in errors.items():
            print(f"{name}: {reason}")
        failed = len(errors)
        for launch in launches:
            try:
                lines, shared = machine_code(launch)
            except Exception as error:  # counted by a bar
                failed += 1
                print(f"{_title(launch)}: {type(error).__name__}: {error}", flush=True)
                continue
            counts, each = instructions(lines), per_number(launch, lines)
            spilled = counts["LDL"] + counts["STL"]
            spills, largest = spills + spilled, max(largest, shared)
            if each is not None:
                counted.setdefault(f"{launch.name} {launch.function.fn.__name__}", each)
            if not options.every or spilled or shared > _SHARED[options.capability] << 10:
                loop = "" if each is None else f", {each:.2f} in the loop per number"
                print(f"{_title(launch)} {counts.total():>6} instructions, spills {spilled}, shared memory {shared}{loop}", flush=True)
            if options.loop:
                print("\n".join(longest_loop(lines)))
        if options.every:
            print(f"{len(launches)} kernels, Triton {triton.__version__}")
    bars = [
        Bar("compiled", lambda: failed, "==", 0, "kernels that do not compile"),
        Bar("spills", lambda: spills, "==", 0, "loads and stores of spilled registers"),
        Bar("shared-memory", lambda: largest, "<=", _SHARED[options.capability] << 10, "bytes a program may have"),
    ]
    if options.list or "W4A16 M=1 _multiply" in counted:
        bars.append(Bar("int4-instructions-per-weight", lambda: counted["W4A16 M=1 _multiply"], "<=", 3.0, "an H200 issues 3"))
    return run_bars(bars, list_only=options.list)


def _title(launch: Launch) -> str:
    constants: dict[str, Any] = {k: v for k, v in launch.options.items() if k.startswith(("BLOCK", "num_", "PARTS", "CODES"))}
    return f"{launch.name:<18} {launch.function.fn.__name__:<14} {' '.join(f'{k}={v}' for k, v in constants.items()):<70}"


if __name__ == "__main__":
    sys.exit(main())
