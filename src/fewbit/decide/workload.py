"""What a deployment has to do: how many sequences, how long, and what counts. Presets are data (`workloads.toml`); a file describes others.

Two goals are told apart because they want different formats:

    latency       time of one request = prefill of its prompt + new tokens x decode step at the workload's batch
    throughput    time of the whole batch = prefill of all prompts + new tokens x decode step; output tokens over it is what a device earns

A decode step is taken at the middle of the answer (prompt + half of the new tokens cached), which is exact where time is linear in context.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fewbit.errors import UsageError

__all__ = ["Limits", "Workload", "get_workload", "with_limits", "workload_names"]

DEFAULT_QUALITY_LOSS = 5.0
_FROZEN = ConfigDict(extra="forbid", strict=False)


@dataclass(frozen=True, config=_FROZEN)
class Limits:
    """What a deployment must keep; None: no limit.

    Attributes:
        max_ms_per_token: time of a decode step. max_ttft_ms: time to the first token of one prompt.
        max_quality_loss_percent: increase of perplexity over BF16.
    """

    max_ms_per_token: float | None = None
    max_ttft_ms: float | None = None
    max_quality_loss_percent: float = DEFAULT_QUALITY_LOSS


@dataclass(frozen=True, config=_FROZEN)
class Workload:
    """What is served.

    Attributes:
        batch: sequences at once. prompt: tokens of each prompt. new_tokens: of each answer.
        goal: what is made as good as possible within the limits.
    """

    name: str
    batch: int
    prompt: int
    new_tokens: int
    goal: Literal["latency", "throughput"] = "throughput"
    limits: Limits = Limits()
    about: str = ""

    @property
    def context(self) -> int:
        """Tokens that each sequence has cached in the end."""
        return self.prompt + self.new_tokens

    @property
    def mean_context(self) -> int:
        """Tokens cached in the middle of the answer."""
        return self.prompt + self.new_tokens // 2


@cache
def _presets() -> Mapping[str, Workload]:
    table = tomllib.loads(files("fewbit.decide").joinpath("workloads.toml").read_text(encoding="utf-8"))
    return {name: _workload(name, row, "workloads.toml") for name, row in table.items()}


def workload_names() -> list[str]:
    """Names that `get_workload` knows."""
    return list(_presets())


def get_workload(name: str | Path) -> Workload:
    """The workload of that name, or of a TOML file.

    Raises:
        UsageError: neither, or a file with unknown, missing or impossible fields.
    """
    preset = _presets().get(str(name).lower())
    if preset is not None:
        return preset
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"unknown workload '{name}'", f"choose {', '.join(_presets())}, or give a TOML file")
    try:
        row = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}", "see decide/workloads.toml in the package for the fields") from error
    return _workload(path.stem, row, str(path))


def _workload(name: str, row: Mapping[str, Any], where: str) -> Workload:
    fields = dict(row)
    limits = {
        field: fields.pop(key)
        for key, field in (
            ("max_ms_per_token", "max_ms_per_token"),
            ("max_ttft_ms", "max_ttft_ms"),
            ("max_quality_loss", "max_quality_loss_percent"),
        )
        if key in fields
    }
    try:
        workload = TypeAdapter(Workload).validate_python({"name": name, **fields, "limits": limits})
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(str(part) for part in first["loc"]) or "it"
        raise UsageError(
            f"workload '{name}' in {where}: {what}: {first['msg'].lower()}",
            "fields are batch, prompt, new_tokens, goal, max_ms_per_token, max_ttft_ms, max_quality_loss, about",
        ) from error
    return _checked(workload)


def _checked(workload: Workload) -> Workload:
    if min(workload.batch, workload.prompt, workload.new_tokens) < 1 or max(workload.batch, workload.context) > 1 << 24:
        sizes = f"{workload.batch} sequences of {workload.prompt} + {workload.new_tokens} tokens"
        raise UsageError(f"{sizes} cannot be meant", "give positive numbers")
    limits = workload.limits
    for name, value in (("time per token", limits.max_ms_per_token), ("time to the first token", limits.max_ttft_ms)):
        if value is not None and not 0 < value < 1e9:
            raise UsageError(f"a {name} of at most {value:g} ms cannot be kept", "give a positive number of milliseconds")
    if not 0 <= limits.max_quality_loss_percent < 1e6:
        raise UsageError(
            f"a quality loss of at most {limits.max_quality_loss_percent:g} % cannot be meant", "give percent of perplexity, 0 or more"
        )
    return workload


def with_limits(
    workload: Workload,
    *,
    batch: int | None = None,
    prompt: int | None = None,
    new_tokens: int | None = None,
    max_ms_per_token: float | None = None,
    max_ttft_ms: float | None = None,
    max_quality_loss: float | None = None,
) -> Workload:
    """The same workload with what is not None in place of its own.

    Raises:
        UsageError: sizes or limits that cannot be meant.
    """
    limits = workload.limits
    changed = Limits(
        limits.max_ms_per_token if max_ms_per_token is None else max_ms_per_token,
        limits.max_ttft_ms if max_ttft_ms is None else max_ttft_ms,
        limits.max_quality_loss_percent if max_quality_loss is None else max_quality_loss,
    )
    return _checked(
        replace(
            workload,
            batch=workload.batch if batch is None else batch,
            prompt=workload.prompt if prompt is None else prompt,
            new_tokens=workload.new_tokens if new_tokens is None else new_tokens,
            limits=changed,
        )
    )
