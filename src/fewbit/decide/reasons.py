"""Why: sentences that a person can repeat, each made from the figures that decided."""

from __future__ import annotations

from collections.abc import Sequence

from fewbit.decide.candidates import Option, Situation
from fewbit.decide.decision import CandidateTime, Status
from fewbit.decide.relation import MIN_GAIN, relation
from fewbit.decide.timing import compare_times
from fewbit.predict.prediction import Estimate

__all__ = ["abstain_reason", "binding_constraint", "choice_reason", "infeasible_reason", "rejection_reason"]

_GOALS = {"latency": "a request", "throughput": "the batch"}


def _gb(value: float) -> str:
    return f"{value / 1e9:.3g} GB"


def _times(ratio: Estimate) -> str:
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _loss(option: Option) -> str:
    quality = option.quality
    loss = quality.loss_percent
    if loss.value == 0.0:
        return "no loss"
    if quality.measured:
        return f"{loss.value:+.2f} % perplexity, measured"
    return f"about {loss.value:+.1f} % perplexity [{loss.low:+.1f}, {loss.high:+.1f}], not measured"


def binding_constraint(chosen: Option | None, base: Option, blocked: Sequence[Option], situation: Situation) -> str:
    """What decided: the first of memory, latency and quality without which the choice would differ, else what bounds the workload."""
    if chosen is None:
        return "memory" if not blocked else "quality" if all(one.quality.verdict != "pass" for one in blocked) else "latency"
    if not base.memory.fits:
        return "memory"
    limits = situation.workload.limits
    first, step = base.first, base.step
    if first is not None and step is not None:
        late = limits.max_ttft_ms is not None and first.probability_within(limits.max_ttft_ms) < 0.5
        late = late or (limits.max_ms_per_token is not None and step.probability_within(limits.max_ms_per_token) < 0.5)
        if late:
            return "latency"
    shares = base.objective.shares()
    bound = max(shares, key=shares.__getitem__)
    if chosen is base and bound == "overhead":
        return bound
    waiting = [one for one in blocked if one.quality.verdict != "pass"]
    return "quality" if any(relation(chosen, one, situation, MIN_GAIN) == "faster" for one in waiting) else bound


def choice_reason(chosen: Option, base: Option, time: CandidateTime | None, situation: Situation) -> str:
    """One sentence for a choice."""
    workload, hardware = situation.workload, situation.hardware
    assert chosen.step is not None and chosen.first is not None and time is not None
    decode = workload.new_tokens * chosen.step.milliseconds / (chosen.objective.milliseconds)
    shares = base.objective.shares()
    bound = max(shares, key=shares.__getitem__)
    if chosen is base:
        why = {
            "overhead": "most of the time is launches and framework, which no format shortens",
            "bandwidth": "what would be faster loses too much or cannot be told apart",
            "compute": "the products are what takes time, and no format that passes multiplies clearly faster",
        }[bound]
        return (
            f"BF16 fits in {_gb(chosen.memory.total_bytes)} of {_gb(chosen.memory.capacity_bytes)}, and nothing is clearly faster: {why}."
        )
    head = f"{chosen.name} takes {_gb(chosen.memory.total_bytes)} of the {_gb(chosen.memory.capacity_bytes)} on {hardware.label}"
    speed = f"so it is {_times(time.speedup_over_bf16)} as fast as BF16"
    if not base.memory.fits:
        head += f", where BF16 would need {_gb(base.memory.total_bytes)}"
        speed = f"{_times(time.speedup_over_bf16)} as fast as BF16 would be if it fitted"
    return f"{head}; {_where(decode, chosen, workload.goal)}, {speed}, with {_loss(chosen)}."


def _where(decode: float, chosen: Option, goal: str) -> str:
    assert chosen.step is not None and chosen.first is not None
    path = chosen.serving.path if chosen.serving else ""
    if decode >= 0.5:
        bound = chosen.step.steps[0].bound
        read = sum(work.weight_bytes + work.cache_bytes for _, works in chosen.step.works for work in works)
        gain = {
            "bandwidth": f"a step reads {_gb(read)} of weights and cache",
            "overhead": f"a step reads only {_gb(read)}, the rest is launches",
            "compute": f"its products run {'in the format itself' if path == 'native' else 'in 16 bit'}",
        }[bound]
        return f"decode is {decode:.0%} of {_GOALS[goal]} and {bound}-bound, {gain}"
    how = "its products run in the format itself" if path == "native" else "its products still run in 16 bit"
    return f"prefill is {1 - decode:.0%} of {_GOALS[goal]} and {how}"


def abstain_reason(chosen: Option, undecided: Sequence[Option], situation: Situation) -> str:
    """One sentence for an abstention."""
    other = undecided[0]
    ratio = compare_times(other.objective, chosen.objective, situation.posterior)
    return (
        f"{chosen.name} is predicted {_times(ratio)} as fast as {other.name}, which loses less: the interval contains 1, so the "
        f"measurement below decides; until then {chosen.name} is the guess."
    )


