"""The parts of a model that a step's time depends on: its matrices, its cache, its depth. No weights, no torch.

    outline_of(read_inventory("llama-3-8b"))     every linear with its shape, experts counted apart, the cache layer by layer
    outline_of(read_inventory("7e9"))            from a bare number: that many weights in matrices, read once per step

A bare count says nothing of heads and layers. It is enough for weights, which dominate; the depth is then read off the published shapes of
about that size (`models/shapes.toml`), and the cache is left out unless its geometry is given. `Outline.assumed` says what was assumed.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fewbit.errors import UsageError
from fewbit.formats.spec import Scheme
from fewbit.models.inventory import Inventory, TensorClass
from fewbit.models.inventory_sources import bare_inventory

__all__ = ["LinearGroup", "Outline", "outline_of", "outline_of_count"]

# Launches of a step per layer besides its linears: two norms, rotary embedding, cache write, attention, activation, two residual additions.
OTHER_OPERATORS_PER_LAYER = 8
# Linears of a layer after a runtime has joined q, k, v and gate, up.
JOINED_LINEARS_PER_LAYER = 4
OPERATORS_OUTSIDE_LAYERS = 4  # embedding, final norm, head, choice of the token
_BARE_HEAD_DIM_SQUARES = 12  # weights of a layer over the square of its width, for a guess of the width from a count


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one shape.

    Attributes:
        name: the module names' last part, for example `down_proj`.
        rows, columns: out and in of the weight.
        count: how many a token passes through. copies: how many there are (more, for experts).
        launches: products of a step: the experts that a token passes through are one grouped product.
        quantizable: a weight scheme quantizes them; the head stays in high precision.
    """

    name: str
    rows: int
    columns: int
    count: float
    copies: int
    launches: int
    quantizable: bool = True

    @property
    def weights(self) -> int:
        """Weights of one of them."""
        return self.rows * self.columns

    def expected_copies_read(self, tokens: int) -> float:
        """Copies that at least one of `tokens` tokens passes through, if the router spreads them evenly."""
        chosen = self.count / self.copies
        return self.copies * (1.0 - (1.0 - chosen) ** tokens) if chosen < 1 else float(self.copies)


