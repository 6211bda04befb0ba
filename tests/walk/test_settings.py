"""Chains of methods, and words on the command line."""

from __future__ import annotations

import pytest

from fewbit.errors import FormatError, UsageError
from fewbit.walk.methods import ROUNDING_STEPS, TRANSFORM_STEPS, retries
from fewbit.walk.settings import ROUNDINGS, TRANSFORMS, Recipe, WalkSettings, walk_settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rtn", (None, "rtn", None)),
        ("awq", ("awq", "rtn", None)),
        (" AWQ + gptq ", ("awq", "gptq", None)),
        ("autoround", (None, "rtn", "autoround")),
        ("gptq+autoround", (None, "gptq", "autoround")),
        ("smoothquant+gptq+autoround", ("smoothquant", "gptq", "autoround")),
    ],
)
def test_a_chain_is_read(text: str, expected: tuple[str | None, str, str | None]) -> None:
    recipe = Recipe.parse(text)
    assert (recipe.transform, recipe.rounding, recipe.tuning) == expected
    assert recipe.calibrated == (text not in ("rtn", "hqq", "llm_int8"))


@pytest.mark.parametrize("text", ["", "magic", "gptq+awq", "rtn+gptq", "awq+smoothquant", "gptq+", "autoround+gptq"])
def test_what_is_no_chain_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"unknown method|no chain"):
        Recipe.parse(text)


def test_every_name_has_a_function() -> None:
    assert set(ROUNDINGS) == set(ROUNDING_STEPS) and set(TRANSFORMS) == set(TRANSFORM_STEPS)


def test_retries_grow_stronger_and_end_with_rounding_to_nearest() -> None:
    tried = retries(WalkSettings(method="gptq"))
    assert [settings.gptq.dampening for _, rounding, settings in tried if rounding == "gptq"] == pytest.approx([0.01, 0.1, 1.0])
    assert tried[-1][1] == "rtn" and [rounding for _, rounding, _ in retries(WalkSettings())] == ["rtn"]


def test_words_become_settings() -> None:
    settings = walk_settings(method="gptq", observer="mse", actorder="none", dampening=0.05, precision="float32", seed=3)
    assert (settings.observer, settings.gptq.actorder, settings.gptq.dampening, settings.seed) == ("mse", "none", 0.05, 3)
    with pytest.raises(UsageError, match=r"magic.*choose one of"):
        walk_settings(observer="magic")
    with pytest.raises(FormatError, match="dampening"):
        walk_settings(dampening=-1.0)
