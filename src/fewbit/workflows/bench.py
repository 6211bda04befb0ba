"""`fewbit bench`: latency and memory of one scheme against BF16, or what the machine itself can do.

from fewbit.workflows.bench import bench

results = bench(shapes="qwen2.5-1.5b", scheme="W4A16")
print(results.rows[-1].latency.speedup_over_bf16)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fewbit.bench.latency import LatencySettings, measure_latency
from fewbit.bench.machine import measure_machine
from fewbit.bench.memory import PeakMeter, PeakRequest, memory_result
from fewbit.bench.scaling import LayerScale
from fewbit.errors import UsageError
from fewbit.formats.spec import get_scheme
from fewbit.models.accounting import parameter_count
from fewbit.models.shapes import shapes_config
from fewbit.results import BenchResults, MachineResult, ModelInfo, VariantResult
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.load import LoadedModel, load_model
from fewbit.runtime.sources import RandomSource, TensorSource, open_source
from fewbit.workflows.environment import environment
from fewbit.workflows.variants import BASELINE, Variant

__all__ = ["bench", "bench_machine"]

ProgressCallback = Callable[[int, int, str], None]
_SHAPES_LAYERS = 4


def bench_machine() -> MachineResult:
    """Read bandwidth, GEMM rate and time per operator of this machine; about 3 seconds."""
    return measure_machine()


def bench(
    model: str | Path | None = None,
    *,
    shapes: str | None = None,
    scheme: str = "W4A16",
    kernel: str | None = None,
    prompt_tokens: int = 512,
    context: int = 128,
    decode_steps: int = 120,
    budget_s: float = 10.0,
    memory_budget_bytes: int = 8 * 2**30,
    kv_context_tokens: int = 4096,
    counters: bool = False,
    peak: bool = True,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> BenchResults:
    """Measure latency and memory of one scheme, in turns with BF16.

    Args:
        model: a local Hugging Face directory or a hub id; the bundled reference model when None.
        shapes: random weights in these real shapes instead of a model; a slice of the layers runs and is scaled to the whole stack.
        scheme: a preset of `formats.spec.SCHEMES`.
        kernel: a kernel's name, or `unfused`; the fastest when None.
        prompt_tokens: length of the prefill that is timed.
        context: tokens in the KV cache while decode is timed.
        decode_steps, budget_s: most steps, and most seconds for the steps, per row.
        memory_budget_bytes, kv_context_tokens: memory in which sequences of that length are fitted beside the weights.
        counters: also read hardware counters.
        peak: measure peak memory in a fresh process.
        seed: of random weights and random tokens.
        progress: called with (steps done, steps in all, what is next).

    Raises:
        UsageError: both a model and shapes, or an unknown scheme, shape or kernel.
        ModelError, CheckpointError, FormatError, KernelError, MeasurementError: input that cannot be used or measured.
    """
    if model is not None and shapes is not None:
        raise UsageError(f"both a model ('{model}') and --shapes {shapes} were given", "give one of them")
    variant = Variant(scheme.lower(), scheme.upper(), get_scheme(scheme), kernel)
    variants = [BASELINE] if variant.scheme == BASELINE.scheme else [BASELINE, variant]
    tell = progress or (lambda done, total, what: None)
    total = 1 + 2 * len(variants)
    tell(0, total, "machine: bandwidth and GEMM rate")
    machine = measure_machine()
    source: TensorSource = RandomSource(shapes_config(shapes), seed=seed, num_layers=_SHAPES_LAYERS) if shapes else open_source(model)
    settings = LatencySettings(
        prompt_tokens=prompt_tokens, context_tokens=context, decode_steps=decode_steps, budget_s=budget_s, counters=counters, seed=seed
    )
    baseline = load_model(source, QuantizationConfig(BASELINE.scheme))
    layers = baseline.config.get_text_config(decoder=True).num_hidden_layers
    scale = LayerScale(layers, shapes_config(shapes).num_hidden_layers if shapes else layers)
    rows = []
    with PeakMeter() as meter:
        for done, row in enumerate(variants):
            tell(1 + 2 * done, total, f"{row.label}: latency")
            loaded = baseline if row is BASELINE else load_model(source, QuantizationConfig(row.scheme, kernel=row.kernel))
            latency = measure_latency(baseline, loaded, machine, settings=settings, scale=scale)
            tell(2 + 2 * done, total, f"{row.label}: memory")
            request = PeakRequest(
                scheme=row.scheme.name,
                model=str(model) if model is not None else None,
                shapes=shapes,
                num_layers=layers if shapes else None,
                kernel=row.kernel,
                threads=torch.get_num_threads(),
            )
            memory = memory_result(
                loaded,
                context=kv_context_tokens,
                budget_bytes=memory_budget_bytes,
                disk_note="bench writes no checkpoint",
                peak=meter.measure(request) if peak else None,
                scale=scale,
            )
            rows.append(VariantResult(variant=row.info(), kernels=list(loaded.kernel_uses), memory=memory, latency=latency))
    tell(total, total, "done")
    note = f"scaled from {layers} of {scale.layers_total} layers with random weights" if scale.is_scaled else ""
    info = _model_info(baseline, source, shapes, scale)
    return BenchResults(environment=environment(), machine=machine, model=info, rows=rows, note=note)


def _model_info(baseline: LoadedModel, source: TensorSource, shapes: str | None, scale: LayerScale) -> ModelInfo:
    quantizable = baseline.quantizable_parameters
    return ModelInfo(
        source=f"shapes:{shapes}" if shapes else source.describe(),
        architecture=baseline.config.model_type,
        parameters=parameter_count(shapes_config(shapes)) if shapes else baseline.parameters,
        quantizable_parameters=quantizable * scale.layers_total // scale.layers_measured,
        layers_measured=scale.layers_measured,
        layers_total=scale.layers_total,
        weights_sha256=source.sha256(),
        random_weights=shapes is not None,
    )