@dataclass(frozen=True)
class Outline:
    """A model, for predictions.

    Attributes:
        inventory: what it consists of.
        groups: its linears, the head last.
        heads: of queries; 0 when unknown, then attention's operations are not counted.
        depth: layers for the number of operators, also where the geometry is unknown.
        assumed: what was assumed, in words.
    """

    inventory: Inventory
    groups: tuple[LinearGroup, ...]
    heads: int
    depth: int
    assumed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a person calls the model."""
        return self.inventory.name

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.inventory.parameters

    @property
    def operators(self) -> int:
        """Launches of a step."""
        return (JOINED_LINEARS_PER_LAYER + OTHER_OPERATORS_PER_LAYER) * self.depth + OPERATORS_OUTSIDE_LAYERS

    def cached_bytes(self, tokens: int, scheme: Scheme | None) -> float:
        """Keys and values of one sequence of so many tokens; 0 where the geometry is unknown."""
        return self.inventory.kv_bytes(tokens, scheme)

    def attention_operations(self, new: int, before: int) -> float:
        """Multiplications and additions of scores and sums: `new` tokens of one sequence that see themselves and `before` older ones."""
        total = 0.0
        for kv in self.inventory.kv:
            seen = self.seen(new, before, kv.window)
            total += 4.0 * kv.layers * self.heads * kv.head_dim * seen
        return total

    @staticmethod
    def seen(new: int, before: int, window: int | None) -> float:
        """Sum over the new tokens of the tokens that each sees."""
        if window is None or before + new <= window:
            return new * before + new * (new + 1) / 2
        growing = max(0, min(new, window - before))  # tokens that do not fill the window yet
        return growing * before + growing * (growing + 1) / 2 + (new - growing) * window


def outline_of(inventory: Inventory, depth: int | None = None) -> Outline:
    """The outline of a model.

    Args:
        inventory: of a configuration, or of a bare count.
        depth: layers, for a bare count; as published models of this size have when None.

    Raises:
        UsageError: a number that no language model has.
    """
    if inventory.bare:
        return _of_bare(inventory, depth)
    groups = [_group(one, inventory) for one in inventory.tensors if _multiplied(one)]
    groups.sort(key=lambda group: not group.quantizable)
    if inventory.tied:
        groups += [_group(one, inventory) for one in inventory.tensors if one.role == "embedding"]
    assumed = [note for note in inventory.notes if "cache" in note]
    return Outline(inventory, tuple(groups), inventory.heads, inventory.layers, tuple(assumed))


def _multiplied(one: TensorClass) -> bool:
    return one.linear and len(one.shape) == 2 and one.role not in ("embedding", "vision", "extra")


def _group(one: TensorClass, inventory: Inventory) -> LinearGroup:
    name = "lm_head" if one.role in ("head", "embedding") else one.name.removesuffix(".weight").rpartition(".")[2]
    count = one.count * one.share
    launches = one.count if one.share >= 1 else max(1, round(count / max(1, round(count / max(inventory.layers, 1)))))
    return LinearGroup(name, one.shape[0], one.shape[1], count, one.count, launches, one.quantizable)


@cache
def _published_sizes() -> tuple[tuple[float, int], ...]:
    """(parameters, layers) of the published shapes; sizes are estimated from the configuration, which is enough to rank them."""

    def size(config: dict[str, object]) -> float:
        hidden, inner, layers = (float(str(config[key])) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        return layers * hidden * (3 * inner + 2.5 * hidden) + float(str(config.get("vocab_size", 0))) * hidden

    table = tomllib.loads(files("fewbit.models").joinpath("shapes.toml").read_text(encoding="utf-8"))
    # a multimodal configuration has its language model's sizes inside
    configs = [dict(row["config"].get("text_config", row["config"])) for row in table.values()]
    return tuple((size(config), int(config["num_hidden_layers"])) for config in configs)


def _published_depth(parameters: float) -> int:
    near = sorted(_published_sizes(), key=lambda known: abs(math.log(known[0] / parameters)))[:3]
    return round(sum(layers for _, layers in near) / len(near))


def outline_of_count(parameters: float, *, depth: int | None = None) -> Outline:
    """The outline of a dense model of which only the number of parameters is known.

    Args:
        depth: layers; as published models of this size have when None.

    Raises:
        UsageError: a number that no language model has.
    """
    if not math.isfinite(parameters) or not 1e6 <= parameters <= 1e14:
        raise UsageError(f"{parameters:g} parameters cannot be meant", "give a number like 7e9, a named shape or a model")
    return _of_bare(bare_inventory(parameters), depth)


def _of_bare(inventory: Inventory, depth: int | None) -> Outline:
    parameters = inventory.parameters
    layers = inventory.layers or depth or _published_depth(parameters)
    count = JOINED_LINEARS_PER_LAYER * layers
    columns = 128 * max(1, round(math.sqrt(parameters / count / 2) / 128))
    rows = max(1, round(parameters / count / columns))
    assumed = ["all parameters are in linears that the scheme quantizes"]
    heads = 0
    if inventory.kv:
        heads = max(1, round(math.sqrt(parameters / layers / _BARE_HEAD_DIM_SQUARES) / inventory.kv[0].head_dim))
        assumed.append(f"{heads} heads of queries, as a model of this size and depth has")
    else:
        assumed[0] += f"; {layers} layers, as published models of this size have"
        assumed.append("the cache and attention are not counted: a parameter count does not say how large they are")
    return Outline(inventory, (LinearGroup("linears", rows, columns, count, count, count),), heads, layers, tuple(assumed))
