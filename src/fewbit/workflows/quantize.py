"""`fewbit quantize`: a model in, a checkpoint out that vLLM, SGLang and transformers load.

    plan        what becomes of which linear, checked before the first weight is read     workflows.quantize_plan
    walk        block by block, each finished one kept in DIR.partial                     walk.walk
    gate        KL divergence on held-out text against the scheme's threshold             walk.gate
    files       shards, config.json, model card, recipe; then DIR.partial becomes DIR     workflows.quantize_files

At most one block is in memory however large the model. Whatever ends the process, the same command goes on behind the last finished block
and gives the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter

from fewbit.checkpoints.layout import Layout
from fewbit.checkpoints.registry import get_layout
from fewbit.checkpoints.shards import MAX_SHARD_BYTES
from fewbit.checkpoints.sources import TensorSource, open_source
from fewbit.checkpoints.unfinished import resumable_directory
from fewbit.errors import QualityError, UsageError
from fewbit.evaluate.statistics import clustered_mean
from fewbit.formats.spec import Scheme
from fewbit.kernels.environment import cpu_flags, memory_bytes, peak_rss_bytes
from fewbit.models.structure import build_without_weights
from fewbit.results import GateResult, LayerReport, QuantizeEstimate, QuantizeResult
from fewbit.walk.activations import MemoryBudget
from fewbit.walk.calibration import CalibrationData, load_calibration
from fewbit.walk.estimate import check_fits, estimate_quantization, workload_of
from fewbit.walk.gate import GateSums, GateText, default_threshold, load_gate_text
from fewbit.walk.rates import measure_rates
from fewbit.walk.settings import WalkSettings
from fewbit.walk.skeleton import Skeleton
from fewbit.walk.walk import ProgressCallback, Walk, WalkOutcome
from fewbit.workflows.environment import environment
from fewbit.workflows.gguf_files import gguf_target
from fewbit.workflows.kv_scales import kv_scales, needs_kv_scales
from fewbit.workflows.quantize_files import RECIPE_NAME, TensorTotals, write_companions, write_weights
from fewbit.workflows.quantize_plan import QuantizePlan, check_kept, check_method, plan_linears, resolve_scheme, scheme_of_method
from fewbit.workflows.verify import verify_checkpoint

__all__ = ["quantize_model"]

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_VERSIONS = ("torch", "transformers", "compressed-tensors")

EstimateCallback = Callable[[QuantizeEstimate], None]


def quantize_model(
    model: str | Path | None = None,
    *,
    scheme: str | Scheme,
    out: str | Path,
    method: str | None = None,
    settings: WalkSettings | None = None,
    group_size: int | None = None,
    ignore: Sequence[str] = ("lm_head",),
    layout: str = "compressed-tensors",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: Sequence[str] | None = None,
    progress: ProgressCallback | None = None,
    on_estimate: EstimateCallback | None = None,
) -> QuantizeResult:
    """Quantize a model into a new Hugging Face directory.

    Args:
        model: a directory or a hub id; the bundled reference model when None.
        scheme: a preset's name or a scheme.
        out: the directory to make; work in progress lives in `out` with `.partial` appended and is taken up by the same call.
        method: the chain of methods, in place of the settings' own.
        settings: calibration, gate and everything else that the numbers depend on.
        group_size: weights that share a scale, in place of an integer scheme's own.
        ignore: linears that stay in high precision: shell patterns on the dotted name or its last part.
        layout: one of `checkpoints.registry.LAYOUTS`: who is to load it.
        overwrite: replace an existing checkpoint, and start over where another command left work.
        verify: runtimes that are asked about the finished checkpoint, as for `verify_checkpoint`; None: it is not verified. What that finds
            is in the result; the checkpoint stays.
        progress: called with (blocks done, blocks, what is being done).
        on_estimate: called before the work with what it will take; the time is estimated only for it, because that takes two seconds.

    Raises:
        UsageError: an unknown scheme or method, a scheme that the layout lacks, a pattern that matches nothing, a file's name as `out`;
            more memory or disk needed than there is.
        ModelError, CheckpointError: the source cannot be used, or has NaN or infinite weights.
        CorpusError: too little calibration text, or too little for the gate.
        FormatError: a group size that does not divide a layer.
        QualityError: the gate failed; the work is kept, and `GateChoice(force=True)` writes it all the same.
        OutputError: the directory exists, cannot be written, or holds unfinished work of another command.
    """
    started = time.monotonic()
    settings = settings or WalkSettings()
    settings = settings if method is None else replace(settings, method=method)
    target = get_layout(layout)
    resolved = scheme_of_method(settings, resolve_scheme(scheme, group_size, target), target)
    check_method(settings, resolved)
    _check_out(Path(out), resolved, target)
    source = open_source(model)
    plan = plan_linears(source, resolved, tuple(ignore), target)
    if Path(out).resolve() == plan.directory.resolve():
        raise UsageError(f"'{out}' is the source itself", "name another directory")
    check_kept(source, plan)
    calibration, gate = _texts(source, settings)
    dtype = _working_dtype(settings)
    facts = _facts(settings, dtype)
    command = _command(source, resolved, settings, plan, facts, calibration, gate, max_shard_bytes, target)
    with resumable_directory(out, command, overwrite=overwrite) as work:
        if work.done:
            finished = replace(TypeAdapter(QuantizeResult).validate_python(work.result), out=str(out))
            return _verified(finished, source, verify)
        estimate = _estimate(source, plan, resolved, settings, dtype, Path(out), on_estimate)
        budget = MemoryBudget(memory_bytes() // 4 if settings.memory_bytes is None else settings.memory_bytes, work.scratch)
        skeleton = Skeleton(source, dtype=dtype)
        walk = Walk(
            skeleton, resolved, settings, frozenset(plan.targets), work, budget, calibration=calibration, gate=gate, progress=progress
        )
        outcome = walk.run()
        decision = _gate_result(outcome.gate, gate, settings, resolved)
        if decision.outcome == "failed":
            raise _gate_failure(decision)
        extra = _kv_scales(source, resolved, settings, calibration)
        totals = write_weights(plan, work, outcome.steps, max_shard_bytes, target, resolved, extra)
        result = _result(source, str(out), resolved, settings, plan, outcome, totals, facts, target)
        result = replace(
            result,
            calibration=calibration.info if calibration is not None else None,
            gate=decision,
            duration_s=time.monotonic() - started,
            source_sha256=source.sha256(),
            peak_rss_bytes=peak_rss_bytes(),
            estimate=estimate,
        )
        write_companions(plan, resolved, result, totals, work.checkpoint, target)
        work.finish(RECIPE_NAME, asdict(result))
    return _verified(result, source, verify)


def _check_out(out: Path, scheme: Scheme, layout: Layout) -> None:
    """Refuse the name of a file: llama.cpp would be pointed at a directory that looks like one.

    Raises:
        UsageError: `out` ends in `.gguf` or `.safetensors`.
    """
    if out.suffix.lower() not in (".gguf", ".safetensors"):
        return
    folder = out.with_suffix("")
    remedy = f"--out {folder}"
    if layout.single_file:
        remedy += f"; the file will be {gguf_target(folder, layout.format_name(scheme))}"
    raise UsageError(f"'{out}' names a file, and quantize makes a directory, with the recipe and a model card beside the weights", remedy)


def _kv_scales(source: TensorSource, scheme: Scheme, settings: WalkSettings, given: CalibrationData | None) -> dict[str, torch.Tensor]:
    """Scales of a static KV cache; empty for other schemes."""
    if not needs_kv_scales(scheme):
        return {}
    calibration = given or _calibration(source, settings)
    return kv_scales(source, scheme, calibration.ids)


def _verified(result: QuantizeResult, source: TensorSource, runtimes: Sequence[str] | None) -> QuantizeResult:
    """The result with what verification found, where it was wanted."""
    if runtimes is None:
        return result
    return replace(result, verify=verify_checkpoint(result.out, against=source.directory, runtime_names=runtimes))


def _estimate(
    source: TensorSource,
    plan: QuantizePlan,
    scheme: Scheme,
    settings: WalkSettings,
    dtype: torch.dtype,
    out: Path,
    tell: EstimateCallback | None,
) -> QuantizeEstimate:
    """What the work will take; refuses what cannot fit."""
    work = workload_of(build_without_weights(source.config), source.config, plan.targets, source_bytes=source.weight_bytes_on_disk)
    rates = None
    if tell is not None:
        existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
        rates = measure_rates(scheme, settings, dtype, existing)
    estimate = estimate_quantization(work, scheme, settings, dtype, rates)
    check_fits(estimate, out)
    if tell is not None:
        tell(estimate)
    return estimate


def _texts(source: TensorSource, settings: WalkSettings) -> tuple[CalibrationData | None, GateText | None]:
    """Calibration data where the recipe needs any, and the gate's windows."""
    gate = settings.gate
    calibration = _calibration(source, settings) if settings.recipe.calibrated else None
    if not gate.enabled:
        return calibration, None
    windows, length = gate.windows, gate.sequence_length
    text = load_gate_text(source.tokenizer(), source.config, gate.texts, windows=windows, sequence_length=length, seed=settings.seed)
    return calibration, text


