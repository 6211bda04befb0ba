"""Priors fitted on devices whose factors are known give those factors back; measured devices that are far off do not move them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fewbit.formats.spec import get_scheme
from fewbit.predict.efficiency import FACTORS, Factors, Prior, prior_of
from fewbit.predict.fit import Observed, fit_prior
from fewbit.predict.hardware import get_hardware
from fewbit.predict.outline import outline_of_count
from fewbit.predict.prediction import MeasuredPoint, StepPoint
from fewbit.predict.step import choose_path, step_time, step_work

TRUE = replace(prior_of("unknown").factors, memory=0.93, operator_us=9.0, read_8=0.94, read_4=0.8)


def observed(device: str, parameters: float, factors: Factors, *, slower: float = 1.0) -> Observed:
    """A device that behaves as the model says; 4-bit times `slower` than that."""
    hardware, outline = get_hardware("rtx-4090"), outline_of_count(parameters)

    def point(scheme: str, bits: int) -> MeasuredPoint:
        size, step = parameters * bits / 8, StepPoint(scheme=scheme)
        work = step_work(outline, step, choose_path(get_scheme(scheme), hardware), weight_bytes=size)
        ms = step_time(work, hardware, factors).milliseconds * (slower if bits == 4 else 1.0)
        return MeasuredPoint(step, ms, size, device)

    points = (point("W8A16", 8), point("W4A16", 4))
    return Observed(device, "gpu", "x", hardware, outline, point("BF16", 16), points, (8, 4))


def devices() -> list[Observed]:
    sizes = (1.5e9, 3e9, 7e9, 8e9, 13e9)
    return [observed(f"device {n}", size, replace(TRUE, memory=TRUE.memory * (0.9 + 0.05 * n))) for n, size in enumerate(sizes)]


def test_predicts_the_devices_it_was_fitted_on() -> None:
    prior = fit_prior(devices(), prior_of("unknown"))
    errors = [
        abs(math.log(prediction.milliseconds.value / point.milliseconds))
        for device in devices()
        for point, prediction in zip(device.others, device.predict(prior), strict=True)
    ]
    assert max(errors) < 0.08
    assert float(np.median(errors)) < 0.04
    assert prior.factors.operator_us == pytest.approx(TRUE.operator_us, rel=0.6)
    assert prior.factors.read_4 < prior.factors.read_8


def test_one_device_that_is_far_off_does_not_move_the_medians() -> None:
    alone = fit_prior(devices(), prior_of("unknown"))
    with_it = fit_prior([*devices(), observed("odd", 7e9, TRUE, slower=2.0)], prior_of("unknown"))
    assert with_it.factors.read_4 == pytest.approx(alone.factors.read_4, rel=0.1)
    assert with_it.spread[FACTORS.index("read_4")] >= alone.spread[FACTORS.index("read_4")]


def test_too_few_devices_keep_the_start() -> None:
    start: Prior = prior_of("unknown")
    assert fit_prior(devices()[:1], start) is start
