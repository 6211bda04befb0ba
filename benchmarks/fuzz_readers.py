"""The fuzzer of the readers: damaged and hostile checkpoints are read or refused, and nothing else happens.

    python benchmarks/fuzz_readers.py --minutes 10                # every layout in turn; prints a seed with what it finds
    python benchmarks/fuzz_readers.py --seed 123 --cases 1        # one case again
    python benchmarks/fuzz_readers.py --list

Small checkpoints are written in every layout that fewbit writes. Each case takes one of them, changes it (bytes of a header or anywhere,
numbers, strings and types in config.json and the index, a file cut short, emptied, swapped for a pickle or a zip archive) and opens it as
`fewbit.load` and `inspect` do: the source, each tensor's shape, each linear. Every case runs in a child with 3 GiB of address space beyond
what the process has and ten seconds of CPU time, so that an allocation or a loop on the word of a file ends it. Whatever is not
`FewbitError` counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _bars import Bar, add_arguments, run_bars
from faults import write_tokenizer

from fewbit.checkpoints.registry import LAYOUTS
from fewbit.checkpoints.sources import open_source
from fewbit.errors import FewbitError
from fewbit.walk.settings import CalibrationChoice, GateChoice, WalkSettings
from fewbit.workflows.convert import convert_checkpoint
from fewbit.workflows.quantize import quantize_model

SCHEMES = {"bitsandbytes": "NF4", "modelopt": "FP8", "torchao": "W8A16"}
EXTRA_BYTES, CPU_SECONDS = 3 * 2**30, 10
ODD: tuple[Any, ...] = (
    0,
    -1,
    1,
    2**31,
    2**63,
    1e308,
    float("nan"),
    True,
    None,
    "",
    "x" * 1000,
    "../../etc/passwd",
    "/etc/passwd",
    [],
    {},
    [[]],
)


def write_seeds(folder: Path) -> dict[str, Path]:
    """A tiny model, and a checkpoint of it in every layout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "none")
    write_tokenizer(folder / "none")
    seeds = {"none": folder / "none"}
    settings = WalkSettings(gate=GateChoice(False), calibration=CalibrationChoice(samples=1, sequence_length=8))
    for layout in LAYOUTS:
        if layout.startswith("dense"):
            continue
        scheme = SCHEMES.get(layout, "W4A16-G32")
        quantize_model(folder / "none", scheme=scheme, out=folder / layout, layout=layout, settings=settings)
        seeds[layout] = folder / layout
    convert_checkpoint(folder / "none", layout="gguf-dense", out=folder / "dense" / "m.gguf")
    seeds["gguf-dense"] = folder / "dense"
    return seeds


# ------------------------------------------------------------------------------------------------------------------------ changes


def change_json(path: Path, rng: random.Random) -> None:
    """Another value, type or structure somewhere in a JSON file."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(rng.randint(1, 3)):
        at: Any = fields
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7:
                at = at[key]
                continue
            if rng.random() < 0.2 and isinstance(at, dict):
                del at[key]
            else:
                at[key] = rng.choice(ODD)
            break
    path.write_text(json.dumps(fields), encoding="utf-8")


def change_bytes(path: Path, rng: random.Random) -> None:
    """Some bytes, mostly of the header."""
    content = bytearray(path.read_bytes())
    reach = min(len(content), rng.choice((64, 4096, 30000, len(content))))
    for _ in range(rng.randint(1, 16)):
        content[rng.randrange(reach)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    path.write_bytes(content)


def change_header(path: Path, rng: random.Random) -> None:
    """Offsets, shapes and dtypes of a safetensors header, the length of the header right."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + length])
    names = [name for name in fields if name != "__metadata__"]
    for _ in range(rng.randint(1, 3)):
        entry = fields[rng.choice(names)]
        what = rng.choice(("dtype", "shape", "data_offsets", "swap", "all"))
        if what == "dtype":
            entry["dtype"] = rng.choice(("I8", "U8", "F32", "BF16", "F64", "BOOL", "X", 7))
        elif what == "swap":
            other = fields[rng.choice(names)]
            entry["data_offsets"] = other["data_offsets"]
        elif what == "all":
            fields[rng.choice(names)] = rng.choice(ODD)
            names = [name for name in names if isinstance(fields[name], dict) and "shape" in fields[name]] or names
        elif entry.get(what):
            entry[what][rng.randrange(len(entry[what]))] = rng.choice((0, -1, 2**40, 2**63, rng.randrange(1 << 20), "1", 1.5, None))
        if not all(isinstance(fields[name], dict) for name in names):
            break
    text = json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def change_kind(path: Path, rng: random.Random) -> None:
    """Cut short, empty, or something else altogether."""
    content = path.read_bytes()
    path.write_bytes(
        rng.choice(
            (b"", content[: rng.randrange(len(content))], b"PK\x03\x04" + content[:99], b"\x80\x04\x95" + content[:99], content + content)
        )
    )


