"""`fewbit predict`: how long the steps of a model take on a device, from its data sheet and whatever was measured.

from fewbit.workflows.predict import predict_model

results = predict_model("7e9", hardware="agx-orin-64gb", measured=["bf16 decode 94 ms"])
print(results.predictions[-1].milliseconds)                         # an estimate with its 90 % interval
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import TypeAdapter, ValidationError

from fewbit.errors import UsageError
from fewbit.formats.spec import get_scheme
from fewbit.models.inventory_sources import read_inventory
from fewbit.predict.axis import bounds_along_batch
from fewbit.predict.bandwidth import bandwidth_scale, predict_by_bandwidth
from fewbit.predict.calibration import Z90
from fewbit.predict.conclude import conclusions
from fewbit.predict.efficiency import FACTORS, Prior, known_runtimes, prior_of_device
from fewbit.predict.hardware import Hardware, get_hardware, measured_hardware
from fewbit.predict.measured import read_measured, scheme_name
from fewbit.predict.outline import Outline, outline_of
from fewbit.predict.plausible import examine
from fewbit.predict.prediction import (
    Estimate,
    Estimator,
    MeasuredPoint,
    Phase,
    PredictedModel,
    PredictResults,
    StepPoint,
    Suggestion,
    step_name,
)
from fewbit.predict.predictor import Predictor
from fewbit.predict.step import choose_path, compute_format
from fewbit.results import MachineResult

__all__ = ["predict_model", "resolve_hardware"]

_SCHEMES = ("BF16", "W8A16", "W4A16")
_NATIVE_SCHEMES = ("W8A8", "FP8", "NVFP4")
_CONTEXT = 1024
_MOST_POINTS = 2000


def predict_model(
    model: str | Path | None = None,
    *,
    hardware: str,
    hardware_file: Path | None = None,
    machine: Path | None = None,
    bandwidth_gb_s: float | None = None,
    measured: Sequence[str] = (),
    estimator: str = "model",
    runtime: str | None = None,
    compute: str = "exact",
    schemes: Sequence[str] = (),
    phases: Sequence[str] = (),
    kv: Sequence[str] = (),
    batches: Sequence[int] = (),
    contexts: Sequence[int] = (),
    layers: int = 0,
    kv_heads: int = 0,
    head_dim: int = 0,
) -> PredictResults:
    """Predict the steps of a model on a device.

    Args:
        model: a directory, a config.json, a hub id, published shapes, or a parameter count such as `7e9`; the reference model when None.
        hardware: a device of `predict/hardware.toml` or `hardware_file`; `this-machine` is measured, or read from `machine`.
        machine: what `fewbit bench --machine --json` printed.
        bandwidth_gb_s: in place of the data sheet's.
        measured: words or files, as `predict.measured` reads them: of this model on this device.
        estimator: `model`, or `bandwidth` (nominal bits over the bandwidth, scaled by the measured points).
        runtime: software whose kernels are known apart, `llama.cpp`, `torch` or `tensorrt-llm`; the class's own prior when None.
        compute: for this-machine: which CPU kernels run, `exact` ones or those with `int8-activations`.
        schemes, phases, kv, batches, contexts: the steps to predict, every combination. When empty: BF16, INT8, INT4 and what the
            device multiplies natively; phase, cache, batch and context that were measured, else decode of one sequence at 1,024 tokens.
        layers, kv_heads, head_dim: the cache's geometry, for a bare count.

    Raises:
        UsageError: an unknown device, scheme or estimator, words that are no measurement, sizes that are not positive, more than 2,000
            steps, or no possible measured point left for the bandwidth estimator.
        ModelError, CheckpointError: as `models.inventory_sources.read_inventory`.
        FormatError: a group size that does not divide a linear.
    """
    if estimator not in get_args(Estimator):
        raise UsageError(f"unknown estimator '{estimator}'", f"choose one of {', '.join(get_args(Estimator))}")
    device = resolve_hardware(hardware, file=hardware_file, machine=machine, bandwidth_gb_s=bandwidth_gb_s, compute=compute)
    inventory = read_inventory(model, layers=layers, kv_heads=kv_heads, head_dim=head_dim)
    outline = outline_of(inventory)
    steps = [examine(device, outline, point) for text in measured for point in read_measured(text)]
    used = [step.measured for step in steps if step.used]
    points = _points(device, estimator, used or [step.measured for step in steps], schemes, phases, kv, batches, contexts)
    warnings = [f"{step.problem}" for step in steps if step.problem]
    if inventory.quantized_as:
        warnings.append(
            f"the configuration says that its weights are stored as {inventory.quantized_as}; predicted is each scheme named here"
        )
    if runtime is not None and runtime not in known_runtimes():
        raise UsageError(f"nothing is known of the runtime '{runtime}'", f"choose one of {', '.join(known_runtimes())}, or leave it out")
    prior = prior_of_device(device, runtime)
    answer = _by_bandwidth if estimator == "bandwidth" else _by_model
    results = PredictResults(
        model=PredictedModel(
            name=inventory.name,
            parameters=inventory.parameters,
            active_parameters=inventory.active_parameters,
            kv_bytes_per_token=inventory.kv_bytes_per_token(),
            operators_per_step=outline.operators,
            assumed=list(outline.assumed),
        ),
        hardware=device.name,
        bandwidth_gb_s=device.bandwidth_gb_s,
        estimator=cast(Estimator, estimator),
        predictions=[],
        measured=steps,
        warnings=warnings,
    )
    return _rounded(answer(results, device, outline, used, points, prior))


def resolve_hardware(
    name: str,
    *,
    file: Path | None = None,
    machine: Path | None = None,
    bandwidth_gb_s: float | None = None,
    compute: str = "exact",
) -> Hardware:
    """A device by name, or this machine: measured now, or as `fewbit bench --machine --json` wrote it.

    Args:
        name, file, bandwidth_gb_s: as in `predict.hardware.get_hardware`.
        machine, compute: as in `predict_model`.

    Raises:
        UsageError: no such device, a file that is no measurement of a machine, or an unknown compute mode.
    """
    if compute not in ("exact", "int8-activations"):
        raise UsageError(f"unknown compute mode '{compute}'", "choose exact or int8-activations")
    if name.strip().lower() != "this-machine":
        if machine is not None:
            raise UsageError(f"a measured machine was given beside --hardware {name}", "write --hardware this-machine")
        if compute != "exact":
            raise UsageError(f"--compute {compute} names CPU kernels, beside --hardware {name}", "write --hardware this-machine")
        return get_hardware(name, bandwidth_gb_s=bandwidth_gb_s, file=file)
    if machine is None:
        from fewbit.workflows.bench import bench_machine  # torch, which no data sheet needs

        result = bench_machine()
    else:
        try:
            result = TypeAdapter(MachineResult).validate_json(machine.read_bytes())
        except (OSError, ValidationError) as error:
            raise UsageError(
                f"'{machine}' is no measurement of a machine: {str(error).splitlines()[0]}", "fewbit bench --machine --json"
            ) from error
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = measured_hardware(result, memory, compute=compute)
    return device if bandwidth_gb_s is None else replace(device, bandwidth_gb_s=bandwidth_gb_s)


def _points(
    device: Hardware,
    estimator: str,
    measured: Sequence[MeasuredPoint],
    schemes: Sequence[str],
    phases: Sequence[str],
    kv: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
) -> list[StepPoint]:
    """Every combination that was asked for; what was not asked for is as it was measured."""
    unknown = [phase for phase in phases if phase not in get_args(Phase)]
    if unknown:
        raise UsageError(f"unknown phase '{unknown[0]}'", f"choose {' or '.join(get_args(Phase))}")
    names = [scheme_name(name) for name in schemes] or [*_SCHEMES, *(_natives(device) if estimator == "model" else ())]
    points: list[StepPoint] = []
    for phase in dict.fromkeys(phases or [one.point.phase for one in measured] or ["decode"]):
        like = next((one.point for one in measured if one.point.phase == phase), StepPoint(cast(Phase, phase), context=_CONTEXT))
        grid = itertools.product(kv or [like.kv], batches or [like.batch], contexts or [like.context], names)
        points += [StepPoint(like.phase, name, cache.upper(), batch, context) for cache, batch, context, name in grid]
    if len(points) > _MOST_POINTS:
        raise UsageError(f"{len(points):,} steps are too many for one answer", f"ask for at most {_MOST_POINTS:,}")
    return points


def _natives(device: Hardware) -> list[str]:
    schemes = [get_scheme(name) for name in _NATIVE_SCHEMES]
    return [scheme.name for scheme in schemes if choose_path(scheme, device) == "native" and device.multiplies(compute_format(scheme))]


def _by_bandwidth(
    results: PredictResults,
    device: Hardware,
    outline: Outline,
    used: Sequence[MeasuredPoint],
    points: Sequence[StepPoint],
    prior: Prior,
) -> PredictResults:
    if results.measured and not used:
        raise UsageError("; ".join(results.warnings), "give a time that the bandwidth allows, or the bandwidth with --bandwidth")
    return replace(
        results,
        predictions=[predict_by_bandwidth(device, outline, point, used) for point in points],
        calibration_scale=bandwidth_scale(device, outline, used),
        warnings=[*results.warnings, *_by_bandwidth_warnings(used)],
    )


def _by_bandwidth_warnings(used: Sequence[MeasuredPoint]) -> list[str]:
    text = "the estimate from bytes alone is optimistic: the intervals are what published measurements took over it"
    return [text] if used else [text, "nothing was measured: these times are floors, not predictions"]


def _by_model(
    results: PredictResults,
    device: Hardware,
    outline: Outline,
    used: Sequence[MeasuredPoint],
    points: Sequence[StepPoint],
    prior: Prior,
) -> PredictResults:
    predictor = Predictor(device, outline, used, prior=prior)
    predictions = [predictor.predict(point) for point in points]
    bounds = [line for point in _one_per_scheme(points) for line in bounds_along_batch(predictor, point)]
    return replace(
        results,
        predictions=predictions,
        calibration_scale=predictor.scale(),
        dense_tflop_s=dict(device.dense_tflop_s),
        factors=_factors(predictor),
        bounds=bounds,
        conclusions=conclusions(predictor, predictions, results.measured),
        suggestion=_suggest(predictor, points),
        warnings=[*results.warnings, *predictor.warnings()],
    )


def _one_per_scheme(points: Sequence[StepPoint]) -> list[StepPoint]:
    decode = [point for point in points if point.phase == "decode"]
    return list({(point.scheme, point.context): point for point in decode if point.context == decode[0].context}.values())


def _factors(predictor: Predictor) -> dict[str, Estimate]:
    means, spread = predictor.posterior.mean, predictor.posterior.covariance.diagonal() ** 0.5
    return {
        name: Estimate(math.exp(mean), math.exp(mean - Z90 * sd), math.exp(mean + Z90 * sd))
        for name, mean, sd in zip(FACTORS, means, spread, strict=True)
    }


def _suggest(predictor: Predictor, points: Sequence[StepPoint]) -> Suggestion | None:
    """For the first kind of step that was asked for: the choice among its schemes."""
    first = points[0]
    same = [p for p in points if (p.phase, p.batch, p.context) == (first.phase, first.batch, first.context)]
    suggestion = predictor.next_measurement(same)
    if suggestion is None:
        return None
    words = f'--measured "{step_name(suggestion.point)} ... ms"'
    return replace(suggestion, command=f"measure it on the device, then add {words}")


def _rounded(results: PredictResults) -> PredictResults:
    """Two decimals for the bandwidth estimator and for the scale; four significant digits and at least two decimals for the model."""
    document = TypeAdapter(PredictResults).dump_python(results)
    exact = ("measured", "model", "bandwidth_gb_s")
    digits = 0 if results.estimator == "bandwidth" else 4
    rounded = {key: value if key in exact else _round(value, digits) for key, value in document.items()}
    if results.calibration_scale is not None:
        rounded["calibration_scale"] = round(results.calibration_scale, 2)
    return TypeAdapter(PredictResults).validate_python(rounded)


def _round(value: Any, digits: int) -> Any:
    if isinstance(value, dict):
        return {key: _round(one, digits) for key, one in value.items()}
    if isinstance(value, list):
        return [_round(one, digits) for one in value]
    if not isinstance(value, float) or value == 0:
        return value
    return round(value, max(2, digits - 1 - math.floor(math.log10(abs(value))))) if digits else round(value, 2)
