"""Whether one candidate is faster than another for practical purposes: the one question on which every choice turns."""

from __future__ import annotations

from typing import Literal

from fewbit.decide.candidates import Option, Situation
from fewbit.decide.timing import compare_times

__all__ = ["MIN_CACHE_GAIN", "MIN_GAIN", "relation"]

MIN_GAIN = 1.10  # less is not worth a checkpoint that has to be made, checked and kept
MIN_CACHE_GAIN = 1.05  # a quantized cache beside the same weights is an option of the runtime


def relation(slow: Option, fast: Option, situation: Situation, least: float | None = None) -> Literal["faster", "equal", "unknown"]:
    """Whether the second is clearly and worthwhile faster than the first, as fast for practical purposes, or not to be told apart yet.

    Args:
        least: ratio that is worthwhile; `MIN_GAIN`, or `MIN_CACHE_GAIN` between candidates of the same weights, when None.
    """
    ratio = compare_times(slow.objective, fast.objective, situation.posterior)
    if ratio.value < (least or (MIN_CACHE_GAIN if slow.scheme == fast.scheme else MIN_GAIN)):
        return "equal"
    return "faster" if ratio.low > 1.0 else "unknown"
