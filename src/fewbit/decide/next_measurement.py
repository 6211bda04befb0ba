"""The measurement that would change or settle the decision most.

Times that cannot be told apart come first; then a format that is clearly faster than the choice and waits for its quality; then the
quality of the choice itself, when it rests on a prior; else the time that narrows choice against runner-up most.
"""

from __future__ import annotations

from collections.abc import Sequence

from fewbit.decide.candidates import Option, Situation
from fewbit.decide.decision import NextMeasurement
from fewbit.decide.relation import MIN_GAIN
from fewbit.decide.timing import compare_times
from fewbit.predict.prediction import StepPoint

__all__ = ["next_measurement"]


def next_measurement(
    chosen: Option | None, undecided: Sequence[Option], acceptable: Sequence[Option], blocked: Sequence[Option], situation: Situation
) -> NextMeasurement | None:
    """What to measure next; None when nothing that can be measured would change the answer.

    Args:
        blocked: candidates that fit and run and still are not acceptable.
    """
    waiting = [one for one in blocked if one.quality.verdict == "unknown"]
    if chosen is None:
        best = max(waiting, key=lambda one: one.quality.probability, default=None)
        return None if best is None else _quality(best, f"nothing else is left that could pass: {best.name} may", situation)
    promising = [(compare_times(chosen.objective, one.objective, situation.posterior), one) for one in waiting]
    faster = [(ratio.value, one) for ratio, one in promising if ratio.low > 1.0 and ratio.value >= MIN_GAIN]
    if undecided:
        return _time([chosen, undecided[0]], situation)
    if faster:
        gain, best = max(faster, key=lambda pair: pair[0] * pair[1].quality.probability)
        reason = (
            f"{best.name} is predicted {gain:.2f}x as fast as {chosen.name} and passes with a probability of {best.quality.probability:.0%}"
        )
        return _quality(best, reason, situation)
    if not chosen.quality.measured:
        return _quality(chosen, f"{chosen.name} was chosen on a prior of its loss", situation)
    others = sorted((one for one in acceptable if one is not chosen), key=lambda one: one.objective.milliseconds)
    return _time([chosen, *others[:1]], situation)


def _quality(option: Option, reason: str, situation: Situation) -> NextMeasurement:
    names = [
        name
        for name, used in ((option.scheme.name, option.scheme.weights), (option.cached.name if option.cached else "", option.cached))
        if used
    ]
    variants = ",".join(["bf16", *(name.lower() for name in names)])
    command = f"fewbit compare {situation.model} --variants {variants} --max-tokens 0 --out results/quality"
    return NextMeasurement("quality", f"the quality of {option.name}", reason, f"{command}   (then decide --quality results/quality)")


def _time(options: Sequence[Option], situation: Situation) -> NextMeasurement | None:
    workload = situation.workload
    prefill = workload.goal == "throughput" and _prefill_share(options[0], workload.new_tokens) > 0.5
    points = []
    for one in options:
        cache = "BF16" if one.cached is None else one.cached.name
        path = one.serving.path if one.serving else None
        if prefill:
            points.append(StepPoint("prefill", one.scheme.name, cache, workload.batch, workload.prompt, path))
        else:
            points.append(StepPoint("decode", one.scheme.name, cache, workload.batch, workload.mean_context, path))
    suggestion = situation.predictor.next_measurement(points)
    if suggestion is None:
        return None
    point = suggestion.point
    text = f"{point.scheme.lower()} {point.phase} batch {point.batch} context {point.context}"
    if point.kv != "BF16":
        text += f" kv {point.kv.lower()}"
    what = f"the {point.phase} time of {point.scheme} with a {point.kv} cache at batch {point.batch} and {point.context} tokens"
    return NextMeasurement("time", what, suggestion.reason, f'time it on the device, then add --measured "{text} ... ms"')


def _prefill_share(option: Option, new_tokens: int) -> float:
    assert option.step is not None
    return 1 - new_tokens * option.step.milliseconds / option.objective.milliseconds
