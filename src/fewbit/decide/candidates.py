"""Everything that could be deployed, with what is known of each: memory, what runs it, times, quality. Nothing is chosen here.

Weights in BF16, FP8, INT8 with and without INT8 inputs, INT4, 4-bit floats, 2 bits, and whatever else was measured; each with a cache of
16, 8 and 4 bits. The 8-bit cache is the one that the runtime has: FP8 where it has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewbit.decide.decision import CandidateMemory, CandidateTime
from fewbit.decide.memory import largest_batch, memory_need
from fewbit.decide.produce import produce_command
from fewbit.decide.quality import MeasuredQuality, Quality, estimate_quality
from fewbit.decide.serving import Serving, serving_of, serving_with_cache
from fewbit.decide.timing import Timed, compare_times, time_of
from fewbit.decide.workload import Workload
from fewbit.errors import FormatError
from fewbit.formats.spec import Scheme, get_scheme
from fewbit.models.inventory import Inventory
from fewbit.predict.calibration import Posterior
from fewbit.predict.efficiency import prior_of_device
from fewbit.predict.hardware import Hardware
from fewbit.predict.outline import Outline, outline_of
from fewbit.predict.prediction import Estimate, MeasuredPoint, StepPoint
from fewbit.predict.predictor import Predictor
from fewbit.predict.step import Work, choose_path, compute_format, step_work

__all__ = ["CANDIDATE_WEIGHTS", "Option", "Situation", "candidate_time", "list_options", "situation_of"]

CANDIDATE_WEIGHTS = ("BF16", "FP8", "W8A8", "W8A16", "W4A16", "NVFP4", "MXFP4", "W2A16")
_EIGHT_BIT_CACHES = ("KV-FP8", "KV-INT8")
_FOUR_BIT_CACHE = "KV-INT4"


@dataclass(frozen=True)
class Situation:
    """One model on one device under one workload; `runtime` is the only one that may be used, any when empty."""

    inventory: Inventory
    model: str
    hardware: Hardware
    workload: Workload
    outline: Outline
    predictor: Predictor
    measured: tuple[MeasuredQuality, ...] = ()
    price_per_hour: float | None = None
    runtime: str = ""

    @property
    def posterior(self) -> Posterior:
        """The device's factors."""
        return self.predictor.posterior


@dataclass(frozen=True)
class Option:
    """A candidate before the choice.

    Attributes:
        serving: what runs it; None when no runtime is known, `obstacle` says why, and times are missing.
        first, step, request, batch: times of one prompt, a decode step, one request and the whole batch.
    """

    scheme: Scheme
    cached: Scheme | None
    serving: Serving | None
    cache_option: str
    command: str
    memory: CandidateMemory
    quality: Quality
    obstacle: str = ""
    first: Timed | None = None
    step: Timed | None = None
    request: Timed | None = None
    batch: Timed | None = None
    goal: str = "throughput"

    @property
    def name(self) -> str:
        """For people."""
        return self.scheme.name if self.cached is None else f"{self.scheme.name} + {self.cached.name}"

    @property
    def objective(self) -> Timed:
        """The time that the goal makes small."""
        timed = self.request if self.goal == "latency" else self.batch
        assert timed is not None
        return timed


def situation_of(
    inventory: Inventory,
    model: str,
    hardware: Hardware,
    workload: Workload,
    *,
    points: Sequence[MeasuredPoint] = (),
    measured: Sequence[MeasuredQuality] = (),
    price_per_hour: float | None = None,
    runtime: str = "",
) -> Situation:
    """A situation with its predictor, calibrated with `points`, which are of this model on this device.

    Args:
        runtime: the only one that may be used; its overheads and kernels count where they are known apart.
    """
    outline = outline_of(inventory)
    prior = prior_of_device(hardware, runtime.lower()) if runtime else None
    predictor = Predictor(hardware, outline, points, prior=prior)
    return Situation(inventory, model, hardware, workload, outline, predictor, tuple(measured), price_per_hour, runtime)


def list_options(situation: Situation) -> list[Option]:
    """Every candidate, those with fewest bits last."""
    names = list(CANDIDATE_WEIGHTS)
    names += [one.scheme for one in situation.measured if one.scheme not in names and get_scheme(one.scheme).weights is not None]
    options = []
    for name in dict.fromkeys(names):
        scheme = get_scheme(name)
        options += [_option(situation, scheme, cached) for cached in _caches(situation, scheme)]
    return options


def _caches(situation: Situation, scheme: Scheme) -> list[Scheme | None]:
    if not situation.inventory.kv:
        return [None]
    eights = [get_scheme(name) for name in _EIGHT_BIT_CACHES]
    eight = next((one for one in eights if serving_with_cache(scheme, one, situation.hardware, situation.runtime) is not None), eights[1])
    return [None, eight, get_scheme(_FOUR_BIT_CACHE)]