def infeasible_reason(options: Sequence[Option], situation: Situation) -> str:
    """Why nothing can be deployed."""
    workload, label = situation.workload, situation.hardware.label
    running = [one for one in options if one.batch is not None]
    fitting = [one for one in running if one.memory.fits]
    smallest = min(running or options, key=lambda one: one.memory.total_bytes)
    if not fitting:
        batch = smallest.memory.largest_batch
        less = f"; {batch:,} sequences of {workload.context:,} tokens would fit" if batch else ""
        if batch == 0:
            less = f"; not even one sequence of {workload.context:,} tokens fits"
        need, capacity = smallest.memory.total_bytes, smallest.memory.capacity_bytes
        return f"Nothing fits on {label}: the smallest, {smallest.name}, needs {_gb(need)} of {_gb(capacity)}{less}."
    passing = [one for one in fitting if one.quality.verdict == "pass"]
    if not passing:
        best = min(fitting, key=lambda one: one.quality.loss_percent.value)
        limit = workload.limits.max_quality_loss_percent
        return (
            f"What fits on {label} does not surely stay within {limit:g} % of perplexity: the best, {best.name}, loses {_loss(best)} "
            f"(within the limit with a probability of {best.quality.probability:.0%})."
        )
    return _too_slow(passing, situation)


def _too_slow(passing: Sequence[Option], situation: Situation) -> str:
    limits = situation.workload.limits
    sentences = []
    for what, limit, timed in (
        ("the first token", limits.max_ttft_ms, [one.first for one in passing]),
        ("a token", limits.max_ms_per_token, [one.step for one in passing]),
    ):
        known = [one for one in timed if one is not None]
        if limit is None or not known:
            continue
        fastest = min(known, key=lambda one: one.milliseconds)
        floor = min(one.floor_milliseconds for one in known)
        hopeless = " even at the data sheet's full rates" if floor > limit else ""
        interval = fastest.estimate
        if fastest.probability_within(limit) < 1.0:
            sentences.append(
                f"{what} within {limit:g} ms cannot be counted on{hopeless}: the fastest takes "
                f"{interval.value:.3g} ms [{interval.low:.3g}, {interval.high:.3g}], and no software less than {floor:.3g} ms"
            )
    text = "; ".join(sentences) or "no single candidate keeps both limits of time"
    return f"On {situation.hardware.label}, {text}."


def rejection_reason(
    option: Option, status: Status, obstacle: str, ratio: Estimate | None, chosen: Option | None, situation: Situation
) -> str:
    """Why a candidate was not chosen; for the chosen one, what it has.

    Args:
        obstacle: of `choose.limit_obstacle`, or the limit of time that it breaks. ratio: its time over the choice's.
    """
    limits = situation.workload.limits
    if obstacle == "runtime":
        return option.obstacle
    if obstacle == "memory":
        return f"does not fit: needs {_gb(option.memory.total_bytes)} of {_gb(option.memory.capacity_bytes)}"
    if obstacle == "quality":
        return _quality_reason(option, limits.max_quality_loss_percent)
    if obstacle:
        timed, limit = (option.first, limits.max_ttft_ms) if "first" in obstacle else (option.step, limits.max_ms_per_token)
        assert timed is not None and limit is not None
        interval = timed.estimate
        sure = "breaks the limit" if interval.low > limit else "may break the limit"
        return f"{sure}: {obstacle} {interval.value:.3g} ms [{interval.low:.3g}, {interval.high:.3g}], allowed {limit:g}"
    if status == "chosen" or ratio is None or chosen is None:
        return f"passes: {_loss(option)}"
    if status == "undecided":
        return f"may be as fast: {chosen.name} is {_times(ratio)} as fast, and that interval contains 1"
    if ratio.value < 1.0:
        return f"{1 / ratio.value:.2f}x as fast as {chosen.name}, not worth its loss: {_loss(option)}"
    if option.quality.loss_percent.value > chosen.quality.loss_percent.value:
        return f"no faster than {chosen.name} ({1 / ratio.value:.2f}x), and loses more: {_loss(option)}"
    return f"slower: {chosen.name} is {_times(ratio)} as fast"


def _quality_reason(option: Option, limit: float) -> str:
    quality = option.quality
    loss = quality.loss_percent
    if quality.measured and quality.verdict == "fail":
        return f"fails in quality: {loss.value:+.2f} % perplexity, measured, allowed {limit:g} %"
    if quality.verdict == "fail":
        return f"expected to fail in quality: {_loss(option)}, allowed {limit:g} %"
    return f"quality unknown: {_loss(option)}; within {limit:g} % with a probability of {quality.probability:.0%}: measure it first"
