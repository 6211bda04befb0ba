"""The reference model with outliers put in: the same function, and W8A8 loses what it had."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbit.models.reference import reference_model_dir
from fewbit.walk.outliers import write_outlier_model
from fewbit.workflows.evaluate import evaluate


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outliers") / "model"
    write_outlier_model(reference_model_dir(), path, channels=[7, 100], factor=128.0)
    return path


def test_the_function_is_preserved(outliers: Path) -> None:
    before, after = (evaluate(model, max_tokens=2048).perplexity.value for model in (None, outliers))
    assert after == pytest.approx(before, rel=2e-3)


def test_w8a8_collapses_and_weights_alone_do_not(outliers: Path) -> None:
    delta = {}
    for name, model, scheme in (("plain", None, "W8A8"), ("outliers", outliers, "W8A8"), ("weights", outliers, "W8A16")):
        quality = evaluate(model, scheme=scheme, max_tokens=2048).quality
        assert quality is not None
        delta[name] = quality.perplexity_delta_percent.value
    assert delta["plain"] < 1.0
    assert delta["weights"] < 5.0
    assert delta["outliers"] > 10.0


def test_llm_int8_keeps_what_w8a8_loses(outliers: Path) -> None:
    """Its outlier columns stay; what remains is the rounding of the weights, as W8A16 has it."""
    delta = {}
    for scheme in ("W8A16", "LLM-INT8"):
        quality = evaluate(outliers, scheme=scheme, max_tokens=4096).quality
        assert quality is not None
        delta[scheme] = quality.perplexity_delta_percent.value
    assert delta["LLM-INT8"] < 1.0
    assert delta["LLM-INT8"] == pytest.approx(delta["W8A16"], abs=0.2)