def damage(directory: Path, rng: random.Random) -> None:
    """One to three changes of a copied checkpoint."""
    files = [path for path in directory.iterdir() if path.suffix in (".json", ".safetensors", ".gguf") and "recipe" not in path.name]
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(files)
        changes: list[Callable[[Path, random.Random], None]] = [change_bytes, change_kind]
        changes += (
            [change_json] * 6 if path.suffix == ".json" else [change_header] * 4 if path.suffix == ".safetensors" else [change_bytes] * 6
        )
        try:
            rng.choice(changes)(path, rng)
        except (ValueError, IndexError, TypeError, KeyError, AttributeError, OverflowError):  # an earlier change has left no such file
            change_bytes(path, rng) if path.stat().st_size else path.write_bytes(b"{}")


def read_all(directory: Path) -> None:
    """What loading and inspecting do with files."""
    source = open_source(directory)
    _ = source.scheme, source.notes
    for name in source.names():
        source.shape(name)
        source.get(name)
    for prefix in sorted(source.quantized_linears):
        source.get_quantized(prefix)
    source.generation_config()


def one_case(seeds: dict[str, Path], number: int) -> str | None:
    """What went wrong with a case; None when it was read or refused."""
    rng = random.Random(number)
    layout = rng.choice(sorted(seeds))
    with tempfile.TemporaryDirectory(prefix="fewbit-fuzz-") as folder:
        directory = Path(folder) / "x"
        shutil.copytree(seeds[layout], directory)
        damage(directory, rng)
        child = os.fork()
        if child == 0:
            os._exit(_child(directory))
        status = os.waitpid(child, 0)[1]
    if status == 0:
        return None
    reason = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "an error that is no FewbitError"
    return f"{layout}, case {number}: {reason}"


def _child(directory: Path) -> int:
    with open("/proc/self/statm") as stream:
        now = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + EXTRA_BYTES, now + EXTRA_BYTES))
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, used + CPU_SECONDS))
    try:
        read_all(directory)
    except FewbitError:
        return 0
    except BaseException:
        traceback.print_exc(limit=-6)
        return 1
    return 0


@cache
def findings(minutes: float, seed: int, cases: int) -> tuple[int, tuple[str, ...]]:
    """Cases that were tried, and what was found."""
    torch.set_num_threads(1)
    found, tried = [], 0
    with tempfile.TemporaryDirectory(prefix="fewbit-seeds-") as folder:
        seeds = write_seeds(Path(folder))
        end = time.monotonic() + 60 * minutes
        while (tried < cases) if cases else (time.monotonic() < end):
            problem = one_case(seeds, seed + tried)
            tried += 1
            if problem is not None:
                found.append(problem)
                sys.stderr.write(problem + "\n")
    sys.stderr.write(f"{tried} cases\n")
    return tried, tuple(found)


def main() -> None:
    """Fuzz, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=0, help="how many cases, in place of a time")
    options = parser.parse_args()
    arguments = (options.minutes, options.seed, options.cases)
    note = "crashes, hangs, unbounded allocations and errors that are no FewbitError"
    bars = [Bar("fuzz-findings", lambda: float(len(findings(*arguments)[1])), "==", 0.0, note)]
    raise SystemExit(run_bars(bars, list_only=options.list, json_file=options.json))


if __name__ == "__main__":
    main()
