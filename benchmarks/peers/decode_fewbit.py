"""fewbit's engine on random weights in a model's shapes: decode steps, steps of a batch, prefills."""

from __future__ import annotations

from typing import Any

import torch
from _worker import Pass, serve

import fewbit
from fewbit.bench.overhead import linears
from fewbit.bench.traffic import linear_bytes
from fewbit.checkpoints.sources import RandomSource
from fewbit.formats.spec import get_scheme
from fewbit.kernels.cpu.extension import use_torch_threads
from fewbit.models.shapes import shapes_config
from fewbit.runtime.config import QuantizationConfig, compute_mode, head_format
from fewbit.runtime.load import LoadedModel, load_model
from fewbit.runtime.runner import EngineRunner

# Scheme, compute mode, format of the head.
_CONTENDERS = {
    "fewbit-int4": ("W4A16", "int8-activations", "int8"),
    "fewbit-int4-head4": ("W4A16", "int8-activations", "int4"),
    "fewbit-int4-exact": ("W4A16", "exact", "int8"),
    "fewbit-int8": ("W8A16", "int8-activations", "int8"),
    "fewbit-bf16": ("BF16", "exact", "bf16"),
}
_loaded: dict[tuple[str, str], EngineRunner] = {}


def _runner(case: dict[str, Any]) -> EngineRunner:
    key = (case["shapes"], case["contender"])
    if key not in _loaded:
        _loaded.clear()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # quantizing passes many barriers, and a machine that is shared makes each of them wait
        scheme, compute, head = _CONTENDERS[case["contender"]]
        config = QuantizationConfig(get_scheme(scheme), compute=compute_mode(compute), lm_head=head_format(head))
        _loaded[key] = EngineRunner(load_model(RandomSource(shapes_config(case["shapes"]), seed=0), config))
        torch.set_num_threads(threads)
    return _loaded[key]


def _bytes_per_token(loaded: LoadedModel) -> int:
    """Bytes of the weights that a decode step reads."""
    return sum(linear_bytes(module)[0] for _, module in linears(loaded.model))


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    torch.set_num_threads(case["threads"])
    use_torch_threads()
    runner = _runner(case)
    batch, context, steps, prompt = case["batch"], case["context"], case["steps"], case["prompt"]
    vocabulary = runner.loaded.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    cache = runner.new_cache(max(context + steps, prompt), batch)
    tokens = torch.randint(0, vocabulary, (batch, max(context, prompt)), generator=generator)

    def decode() -> None:
        cache.crop(context - cache.get_seq_length())
        for _ in range(steps):
            runner.decode(tokens[:, :1], cache)

    def prefill() -> None:
        cache.crop(-cache.get_seq_length())
        runner.prefill(tokens[:, :prompt], cache)

    if not prompt:
        runner.prefill(tokens[:, :context], cache)
    head = runner.loaded.quantization.lm_head
    kernels = ", ".join(f"{use.kernel} x{use.linears}" for use in runner.loaded.kernel_uses)
    facts = {
        "bytes": _bytes_per_token(runner.loaded),
        "tokens": batch * (prompt or steps),
        "passes": 1 if prompt else steps,
        "head": "BF16" if head is None else str(head),
        "kernels": kernels,
        "version": f"fewbit {fewbit.__version__}",
    }
    return (prefill if prompt else decode), facts


if __name__ == "__main__":
    serve(setup)
