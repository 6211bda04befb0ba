"""Real models' shapes by name, for measurements that need the shapes and not the weights.

How fast a matrix product runs depends on its shape and format, not on the numbers in it; so `--shapes qwen2.5-1.5b` measures a stack of
layers with random weights in the shapes that were published, without a download. The shapes are data: `shapes.toml` beside this file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from fewbit.errors import UsageError

__all__ = ["SHAPES", "Shape", "shapes_config"]


@dataclass(frozen=True)
class Shape:
    """One published configuration.

    Attributes:
        name: what `--shapes` takes.
        hub_id: the repository whose config.json says so.
        model_type: transformers' name of the architecture.
        config: arguments of its configuration class.
    """

    name: str
    hub_id: str
    model_type: str
    config: Mapping[str, Any]


def _read() -> dict[str, Shape]:
    table = tomllib.loads(files("fewbit.models").joinpath("shapes.toml").read_text(encoding="utf-8"))
    return {name: Shape(name, row["hub_id"], row["model_type"], row["config"]) for name, row in table.items()}


SHAPES: Mapping[str, Shape] = _read()


def shapes_config(name: str) -> PretrainedConfig:
    """The transformers configuration of that name, upper or lower case; its `name_or_path` is the name.

    Raises:
        UsageError: no such name.
    """
    shape = SHAPES.get(name.lower())
    if shape is None:
        raise UsageError(f"unknown shapes '{name}'", f"choose one of {', '.join(SHAPES)}")
    config: PretrainedConfig = AutoConfig.for_model(shape.model_type, **shape.config)
    config.name_or_path = shape.name
    return config
