"""The reference model that ships inside the package: a small Llama, so that everything works without a network."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from fewbit.errors import ModelNotFoundError

__all__ = ["reference_model_dir"]


def reference_model_dir() -> Path:
    """The Hugging Face directory of the bundled model.

    Raises:
        ModelNotFoundError: this installation lacks the model's files.
    """
    with as_file(files("fewbit.models").joinpath("reference")) as directory:
        if (directory / "config.json").is_file():
            return Path(directory)
    raise ModelNotFoundError("this installation of fewbit lacks its reference model", "reinstall fewbit, or name a model directory")