def _option(situation: Situation, scheme: Scheme, cached: Scheme | None) -> Option:
    hardware, workload, inventory = situation.hardware, situation.workload, situation.inventory
    quality = estimate_quality(scheme, cached, inventory.parameters, workload.limits.max_quality_loss_percent, situation.measured)
    found = serving_with_cache(scheme, cached, hardware, situation.runtime)
    serving, option = found if found is not None else (None, "")
    obstacle = _obstacle(scheme, cached, serving, situation)
    try:
        memory = _memory(situation, scheme, cached)
        command = produce_command(situation.model, scheme, serving or serving_of(scheme, hardware), option)
    except FormatError as error:  # a group that does not divide a linear: the candidate does not exist for this model
        memory = _memory(situation, get_scheme("BF16"), cached)
        return Option(scheme, cached, None, "", "", memory, quality, obstacle=error.args[0] if error.args else str(error))
    base = Option(scheme, cached, serving if not obstacle else None, option, command, memory, quality, obstacle, goal=workload.goal)
    if obstacle or serving is None:
        return base
    return _timed(base, situation, serving)


def _obstacle(scheme: Scheme, cached: Scheme | None, serving: Serving | None, situation: Situation) -> str:
    """Why nothing runs a candidate; empty when something does."""
    hardware = situation.hardware
    if serving is None:
        what = scheme.name if cached is None else f"{scheme.name} with a {cached.name} cache"
        if situation.runtime:
            return f"{situation.runtime} is not known to run {what} on this device"
        return f"no runtime is known that runs {what} on this device"
    fp4 = scheme.weights is not None and scheme.weights.grid_name == "fp4_e2m1"
    if fp4 and serving.path != "native":
        if hardware.multiplies("fp4"):
            return f"no runtime is known that multiplies {scheme.name} natively with this cache on {hardware.label}"
        return f"{hardware.label} has no 4-bit matrix units: {scheme.name} would be unpacked like W4A16, with a larger error"
    return ""


def _memory(situation: Situation, scheme: Scheme, cached: Scheme | None) -> CandidateMemory:
    inventory, workload, hardware = situation.inventory, situation.workload, situation.hardware
    need = memory_need(inventory, scheme, cached, hardware, batch=workload.batch, context=workload.context, prompt=workload.prompt)
    return CandidateMemory(
        weights_bytes=need.weights,
        cache_bytes=need.cache,
        workspace_bytes=need.workspace,
        reserved_bytes=need.reserved,
        total_bytes=need.total,
        capacity_bytes=need.capacity,
        fits=need.fits,
        largest_batch=largest_batch(inventory, scheme, cached, hardware, workload.context),
    )


def _timed(option: Option, situation: Situation, serving: Serving) -> Option:
    workload, hardware = situation.workload, situation.hardware
    path = serving.path
    if path == "native" and compute_format(option.scheme) == "bf16":
        path = "fused"
    path = choose_path(option.scheme, hardware, path)
    cache_name = "BF16" if option.cached is None else option.cached.name

    def work(phase: str, batch: int, context: int) -> list[Work]:
        point = StepPoint("prefill" if phase == "prefill" else "decode", option.scheme.name, cache_name, batch, context, path)
        return step_work(situation.outline, point, path)

    one_prompt, all_prompts = work("prefill", 1, workload.prompt), work("prefill", workload.batch, workload.prompt)
    step = work("decode", workload.batch, workload.mean_context)
    answers = float(workload.new_tokens)

    def timed(*steps: tuple[float, list[Work]]) -> Timed:
        return time_of(steps, hardware, situation.posterior)

    return Option(
        **{
            **option.__dict__,
            "first": timed((1.0, one_prompt)),
            "step": timed((1.0, step)),
            "request": timed((1.0, one_prompt), (answers, step)),
            "batch": timed((1.0, all_prompts), (answers, step)),
        }
    )


def candidate_time(option: Option, base: Option, situation: Situation) -> CandidateTime | None:
    """The times of an option for people and JSON; None where nothing runs it.

    Args:
        base: BF16 with a BF16 cache.
    """
    if option.first is None or option.step is None or option.request is None or option.batch is None:
        return None
    workload = situation.workload
    tokens = 1e3 * workload.batch * workload.new_tokens
    batch = option.batch.estimate
    shares = option.objective.shares()
    seconds = 1e6 * batch.value / tokens
    price = situation.price_per_hour
    return CandidateTime(
        ttft_ms=option.first.estimate,
        ms_per_token=option.step.estimate,
        request_ms=option.request.estimate,
        tokens_per_s=Estimate(tokens / batch.value, tokens / batch.high, tokens / batch.low),
        objective_ms=option.objective.estimate,
        speedup_over_bf16=compare_times(base.objective, option.objective, situation.posterior),
        bound=max(shares, key=shares.__getitem__),
        device_s_per_million_tokens=seconds,
        cost_per_million_tokens=None if price is None else price * seconds / 3600,
    )
