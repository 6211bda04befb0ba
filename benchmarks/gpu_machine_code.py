"""fewbit's Triton kernels compiled for GPUs that are not here: do registers spill, how many instructions does a weight take?

    python benchmarks/gpu_machine_code.py                  # capability 9.0
    python benchmarks/gpu_machine_code.py --capability 80

Triton brings NVIDIA's assembler and disassembler, so machine code can be had without a GPU. An H100 issues about 4 instructions per 4-bit
weight in the time in which its memory delivers one (132 multiprocessors x 128 lanes x 1.7 GHz over 6.7e12 weights/s), an H200 about 3: a
kernel with more in its inner loop cannot reach the bandwidth, whatever a tuner does. Fewer is necessary, not sufficient.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from _bars import Bar, run_bars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbit.kernels.triton import attention, eight_bit, rows, weight_only

_INTEGERS = (
    "M", "N", "K", "chunks", "groups", "chunks_per_part", "capacity", "first_part", "all_parts", "sliding", "blocks", "k_per_part",
)  # fmt: skip
_TYPES = {
    "x_ptr": "*bf16", "codes_ptr": "*i32", "high_ptr": "*i32", "zero_ptr": "*i8", "table_ptr": "*fp32", "global_ptr": "*fp32",
    "out_ptr": "*fp32", "scale_ptr": "*bf16", "query_ptr": "*bf16", "keys_ptr": "*bf16", "values_ptr": "*bf16", "length_ptr": "*i32",
    "sums_ptr": "*fp32", "largest_ptr": "*fp32", "total_ptr": "*fp32", "scale": "fp32", "epsilon": "fp32", "divisor": "fp32",
    "smallest": "fp32", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "w_ptr": "*i8", "static_ptr": "*fp32", "sequence_ptr": "*i32",
    "position_ptr": "*i32", "end_ptr": "*i32", "cosine_ptr": "*fp32", "sine_ptr": "*fp32", "key_zero_ptr": "*i8", "value_zero_ptr": "*i8",
}  # fmt: skip
_WEIGHT = {
    "BITS": 4, "LANES": 8, "GROUP": 128, "KIND": "int", "SCALE": "native", "AFFINE": False, "GLOBAL": False, "EVEN": True, "SWAP": False,
    "WIDE": False, "BLOCK_M": 16, "BLOCK_N": 64,
}  # fmt: skip
_BF16 = triton.language.bfloat16
_ATTEND = {
    "HEADS": 32, "KV_HEADS": 8, "DIM": 128, "WINDOW": 0, "RING": False, "KIND": "none", "DTYPE": _BF16, "GROUPED": 4, "BLOCK_G": 16,
    "BLOCK_T": 64,
}  # fmt: skip
_APPEND = {
    "HEADS": 32, "KV_HEADS": 8, "DIM": 128, "WINDOW": 0, "KIND": "none", "PARTS": 4, "BIAS": True, "NORM": True, "DTYPE": _BF16,
}  # fmt: skip
_ROWS = {"PARTS": 4, "BIAS": True, "RESIDUAL": True, "NORM": True, "CODES": "none", "STATIC": False, "DTYPE": _BF16, "BLOCK": 4096}
_EIGHT = {"INTEGER": True, "BLOCK_ROWS": 0, "BLOCK_COLUMNS": 0, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128}
_STORED = {"none": "*bf16", "int8": "*i8", "fp8": "*fp8e4nv", "int4": "*u8"}
Case = tuple[Any, dict[str, Any], dict[str, str], int, int]


def cases(fp8: bool) -> dict[str, Case]:
    """By name: kernel, constants, types that differ, warps, stages."""
    w, large = weight_only._multiply, {"SWAP": True, "BLOCK_M": 128, "BLOCK_N": 128}
    found: dict[str, Case] = {
        "int4-g128": (w, _WEIGHT, {}, 4, 4),
        "int4-g128-affine": (w, _WEIGHT | {"AFFINE": True}, {}, 4, 4),
        "int4-g128-float16": (w, _WEIGHT, {"x_ptr": "*fp16"}, 4, 4),
        "int8-g128": (w, _WEIGHT | {"BITS": 8, "LANES": 4}, {}, 4, 4),
        "int3-g128": (w, _WEIGHT | {"BITS": 3, "LANES": 16}, {}, 4, 4),
        "nf4-g64": (w, _WEIGHT | {"KIND": "table", "GROUP": 64}, {}, 4, 4),
        "mxfp4": (w, _WEIGHT | {"KIND": "e2m1", "GROUP": 32, "SCALE": "e8m0"}, {"scale_ptr": "*u8"}, 4, 4),
        "nvfp4": (w, _WEIGHT | {"KIND": "e2m1", "GROUP": 16, "SCALE": "e4m3", "GLOBAL": True}, {"scale_ptr": "*u8"}, 4, 4),
        "fp8-weights": (w, _WEIGHT | {"BITS": 8, "LANES": 4, "KIND": "e4m3", "GROUP": 1 << 30}, {}, 4, 4),
        "int4-g128-many-tokens": (w, _WEIGHT | large, {"out_ptr": "*bf16"}, 8, 2),
        "int8-products": (eight_bit._products, _EIGHT, {"x_ptr": "*i8"}, 4, 4),
        "silu": (rows._silu_product, {"PARTS": 2, "DTYPE": _BF16, "BLOCK": 512}, {"x_ptr": "*fp32"}, 4, 3),
        "combine": (attention._combine, {"DIM": 128, "BLOCK_P": 32}, {"out_ptr": "*bf16"}, 4, 3),
    }
    for codes, stored in (("none", "*bf16"), ("int8", "*i8"), ("e4m3", "*fp8e4nv")):
        if fp8 or codes != "e4m3":
            types = {"values_ptr": stored, "x_ptr": "*fp32", "scale_ptr": "*fp32"}
            found[f"rows-{codes}"] = (rows._process, _ROWS | {"CODES": codes}, types, 8, 3)
    for kind, stored in _STORED.items():
        if fp8 or kind != "fp8":
            found[f"attention-{kind}"] = (attention._attend, _ATTEND | {"KIND": kind}, {"keys_ptr": stored, "values_ptr": stored}, 4, 3)
            window = {"KIND": kind, "WINDOW": 32 if kind == "int4" else 0}
            types = {"keys_ptr": stored, "values_ptr": stored, "x_ptr": "*fp32"}
            found[f"append-{kind}"] = (attention._append, _APPEND | window, types, 1, 3)
    if fp8:
        eight = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv"}
        blocks = {"INTEGER": False, "BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "BLOCK_M": 128, "BLOCK_N": 128}
        found["fp8-products"] = (eight_bit._products, _EIGHT | {"INTEGER": False}, eight, 4, 4)
        found["fp8-block-products"] = (eight_bit._products, _EIGHT | blocks, eight, 8, 2)
    return found


def machine_code(case: Case, capability: int) -> tuple[list[str], int]:
    """Disassembled lines and bytes of shared memory."""
    function, constants, types, warps, stages = case
    names = function.arg_names
    kinds = _TYPES | dict.fromkeys(_INTEGERS, "i32") | types
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*bf16") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in (*constants, "M")}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})
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
        match = re.search(r"BRA(?:\.\S+)? `\((\.L\S+)\)", line)
        if match and labels.get(match.group(1), i) < i:
            spans.append((labels[match.group(1)], i))
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return lines[first : last + 1]


def main() -> int:
    """Compile, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="without the dot: 80, 89, 90, 120")
    parser.add_argument("--only", default="", help="kernels whose names begin so")
    parser.add_argument("--list", action="store_true", help="name the bars, compile nothing")
    options = parser.parse_args()
    spills, per_weight, largest = 0, {}, 0
    for name, case in ({} if options.list else cases(options.capability >= 89)).items():
        if not name.startswith(options.only):
            continue
        lines, shared = machine_code(case, options.capability)
        counts, loop = instructions(lines), instructions(longest_loop(lines)).total()
        spilled = counts["LDL"] + counts["STL"]
        spills, largest = spills + spilled, max(largest, shared)
        text = f"{name:<24} {counts.total():>6} instructions, spills {spilled}, shared memory {shared}"
        if case[0] is weight_only._multiply:
            per_weight[name] = loop / (case[1]["BLOCK_N"] * case[1]["LANES"] * 16 / (32 * case[3]))
            text += f", {per_weight[name]:.2f} in the loop per weight"
        print(text, flush=True)
    bars = [
        Bar("spills", lambda: spills, "==", 0, "loads and stores of spilled registers"),
        Bar("shared-memory", lambda: largest, "<=", 99 << 10),
    ]
    if (options.list or "int4-g128" in per_weight) and options.capability == 90:
        bars.append(Bar("int4-instructions-per-weight", lambda: per_weight["int4-g128"], "<=", 4.0, "what an H100 issues per weight"))
    return run_bars(bars, list_only=options.list)


if __name__ == "__main__":
    sys.exit(main())
