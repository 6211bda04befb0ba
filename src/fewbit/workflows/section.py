"""One model and its variants, measured against one resident BF16 baseline.

A comparison has one section for the model and, with `--shapes`, a second one for a stack of layers with random weights in real shapes. Both
load each variant, measure it in turns with the baseline, and drop it again, so that at most two models are resident at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fewbit.bench.latency import LatencySettings, measure_latency
from fewbit.bench.memory import PeakMeter, PeakRequest, memory_result
from fewbit.bench.scaling import LayerScale
from fewbit.bench.steps import DECODE_ROOM
from fewbit.checkpoints.compressed_tensors import supports
from fewbit.checkpoints.sources import RandomSource, TensorSource, open_source
from fewbit.evaluate.quality import Reference, evaluate_quality
from fewbit.models.accounting import parameter_count
from fewbit.models.shapes import shapes_config
from fewbit.results import MachineResult, MemoryResult, ModelInfo, VariantResult
from fewbit.runtime.load import LoadedModel, load_model
from fewbit.runtime.runner import RuntimeChoice
from fewbit.workflows.variants import BASELINE, Variant

__all__ = ["ProgressCallback", "Section", "SectionSettings", "Steps", "Subject"]

ProgressCallback = Callable[[int, int, str], None]
SHAPES_LAYERS = 4


class Steps:
    """Counts what is done and tells the progress callback what is next."""

    def __init__(self, callback: ProgressCallback | None, total: int) -> None:
        self._callback = callback
        self._total = total
        self._done = -1

    def next(self, what: str) -> None:
        """One more step begins."""
        self._done += 1
        if self._callback is not None:
            self._callback(self._done, self._total, what)

    def finish(self) -> None:
        """All steps are done."""
        if self._callback is not None:
            self._callback(self._total, self._total, "done")


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, or the first layers of a stack in real shapes with random weights.

    Attributes:
        model: a local directory or a hub id; None for the bundled reference model.
        shapes: a name of `fewbit.models.shapes.SHAPES` instead of a model.
        seed: of the random weights.
    """

    model: str | Path | None = None
    shapes: str | None = None
    seed: int = 0

    def open(self) -> TensorSource:
        """The source of the weights.

        Raises:
            UsageError, ModelError, CheckpointError: unknown shapes, or a model that cannot be used.
        """
        if self.shapes is not None:
            return RandomSource(shapes_config(self.shapes), seed=self.seed, num_layers=SHAPES_LAYERS)
        return open_source(self.model)

    def info(self, baseline: LoadedModel, scale: LayerScale) -> ModelInfo:
        """The subject's description as it stands in a results file."""
        return ModelInfo(
            source=f"shapes:{self.shapes}" if self.shapes else baseline.source.describe(),
            architecture=baseline.config.model_type,
            parameters=parameter_count(shapes_config(self.shapes)) if self.shapes else baseline.parameters,
            quantizable_parameters=baseline.quantizable_parameters * scale.layers_total // scale.layers_measured,
            layers_measured=scale.layers_measured,
            layers_total=scale.layers_total,
            weights_sha256=baseline.source.sha256(),
            random_weights=self.shapes is not None,
        )


@dataclass(frozen=True)
class SectionSettings:
    """How much is measured.

    Attributes:
        latency: prompt length, context, steps and time budget of the latency measurement.
        threshold_percent: largest increase of perplexity over BF16 that passes.
        memory_budget_bytes: memory in which sequences are fitted beside the weights.
        kv_context_tokens: length of those sequences; cut to the model's own maximum.
        peak: measure peak memory in a fresh process per variant.
        strict: an error when a slower kernel would run in place of a fused one.
        runtime: who runs the passes that are timed, see `runtime.runner.make_runner`.
    """

    latency: LatencySettings = field(default_factory=LatencySettings)
    threshold_percent: float = 5.0
    memory_budget_bytes: int = 8 * 2**30
    kv_context_tokens: int = 4096
    peak: bool = True
    strict: bool = False
    runtime: RuntimeChoice = "auto"


