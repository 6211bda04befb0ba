"""The bundled model is found where it was installed."""

from __future__ import annotations

import pytest

from fewbit.errors import ModelNotFoundError
from fewbit.models import reference


def test_an_installation_without_the_model_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(reference, "files", lambda package: tmp_path)
    with pytest.raises(ModelNotFoundError, match="lacks its reference model"):
        reference.reference_model_dir()