def _calibration(source: TensorSource, settings: WalkSettings) -> CalibrationData:
    choice = settings.calibration
    return load_calibration(
        source.tokenizer(),
        source.config,
        files=choice.files,
        dataset=choice.dataset,
        samples=choice.samples,
        sequence_length=choice.sequence_length,
        seed=settings.seed,
        chat_template=choice.chat_template,
    )


def _working_dtype(settings: WalkSettings) -> torch.dtype:
    native = settings.precision == "auto" and bool(_BF16_FLAGS & cpu_flags())
    return torch.bfloat16 if settings.precision == "bfloat16" or native else torch.float32


def _facts(settings: WalkSettings, dtype: torch.dtype) -> dict[str, str]:
    """What the numbers depend on besides source, scheme and texts: rounding differs between threads, processors and libraries."""
    machine = environment()
    numbers = asdict(settings)
    for name in ("memory_bytes", "calibration", "gate", "precision"):
        del numbers[name]
    return {
        "fewbit": machine.fewbit,
        **{name: machine.versions[name] for name in _VERSIONS},
        "threads": str(machine.threads),
        "processor": machine.cpu,
        "instruction sets": " ".join(machine.cpu_flags),
        "working precision": str(dtype).removeprefix("torch."),
        **{name: value if isinstance(value, str) else json.dumps(value) for name, value in numbers.items()},
    }


