"""The reference model with outliers put in: the same function, and W8A8 loses what it had."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from fewbit.checkpoints.sources import open_source
from fewbit.corpora.text import load_corpus
from fewbit.evaluate.protocols import make_windows
from fewbit.evaluate.quality import Reference, evaluate_quality
from fewbit.formats.spec import get_scheme
from fewbit.models.reference import reference_model_dir
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.load import load_model
from fewbit.walk.outliers import write_outlier_model

# The reference's answers are read once, and each scheme once: every pass over the text is seconds.
LossOf = Callable[[str], float]


def _losses(model: Path, tokens: int = 2048) -> tuple[Reference, LossOf]:
    """The model in BF16 on the first so many tokens, and what a scheme adds to its perplexity in percent."""
    source = open_source(model)
    windows = make_windows(None, load_corpus(None, ()), source.tokenizer(), source.config, seed=0, max_tokens=tokens)
    reference = Reference(load_model(source, QuantizationConfig(get_scheme("BF16"))), windows)

    @cache
    def loss(scheme: str) -> float:
        return evaluate_quality(reference, load_model(source, QuantizationConfig(get_scheme(scheme)))).perplexity_delta_percent.value

    return reference, loss


@pytest.fixture(scope="module")
def plain() -> tuple[Reference, LossOf]:
    return _losses(reference_model_dir())


@pytest.fixture(scope="module")
def outlier_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outliers") / "model"
    write_outlier_model(reference_model_dir(), path, channels=[7, 100], factor=128.0)
    return path


@pytest.fixture(scope="module")
def outliers(outlier_model: Path) -> tuple[Reference, LossOf]:
    return _losses(outlier_model)


def test_the_function_is_preserved(plain: tuple[Reference, LossOf], outliers: tuple[Reference, LossOf]) -> None:
    assert outliers[0].perplexity.value == pytest.approx(plain[0].perplexity.value, rel=2e-3)


def test_w8a8_collapses_and_weights_alone_do_not(plain: tuple[Reference, LossOf], outliers: tuple[Reference, LossOf]) -> None:
    assert plain[1]("W8A8") < 1.0
    assert outliers[1]("W8A16") < 5.0
    assert outliers[1]("W8A8") > 10.0


def test_llm_int8_keeps_what_w8a8_loses(outlier_model: Path) -> None:
    """Its outlier columns stay; what remains is the rounding of the weights, as W8A16 has it."""
    _, loss = _losses(outlier_model, 4096)
    assert loss("LLM-INT8") < 1.0
    assert loss("LLM-INT8") == pytest.approx(loss("W8A16"), abs=0.2)
