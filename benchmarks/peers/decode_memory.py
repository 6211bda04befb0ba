"""RSS of a fresh process from just before it loads a model in INT4 to after the first token; one JSON line.

    python benchmarks/peers/decode_memory.py qwen2.5-1.5b

What is imported and warmed up before (a matrix product, for the threads' stacks) belongs to the process, not to the model.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from fewbit.checkpoints.sources import RandomSource
from fewbit.formats.spec import get_scheme
from fewbit.models.shapes import shapes_config
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.load import load_model
from fewbit.runtime.runner import EngineRunner

_PROMPT = 128


def status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1]) * 1024


def main() -> None:
    torch.ones(64, 64) @ torch.ones(64, 64)
    source = RandomSource(shapes_config(sys.argv[1]), seed=0)
    gc.collect()
    before = status("VmRSS")
    loaded = load_model(source, QuantizationConfig(get_scheme("W4A16"), compute="int8-activations"))
    runner = EngineRunner(loaded)
    cache = runner.new_cache(_PROMPT + 1)
    tokens = torch.arange(_PROMPT)[None]
    runner.prefill(tokens, cache)
    runner.decode(tokens[:, :1], cache)
    gc.collect()
    facts = {
        "before": before,
        "after": status("VmRSS"),
        "peak": status("VmHWM"),
        "packed": loaded.resident_weight_bytes,
        "cache": cache.nbytes(),
        "kernels": {use.kernel: use.linears for use in loaded.kernel_uses},
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