def _command(
    source: TensorSource,
    scheme: Scheme,
    settings: WalkSettings,
    plan: QuantizePlan,
    facts: dict[str, str],
    calibration: CalibrationData | None,
    gate: GateText | None,
    max_shard_bytes: int,
    layout: Layout,
) -> dict[str, str]:
    """What unfinished work must agree in with the command that takes it up."""
    return {
        "source": str(source.sha256()),
        "model": source.describe(),
        "scheme": json.dumps(asdict(scheme)),
        "left out": ", ".join(plan.ignored),
        "calibration text": calibration.info.ids_sha256 if calibration is not None else "none",
        "gate's text": gate.ids_sha256 if gate is not None else "none",
        "shards": str(max_shard_bytes),
        "format": layout.name,
        **facts,
    }


def _gate_result(windows: Sequence[GateSums], text: GateText | None, settings: WalkSettings, scheme: Scheme) -> GateResult:
    if text is None:
        return GateResult("skipped")
    tokens = [window.tokens for window in windows]
    threshold = default_threshold(scheme) if settings.gate.threshold is None else settings.gate.threshold
    kl = clustered_mean([window.kl for window in windows], tokens)
    passed = kl.value <= threshold
    return GateResult(
        outcome="passed" if passed else ("forced" if settings.gate.force else "failed"),
        kl_nats=kl,
        threshold_nats=threshold,
        flip_share=sum(window.flips for window in windows) / sum(tokens),
        perplexity=_exp(sum(window.loss for window in windows) / sum(tokens)),
        reference_perplexity=_exp(sum(window.reference_loss for window in windows) / sum(tokens)),
        text=text.name,
        text_sha256=text.sha256,
        ids_sha256=text.ids_sha256,
        windows=len(windows),
        tokens=sum(tokens),
    )


