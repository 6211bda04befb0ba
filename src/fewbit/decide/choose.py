"""The choice among candidates, the reasons, and what to measure next.

1. Feasible: it fits in memory, something runs it, it keeps the limits, and its quality passes with `quality.CONFIDENCE`.
2. Fastest: the feasible candidate with the least time of the workload's goal.
3. Another feasible one with less expected loss is preferred unless the fastest is *clearly* faster: the 90 % interval of the ratio of their
   times lies above 1, and the ratio is at least `relation.MIN_GAIN`. Less than that is not worth a checkpoint of its own; a quantized cache
   beside the same weights is an option of the runtime and no checkpoint, for which `MIN_CACHE_GAIN` is enough. BF16 loses nothing, so
   "do not quantize" is what remains when nothing is clearly faster than it.
4. Where the ratio is at least that large and its interval still contains 1, nobody knows: the answer is to abstain, with the measurement
   that would tell.

Nothing here knows a device or a format by name; what is known about both comes in as bytes, rates, paths and losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fewbit.decide.candidates import Option, Situation, candidate_time, list_options
from fewbit.decide.decision import Candidate, CandidateTime, Cell, Status, Verdict
from fewbit.decide.next_measurement import next_measurement
from fewbit.decide.quality import CONFIDENCE
from fewbit.decide.reasons import abstain_reason, binding_constraint, choice_reason, infeasible_reason, rejection_reason
from fewbit.decide.relation import relation
from fewbit.decide.timing import compare_times
from fewbit.predict.prediction import Estimate

__all__ = ["decide_cell", "limit_obstacle", "pareto_front"]


def decide_cell(situation: Situation) -> Cell:
    """The decision for one model on one device."""
    options = list_options(situation)
    base = options[0]
    acceptable = [one for one in options if not limit_obstacle(one) and not _time_obstacle(one, situation)]
    fastest = min(acceptable, key=lambda one: one.objective.milliseconds, default=None)
    chosen, undecided = _choose(fastest, acceptable, situation) if fastest is not None else (None, [])
    quantized = chosen is not None and (chosen.scheme.weights is not None or chosen.cached is not None)
    verdict: Verdict = "not feasible" if chosen is None else "abstain" if undecided else "quantize" if quantized else "do not quantize"
    pareto = pareto_front([one for one in options if one.memory.fits and one.batch is not None])
    times = {one.name: candidate_time(one, base, situation) for one in options}
    candidates = [_candidate(one, times[one.name], situation, chosen, undecided, one in acceptable, one in pareto) for one in options]
    blocked = [one for one in options if one.batch is not None and one.memory.fits and one not in acceptable]
    reason = (
        infeasible_reason(options, situation)
        if chosen is None
        else abstain_reason(chosen, undecided, situation)
        if undecided
        else choice_reason(chosen, base, times[chosen.name], situation)
    )
    cell = Cell(
        model=situation.inventory.name,
        parameters=situation.inventory.parameters,
        hardware=situation.hardware.name,
        label=situation.hardware.label,
        verdict=verdict,
        choice=None if chosen is None else chosen.name,
        between=[one.name for one in (chosen, *undecided) if one is not None] if undecided else [],
        binding=binding_constraint(chosen, base, blocked, situation),
        reason=reason,
        pareto=[one.name for one in pareto],
        candidates=candidates,
        next_measurement=None,
        calibrated_from=len(situation.predictor.measured),
        price_per_hour=situation.price_per_hour,
        notes=_notes(situation),
    )
    return replace(cell, next_measurement=next_measurement(chosen, undecided, acceptable, blocked, situation))


def limit_obstacle(option: Option) -> Literal["", "runtime", "memory", "quality"]:
    """What stands in a candidate's way apart from time; empty when nothing does."""
    if option.batch is None:
        return "runtime"
    if not option.memory.fits:
        return "memory"
    return "" if option.quality.verdict == "pass" else "quality"


def _time_obstacle(option: Option, situation: Situation) -> str:
    """The limit of time that a candidate does not keep with enough confidence; empty when it keeps all."""
    limits = situation.workload.limits
    assert option.first is not None and option.step is not None
    if limits.max_ttft_ms is not None and option.first.probability_within(limits.max_ttft_ms) < CONFIDENCE:
        return "time to the first token"
    if limits.max_ms_per_token is not None and option.step.probability_within(limits.max_ms_per_token) < CONFIDENCE:
        return "time per token"
    return ""


def _loss(option: Option) -> float:
    return option.quality.loss_percent.value


def _choose(fastest: Option, acceptable: Sequence[Option], situation: Situation) -> tuple[Option, list[Option]]:
    """The choice, and the candidates with less loss that may be as fast as it."""
    better = sorted((one for one in acceptable if _loss(one) < _loss(fastest)), key=_loss)
    chosen = next((one for one in better if relation(one, fastest, situation) == "equal"), fastest)
    undecided = [one for one in better if _loss(one) < _loss(chosen) and relation(one, chosen, situation) == "unknown"]
    return chosen, undecided


def pareto_front(options: Sequence[Option]) -> list[Option]:
    """Those that no other one beats in time, memory and expected loss at once."""

    def figures(one: Option) -> tuple[float, float, float]:
        return one.objective.milliseconds, one.memory.total_bytes, _loss(one)

    def beaten(one: Option) -> bool:
        mine = figures(one)
        return any(
            figures(other) != mine and all(theirs <= own for theirs, own in zip(figures(other), mine, strict=True)) for other in options
        )

    return [one for one in options if not beaten(one)]


def _candidate(
    option: Option,
    time: CandidateTime | None,
    situation: Situation,
    chosen: Option | None,
    undecided: Sequence[Option],
    acceptable: bool,
    on_front: bool,
) -> Candidate:
    status: Status = "chosen" if option is chosen else "undecided" if option in undecided else "rejected"
    ratio: Estimate | None = None
    if acceptable and chosen is not None and option is not chosen:
        ratio = compare_times(option.objective, chosen.objective, situation.posterior)
    obstacle = limit_obstacle(option) or _time_obstacle(option, situation)
    serving = option.serving
    return Candidate(
        name=option.name,
        weights=option.scheme.name,
        kv_cache="BF16" if option.cached is None else option.cached.name,
        runtime=serving.runtime if serving else "",
        kernel=serving.kernel if serving else "",
        path=serving.path if serving else "unfused",
        cache_option=option.cache_option,
        command=option.command,
        memory=option.memory,
        quality=option.quality,
        time=time,
        status=status,
        acceptable=acceptable,
        pareto=on_front,
        reason=rejection_reason(option, status, obstacle, ratio, chosen, situation),
        fallback=serving.fallback if serving else "",
    )


def _notes(situation: Situation) -> list[str]:
    notes = [*situation.outline.assumed, *situation.predictor.warnings()]
    inventory, workload = situation.inventory, situation.workload
    if inventory.max_context is not None and workload.context > inventory.max_context:
        notes.append(f"{workload.context:,} tokens are beyond the {inventory.max_context:,} that the model's positions reach")
    if not situation.predictor.measured:
        notes.append("nothing was measured on this device: times rest on what its class of devices usually reaches")
    return notes
