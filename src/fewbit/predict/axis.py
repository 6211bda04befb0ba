"""Where decode turns from one bound to another as the batch grows.

One sequence reads every weight for one product per weight; a batch reads them once for all. The bytes of the weights stay, the operations
grow, and from some batch on operations are what takes the time. Small models on fast devices start below that: launches take the time.
"""

from __future__ import annotations

from dataclasses import replace

from fewbit.predict.prediction import StepPoint
from fewbit.predict.predictor import Predictor
from fewbit.results import Bound

__all__ = ["LARGEST_BATCH", "bounds_along_batch", "turning_points"]

LARGEST_BATCH = 1024


def turning_points(predictor: Predictor, point: StepPoint) -> list[tuple[int, Bound]]:
    """(first batch, bound) of each stretch of the batch axis up to `LARGEST_BATCH`, in order.

    Raises:
        UsageError: as `Predictor.predict`.
    """

    def bound(batch: int) -> Bound:
        return predictor.time(replace(point, batch=batch)).bound

    stretches = [(1, bound(1))]
    batch = 1
    while batch < LARGEST_BATCH:
        following = batch * 2
        if bound(following) != stretches[-1][1]:
            low, high = batch, following
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if bound(middle) == stretches[-1][1] else (low, middle)
            stretches.append((high, bound(high)))
        batch = following
    return stretches


def bounds_along_batch(predictor: Predictor, point: StepPoint) -> list[str]:
    """The same in one line of words, for decode.

    Raises:
        UsageError: as `Predictor.predict`.
    """
    stretches = turning_points(predictor, point)
    parts = []
    for index, (first, bound) in enumerate(stretches):
        last = stretches[index + 1][0] - 1 if index + 1 < len(stretches) else LARGEST_BATCH
        parts.append(f"{bound}-bound at batch {first}" if first == last else f"{bound}-bound from batch {first} to {last}")
    context = f" at {point.context:,} cached tokens" if point.context else ""
    return [f"{point.scheme} decode{context}: {', '.join(parts)}"]
