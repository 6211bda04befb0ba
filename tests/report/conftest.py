"""The example results files, and a browser for those who have one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fewbit.results import CompareResults


def _load(name: str) -> ModuleType:
    """A helper module beside the tests: with importlib mode this directory is not on the path."""
    spec = importlib.util.spec_from_file_location(f"tests_report_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_EXAMPLES = _load("example_results")
_CHROMIUM = _load("chromium")


@pytest.fixture(scope="session")
def example() -> CompareResults:
    """Ten variants of a small model, quality included, and the shapes section."""
    return _EXAMPLES.example_results()


@pytest.fixture(scope="session")
def minimal() -> CompareResults:
    """Two variants, memory only."""
    return _EXAMPLES.minimal_results()


@pytest.fixture(scope="session", params=["example_results", "minimal_results"])
def any_results(request: pytest.FixtureRequest) -> CompareResults:
    """Each of the two in turn."""
    return getattr(_EXAMPLES, request.param)()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One headless Chromium for all tests."""
    executable = _CHROMIUM.find_chromium()
    if executable is None:
        pytest.skip("there is no Chromium on this machine: install the package `chromium` to test the page in it")
    started = _CHROMIUM.Browser(executable)
    yield started
    started.close()