class Section:
    """A subject with its BF16 baseline resident.

    Args:
        subject: what is measured.
        source: the subject's weights.
        machine: the machine's figures from the same run.
        settings: how much is measured.
        steps: told before each measurement.
        meter: measures peak memory.

    Raises:
        ModelError, CheckpointError: weights that cannot be loaded.
    """

    def __init__(
        self, subject: Subject, source: TensorSource, machine: MachineResult, settings: SectionSettings, steps: Steps, meter: PeakMeter
    ) -> None:
        self._subject = subject
        self._source = source
        self._machine = machine
        self._settings = settings
        self._steps = steps
        self._meter = meter
        self.baseline = load_model(source, BASELINE.quantization())
        config = self.baseline.config.get_text_config(decoder=True)
        layers = int(config.num_hidden_layers)
        self._scale = LayerScale(layers, shapes_config(subject.shapes).num_hidden_layers if subject.shapes else layers)
        self._positions = int(getattr(config, "max_position_embeddings", None) or 2**31)
        self._latency = _within(settings.latency, self._positions)
        self.model_info = subject.info(self.baseline, self._scale)
        total = self._scale.layers_total
        self.note = f"scaled from {layers} of {total} layers with random weights" if self._scale.is_scaled else ""

    def measure(self, variant: Variant, reference: Reference | None = None) -> VariantResult:
        """The variant's row: latency, quality (when there is a reference) and memory; three steps, or two.

        Raises:
            FormatError, KernelError, CheckpointError: the variant cannot be made of these weights.
            MeasurementError: a measurement failed, for example NaN logits.
        """
        self._steps.next(f"{variant.label}: latency")
        loaded = self._load(variant)
        latency = measure_latency(
            self.baseline, loaded, self._machine, settings=self._latency, scale=self._scale, runtime=self._settings.runtime
        )
        quality = None
        if reference is not None:
            self._steps.next(f"{variant.label}: quality")
            quality = evaluate_quality(reference, loaded, threshold_percent=self._settings.threshold_percent)
        self._steps.next(f"{variant.label}: memory")
        memory = self._memory(variant, loaded)
        return VariantResult(variant=variant.info(), kernels=list(loaded.kernel_uses), memory=memory, latency=latency, quality=quality)

    def _load(self, variant: Variant) -> LoadedModel:
        """The variant's model. One that changes only the KV cache shares the baseline's weights."""
        if variant.changes_linears:
            return load_model(self._source, variant.quantization(strict=self._settings.strict))
        return replace(self.baseline, scheme=variant.scheme)

    def _memory(self, variant: Variant, loaded: LoadedModel) -> MemoryResult:
        request = PeakRequest(
            scheme=variant.scheme.name,
            model=str(self._subject.model) if self._subject.model is not None else None,
            shapes=self._subject.shapes,
            num_layers=self._scale.layers_measured if self._subject.shapes else None,
            kernel=variant.kernel,
            prompt_tokens=max(1, min(PeakRequest.prompt_tokens, self._positions - PeakRequest.decode_steps)),
            threads=torch.get_num_threads(),
            compute=variant.compute,
            lm_head=variant.lm_head,
            runtime=self._settings.runtime,
        )
        memory = memory_result(
            loaded,
            context=min(self._settings.kv_context_tokens, self._positions),
            budget_bytes=self._settings.memory_budget_bytes,
            peak=self._meter.measure(request) if self._settings.peak else None,
            peak_note="" if self._settings.peak else "not measured in this run",
            scale=self._scale,
            runtime=self._settings.runtime,
        )
        unsupported = supports(variant.scheme) if variant.changes_linears else None
        layout = f"packed densely; no layout yet: {unsupported}" if unsupported else "tensor bytes in compressed-tensors"
        return replace(memory, disk_bytes=_checkpoint_bytes(memory), disk_note=layout)


def _within(latency: LatencySettings, positions: int) -> LatencySettings:
    """The same measurement with prompt and context cut to the model's positions; results carry the lengths that were measured."""
    context = min(latency.context_tokens, max(1, positions - DECODE_ROOM))
    return replace(latency, prompt_tokens=min(latency.prompt_tokens, positions), context_tokens=context)


def _checkpoint_bytes(memory: MemoryResult) -> int:
    """Tensor bytes of the checkpoint: what stays in high precision, and the linears packed as densely as their format allows.

    A kernel may keep more resident than a checkpoint stores (torch's INT4 kernel keeps a zero for each scale), so the two differ.
    """
    bits = memory.effective_bits_per_weight
    packed = round(memory.quantized_linear_bf16_bytes * bits / 16) if bits is not None else 0
    return memory.resident_weight_bytes - memory.quantized_linear_bytes + packed