def _exp(loss: float) -> float:
    return float(torch.tensor(loss, dtype=torch.float64).exp())


def _gate_failure(gate: GateResult) -> QualityError:
    assert gate.kl_nats is not None and gate.threshold_nats is not None
    return QualityError(
        f"the quantized model is too far from the model in high precision: KL divergence {gate.kl_nats.value:.4g} nats per token on "
        f"'{gate.text}', the threshold is {gate.threshold_nats:g} (perplexity {gate.reference_perplexity:.4g} -> {gate.perplexity:.4g})",
        "choose more bits, smaller groups or a better method; --force writes it all the same, without doing the work again",
    )


def _result(
    source: TensorSource,
    out: str,
    scheme: Scheme,
    settings: WalkSettings,
    plan: QuantizePlan,
    outcome: WalkOutcome,
    totals: TensorTotals,
    facts: dict[str, str],
    layout: Layout,
) -> QuantizeResult:
    quantized = [layer for layer in outcome.layers if layer.name in totals.quantized]
    fallen_back = [layer.name for layer in outcome.layers if layer.name not in totals.quantized]
    back = {disk: name for name, disk in plan.names.single.items()}
    model_names = [back.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in fallen_back]
    weights = sum(layer.rows * layer.columns for layer in quantized)
    ignored = list(dict.fromkeys([*plan.ignored, *fallen_back, *model_names]))
    return QuantizeResult(
        model=source.describe(),
        out=out,
        scheme=scheme.name,
        weights=str(scheme.weights),
        input_activations=str(scheme.input_activations or "BF16"),
        method=settings.recipe.text,
        observer=_observer_text(settings),
        layout=layout.name,
        layout_format=layout.format_name(scheme),
        quantized_linears=len(quantized),
        ignored_linears=ignored,
        kept_tensors=totals.kept,
        parameters=totals.parameters,
        quantized_parameters=weights,
        source_bytes=totals.source_bytes,
        checkpoint_bytes=totals.checkpoint_bytes,
        effective_bits_per_weight=_bits(quantized) / weights if weights else 16.0,
        effective_bits_per_parameter=8 * totals.checkpoint_bytes / totals.parameters,
        duration_s=0.0,
        settings=facts,
        layers=outcome.layers,
        blocks=outcome.blocks,
        notes=[*plan.notes, *outcome.notes, *totals.notes, *_mixed_experts([layer.name for layer in quantized], ignored)],
    )


def _mixed_experts(quantized: Sequence[str], ignored: Sequence[str]) -> list[str]:
    """Mixtures of which only some experts are quantized."""
    in_part = {name.partition(".experts.")[0] for name in quantized if ".experts." in name}
    mixed = sorted(in_part & {name.partition(".experts.")[0] for name in ignored if ".experts." in name})
    if not mixed:
        return []
    return [f"only some experts of {len(mixed)} mixtures are quantized ({mixed[0]}, ...): runtimes that run them as one cannot load that"]


def _bits(layers: Sequence[LayerReport]) -> float:
    return sum(layer.bits * layer.rows * layer.columns for layer in layers)


def _observer_text(settings: WalkSettings) -> str:
    if settings.recipe.rounding in ("gptq", "gptaq"):
        return settings.gptq.observer
    return settings.observer or ("output error" if settings.recipe.transform == "awq" else "minmax")
