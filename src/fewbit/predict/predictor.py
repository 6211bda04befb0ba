"""Predictions for one device: priors, measured points and the model of a step put together.

predictor = Predictor(get_hardware("agx-orin-64gb"), outline_of_count(7e9), [MeasuredPoint(StepPoint(), 94.0)])
predictor.predict(StepPoint(scheme="W4A16")).milliseconds           # an estimate with its 90 % interval
predictor.compare(StepPoint(scheme="W4A16"), StepPoint())           # a ratio in which the shared error cancels
predictor.next_measurement([StepPoint(), StepPoint(scheme="W4A16")])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fewbit.formats.spec import get_scheme
from fewbit.predict.calibration import Z90, LogTime, Posterior, calibrate, gradient_of
from fewbit.predict.efficiency import FACTORS, MEMORY_LIMITED, Factors, Prior, prior_of_device
from fewbit.predict.hardware import Hardware
from fewbit.predict.outline import Outline
from fewbit.predict.prediction import Comparison, Estimate, MeasuredPoint, Prediction, StepPoint, Suggestion, step_name
from fewbit.predict.step import StepTime, Work, choose_path, format_name, step_time, step_work

__all__ = ["Predictor", "predict_step"]

_ODD_RESIDUAL = 1.5  # times the class's own, from which on points are said to contradict each other


class Predictor:
    """Predicts steps of one model on one device.

    Args:
        hardware: the device.
        outline: the model.
        measured: what was measured on it: of this model, or of another with `outlines`.
        outlines: the model of each measured point, where it is not `outline`.
        prior: in place of the class's own (`efficiency.prior_of`).

    Raises:
        UsageError: a point with an unknown scheme, or sizes that are not positive.
    """

    def __init__(
        self,
        hardware: Hardware,
        outline: Outline,
        measured: Sequence[MeasuredPoint] = (),
        *,
        outlines: Sequence[Outline] | None = None,
        prior: Prior | None = None,
    ) -> None:
        self._prior = prior or prior_of_device(hardware)
        self.hardware = hardware
        self.outline = outline
        self.measured = tuple(measured)
        models = outlines or [outline] * len(measured)
        self._posterior = self._calibrate(models)

    @property
    def posterior(self) -> Posterior:
        """The factors' distribution after the measured points."""
        return self._posterior

    @property
    def factors(self) -> Factors:
        """Most likely factors."""
        return Factors.from_logs(self._posterior.mean)

    def scale(self) -> float | None:
        """Measured over predicted time before calibration, geometric mean over the points; None without any."""
        if not self.measured:
            return None
        prior = self._prior.factors.logs()
        logs = [math.log(m.milliseconds) - self._log_time(w)(prior) for m, w in zip(self.measured, self._measured_works, strict=True)]
        return math.exp(sum(logs) / len(logs))

    def warnings(self) -> list[str]:
        """What is odd about the calibration."""
        if self._posterior.residual > self._prior.residual * _ODD_RESIDUAL:
            return [
                f"the measured points contradict each other or the model by {100 * self._posterior.residual:.0f} %: the intervals are wider"
            ]
        return []

    def time(self, point: StepPoint) -> StepTime:
        """Most likely time of a step with its terms, without an interval.

        Raises:
            UsageError: as `predict`.
        """
        return step_time(self._work(point), self.hardware, self.factors)

    def _calibrate(self, models: Sequence[Outline]) -> Posterior:
        self._measured_works = [self._work(m.point, outline, m.weight_bytes) for m, outline in zip(self.measured, models, strict=True)]
        log_times = [self._log_time(work) for work in self._measured_works]
        return calibrate(self._prior, log_times, [math.log(m.milliseconds) for m in self.measured])

    def _work(self, point: StepPoint, outline: Outline | None = None, weight_bytes: float | None = None) -> list[Work]:
        path = choose_path(get_scheme(point.scheme), self.hardware, point.path)
        return step_work(outline or self.outline, point, path, weight_bytes=weight_bytes)

    def _log_time(self, work: list[Work]) -> LogTime:
        return lambda logs: math.log(step_time(work, self.hardware, Factors.from_logs(logs)).milliseconds)

    def _gradient(self, work: list[Work]) -> NDArray[np.float64]:
        return gradient_of(self._log_time(work), self._posterior.mean)

    def _ceiling(self) -> NDArray[np.float64]:
        """Logarithms that the factors stay below: packed weights are not read faster than 16-bit ones, unless they were measured."""
        least = min((one.bits for work in self._measured_works for one in work if one.weight_bytes), default=16.0)
        limited = self.hardware.kind in MEMORY_LIMITED and self.hardware.rates is None
        capped = {"read_4": limited and least >= 8, "read_8": limited and least >= 16}
        return np.array([self._prior.residual if capped.get(name, False) else np.inf for name in FACTORS])

    def _estimate(self, value: float, gradient: NDArray[np.float64], residuals: float = 1.0) -> Estimate:
        low, high = self._posterior.interval(gradient, self._ceiling(), residuals)
        return Estimate(value, value * math.exp(low), value * math.exp(high))

    def predict(self, point: StepPoint, *, weight_bytes: float | None = None) -> Prediction:
        """The time of a step with its 90 % interval, its terms and what bounds it.

        Args:
            weight_bytes: bytes of weights that the step reads, where they are known better than from the scheme.

        Raises:
            UsageError: an unknown scheme or cache format, a path that the hardware does not have, sizes that are not positive.
        """
        path = choose_path(get_scheme(point.scheme), self.hardware, point.path)
        work = self._work(point, weight_bytes=weight_bytes)
        time = step_time(work, self.hardware, self.factors)
        milliseconds = self._estimate(time.milliseconds, self._gradient(work))
        base = replace(point, scheme="BF16", kv="BF16", path=None)
        tokens = point.batch * (point.context if point.phase == "prefill" else 1)
        return Prediction(
            point=point,
            format=format_name(point.scheme),
            path=path,
            milliseconds=milliseconds,
            speedup_over_bf16=self.compare(base, point, second_weight_bytes=weight_bytes).ratio,
            tokens_per_s=Estimate(*(1e3 * tokens / ms for ms in (milliseconds.value, milliseconds.high, milliseconds.low))),
            bound=time.bound,
            floor_milliseconds=time.floor_milliseconds,
            weight_bytes=sum(one.weight_bytes for one in work),
            kv_bytes=sum(one.cache_bytes for one in work),
            operations=sum(one.operations for one in work),
            calibrated_from=len(self.measured),
            terms=list(time.terms),
            notes=list(self.outline.assumed),
        )

    def compare(self, first: StepPoint, second: StepPoint, *, second_weight_bytes: float | None = None) -> Comparison:
        """Time of the first step over time of the second, with the interval of the ratio.

        Raises:
            UsageError: as `predict`.
        """
        works = self._work(first), self._work(second, weight_bytes=second_weight_bytes)
        times = [step_time(work, self.hardware, self.factors).milliseconds for work in works]
        if works[0] == works[1]:
            return Comparison(first, second, Estimate(1.0, 1.0, 1.0), False)
        ratio = self._estimate(times[0] / times[1], self._gradient(works[0]) - self._gradient(works[1]), residuals=2.0)
        return Comparison(first, second, ratio, not ratio.low <= 1.0 <= ratio.high)

    def next_measurement(self, candidates: Sequence[StepPoint], options: Sequence[StepPoint] | None = None) -> Suggestion | None:
        """The measurement that narrows most what the choice between candidates hangs on: the ratio of the two fastest.

        Args:
            candidates: steps to choose from; with one alone its own time is narrowed.
            options: steps that could be measured; the candidates and the same in BF16 when None.

        Returns:
            None without candidates.
        """
        if not candidates:
            return None
        ranked = sorted(candidates, key=lambda point: step_time(self._work(point), self.hardware, self.factors).milliseconds)
        target, residuals = self._gradient(self._work(ranked[0])), 1.0
        if len(ranked) > 1:
            target, residuals = target - self._gradient(self._work(ranked[1])), 2.0
        if options is None:
            options = list(dict.fromkeys([*candidates, *(replace(p, scheme="BF16", kv="BF16", path=None) for p in candidates)]))
        before = self._posterior.log_sd(target, residuals)
        after = {option: self._posterior.after(self._gradient(self._work(option))).log_sd(target, residuals) for option in options}
        best = min(after, key=after.__getitem__)
        widths = tuple(math.exp(2 * Z90 * spread) for spread in (before, after[best]))
        first, *others = (step_name(point) for point in ranked[:2])
        question = f"the choice between {first} and {others[0]}" if others else f"the time of {first}"
        reason = f"measuring {step_name(best)} narrows {question} from a factor of {widths[0]:.2f} to one of {widths[1]:.2f}"
        return Suggestion(best, reason, widths[0], widths[1])


def predict_step(
    outline: Outline, hardware: Hardware, point: StepPoint, measured: Sequence[MeasuredPoint] = (), *, weight_bytes: float | None = None
) -> Prediction:
    """One prediction; `Predictor` for several on the same device.

    Args:
        outline: the model (`outline_of_config`, `outline_of_count`).
        hardware: the device (`get_hardware`).
        point: the step.
        measured: points of the same model on the same device.
        weight_bytes: as in `Predictor.predict`.

    Raises:
        UsageError: as `Predictor.predict`.
    """
    return Predictor(hardware, outline, measured).predict(point, weight_bytes=weight_bytes)
