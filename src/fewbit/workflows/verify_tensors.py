"""The files' half of `fewbit verify`: is every tensor there, finite, smaller than before, and the value that it should be?

What it should be is known from up to two sides. The recipe that fewbit leaves in its checkpoints has a digest of each quantized tensor's
numbers as they came from the method (`formats.digest`), before any layout packed them. And the source, where it is named: what is not
quantized must be the same bits, and what is must be as near to the source as rounding to its grid brings it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fewbit.checkpoints.gguf_blocks import DENSE
from fewbit.checkpoints.gguf_source import GgufSource
from fewbit.checkpoints.sources import TensorSource
from fewbit.errors import CheckpointError, FewbitError
from fewbit.formats.digest import digest
from fewbit.formats.quantize import dequantize
from fewbit.methods.rtn import rtn
from fewbit.models.names import disk_names
from fewbit.models.structure import build_empty_model

__all__ = ["TensorFindings", "check_tensors"]

RECIPE_NAME = "fewbit_recipe.json"
_TIMES_RTN = 3.0  # methods that minimize the output's error leave the weights further from the source than rounding to nearest does
_SLACK = 1e-3
_MOST_DECODED = 0.4  # of a weight that comes decoded; two bits round away a third of it
_FOLDING = ("awq", "smoothquant")
_MOST = 20  # problems of one sort that are told


@dataclass(frozen=True)
class TensorFindings:
    """What the files hold.

    Attributes:
        tensors, linears: how many there are, and how many of them are quantized linears.
        compared_with: `recipe`, `source`, both or neither.
        problems: one sentence each.
    """

    tensors: int
    linears: int
    compared_with: list[str]
    problems: list[str]


def check_tensors(source: TensorSource, path: Path, against: TensorSource | None = None) -> TensorFindings:
    """Read every tensor of a checkpoint once.

    Args:
        source: the checkpoint.
        path: its directory or file, for the recipe.
        against: the model in high precision that it was made from.

    Raises:
        CheckpointError: the recipe is damaged.
    """
    digests, method = _recipe(path)
    folded = any(word in method for word in _FOLDING)
    originals = frozenset(against.names()) if against is not None else frozenset()
    problems = _inventory(source, against)
    for name in source.names():
        try:
            problems += _one(source, name, against if name in originals else None, digests.get(name.removesuffix(".weight")), folded)
        except FewbitError as error:
            problems.append(error.problem)
    compared = [*(["recipe"] if digests else []), *(["source"] if against is not None else [])]
    forgotten = sorted(set(digests) - source.quantized_linears)
    problems += [f"'{name}' is quantized in the recipe and not in the checkpoint" for name in forgotten[:_MOST]]
    return TensorFindings(len(source.names()), len(source.quantized_linears), compared, problems)


def _recipe(path: Path) -> tuple[Mapping[str, str], str]:
    """The digests and the method of fewbit's recipe; empty when there is none."""
    file = path / RECIPE_NAME
    if not file.is_file():
        return {}, ""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return dict(fields.get("values_sha256", {})), str(fields["result"]["method"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{file}' is damaged: {error}", "remove it to verify the checkpoint without its recipe") from error


def _inventory(source: TensorSource, against: TensorSource | None) -> list[str]:
    """Tensors that are missing, or that nobody knows."""
    given = set(source.names())
    if against is not None:
        expected = set(against.names())
        missing, extra = sorted(expected - given), sorted(given - expected)
        extra = [name for name in extra if not name.endswith(("_scale", ".bias"))]
    else:
        model = build_empty_model(source.config)
        names = disk_names(model, source.names())
        tied = set(model.all_tied_weights_keys)
        found = {*names.single, *names.merged}
        missing, extra = sorted(set(model.state_dict()) - found - tied), []
    problems = [f"tensor '{name}' is missing" for name in missing[:_MOST]]
    return problems + [f"tensor '{name}' is not one of the source's" for name in extra[:_MOST]]


def _comes_decoded(source: TensorSource, name: str) -> bool:
    """A type of GGUF that fewbit has no format for: Q4_1, the K-types."""
    return isinstance(source, GgufSource) and source.file.tensors[source.disk_name(name)].type not in DENSE.values()


def _one(source: TensorSource, name: str, against: TensorSource | None, recorded: str | None, folded: bool) -> list[str]:
    """What is wrong with one tensor."""
    q = source.get_quantized(name.removesuffix(".weight")) if name.endswith(".weight") else None
    value = source.get(name) if q is None else dequantize(q)
    if value.is_floating_point() and not bool(value.float().isfinite().all()):
        return [f"tensor '{name}' has NaN or infinite values"]
    problems = []
    if q is not None and recorded is not None and digest(q) != recorded:
        problems.append(f"tensor '{name}' does not hold the numbers that the recipe recorded")
    if against is None:
        return problems
    original = against.get(name)
    if original.shape != value.shape:
        return [*problems, f"tensor '{name}' is {list(value.shape)}, the source's {list(original.shape)}"]
    if q is None and _comes_decoded(source, name):
        weight = original.float()
        error = float((weight - value).norm()) / max(float(weight.norm()), 1e-30)
        return problems if error <= _MOST_DECODED or folded else [*problems, f"tensor '{name}' is {error:.1%} away from the source's"]
    if q is None:
        same = torch.equal(original.to(value.dtype), value)
        return problems if same or folded else [*problems, f"tensor '{name}' is not quantized and differs from the source's"]
    if folded:
        return problems
    weight = original.float()
    norm = float(weight.norm())
    error = float((weight - value).norm()) / max(norm, 1e-30)
    nearest = float((weight - dequantize(rtn(weight, q.spec))).norm()) / max(norm, 1e-30) if q.g_idx is None else 0.5
    if error > _TIMES_RTN * nearest + _SLACK:
        problems.append(f"tensor '{name}' is {error:.1%} away from the source's, rounding to nearest would be {nearest:.1%} away")
    return problems
