"""The parts of a model that a step's time depends on: its matrices, its heads, its depth. No weights.

    outline_of_config(config)     from a configuration: every linear with its shape, experts counted apart
    outline_of_count(7e9)         from a bare number: that many weights in matrices, read once per step

A bare count says nothing of heads and layers. It is enough for weights, which dominate; the depth is then read off the published shapes of
about that size (`models.shapes`), and the cache is left out unless its geometry is given. What was assumed stands in `Outline.assumed`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace

from torch import nn
from transformers import PretrainedConfig

from fewbit.errors import UsageError
from fewbit.models.accounting import count_parameters, kv_shape
from fewbit.models.shapes import SHAPES
from fewbit.models.structure import build_empty_model

__all__ = ["LinearGroup", "Outline", "outline_of_config", "outline_of_count"]

# Launches of a step per layer besides its linears: two norms, rotary embedding, cache write, attention, activation, two residual additions.
OTHER_OPERATORS_PER_LAYER = 8
# Linears of a layer after a runtime has joined q, k, v and gate, up.
JOINED_LINEARS_PER_LAYER = 4
OPERATORS_OUTSIDE_LAYERS = 4  # embedding, final norm, head, choice of the token
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one shape.

    Attributes:
        name: the module names' last part, for example `down_proj`.
        rows, columns: out and in of the weight.
        count: how many a token passes through. copies: how many there are (more, for experts).
        quantizable: a weight scheme quantizes them; the head stays in high precision.
        per_token: experts that a token passes through.
    """

    name: str
    rows: int
    columns: int
    count: int
    copies: int
    quantizable: bool = True
    per_token: int = 1

    @property
    def weights(self) -> int:
        """Weights of one of them."""
        return self.rows * self.columns

    @property
    def launches(self) -> int:
        """Products of a step: the experts that a token passes through are one grouped product."""
        return self.count if self.copies == self.count else self.count // self.per_token

    def expected_copies_read(self, tokens: int) -> float:
        """Copies that at least one of `tokens` tokens passes through, if the router spreads them evenly."""
        if self.copies == self.count:
            return self.count
        chosen = self.count / self.copies
        return self.copies * (1.0 - (1.0 - chosen) ** tokens)


@dataclass(frozen=True)
class Outline:
    """A model, for predictions.

    Attributes:
        parameters: all. active_parameters: those that one token passes through.
        groups: its linears, the head last.
        layers, heads, kv_heads, head_dim: of attention; all 0 when unknown, then neither attention nor cache is counted.
        depth: layers for the number of operators, also where the geometry is unknown.
        bare: made from a parameter count alone.
        assumed: what was assumed, in words.
    """

    name: str
    parameters: float
    active_parameters: float
    groups: tuple[LinearGroup, ...]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    depth: int
    bare: bool = False
    assumed: tuple[str, ...] = ()

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of one token of one sequence, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def operators(self) -> int:
        """Launches of a step."""
        return (JOINED_LINEARS_PER_LAYER + OTHER_OPERATORS_PER_LAYER) * self.depth + OPERATORS_OUTSIDE_LAYERS

    def with_cache(self, layers: int, kv_heads: int, head_dim: int, heads: int | None = None) -> Outline:
        """The same with this geometry of the cache.

        Raises:
            UsageError: a number is not positive.
        """
        if min(layers, kv_heads, head_dim) < 1:
            raise UsageError(f"a cache of {layers} layers x {kv_heads} heads x {head_dim} cannot be meant", "give positive numbers")
        assumed = tuple(text for text in self.assumed if "cache" not in text)
        return replace(self, layers=layers, depth=layers, kv_heads=kv_heads, head_dim=head_dim, heads=heads or kv_heads, assumed=assumed)


def outline_of_config(config: PretrainedConfig, name: str = "") -> Outline:
    """The outline of a configuration, counted on the model without weights.

    Args:
        config: of a causal language model that transformers knows.
        name: for messages; the configuration's own when empty.

    Raises:
        UnsupportedModelError: transformers cannot build it.
    """
    model = build_empty_model(config)
    text = config.get_text_config(decoder=True)
    per_token = int(getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k", None) or 1)
    shapes: Counter[tuple[str, int, int, bool, bool]] = Counter()
    experts_of: dict[str, set[str]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        expert = _EXPERT.search(path)
        if expert:
            experts_of.setdefault(path[: expert.start()], set()).add(expert.group())
        last = path.rpartition(".")[2]
        shapes[(last, module.out_features, module.in_features, expert is not None, path == "lm_head" or last == "lm_head")] += 1
    number = max((len(found) for found in experts_of.values()), default=1)
    groups, inactive = [], 0
    for (last, rows, columns, routed, head), copies in sorted(shapes.items(), key=lambda item: item[0][4]):
        count = copies * per_token // number if routed else copies
        inactive += (copies - count) * rows * columns
        groups.append(LinearGroup(last, rows, columns, count, copies, quantizable=not head, per_token=per_token if routed else 1))
    parameters = count_parameters(model, model.all_tied_weights_keys)
    layers, kv_heads, head_dim = kv_shape(config)
    return Outline(
        name=name or str(config.name_or_path) or config.model_type,
        parameters=parameters,
        active_parameters=parameters - inactive,
        groups=tuple(groups),
        layers=layers,
        heads=int(text.num_attention_heads),
        kv_heads=kv_heads,
        head_dim=head_dim,
        depth=layers,
    )


def _published_depth(parameters: float) -> int:
    """Layers of the published shapes nearest in size; sizes are estimated from the configuration, which is enough to rank them."""

    def size(config: dict[str, object]) -> float:
        hidden, inner, layers = (float(str(config[key])) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        return layers * hidden * (3 * inner + 2.5 * hidden) + float(str(config.get("vocab_size", 0))) * hidden

    # a multimodal configuration has its language model's sizes inside
    configs = [dict(shape.config.get("text_config", shape.config)) for shape in SHAPES.values()]
    near = sorted(configs, key=lambda config: abs(math.log(size(config) / parameters)))[:3]
    return round(sum(int(str(config["num_hidden_layers"])) for config in near) / len(near))


def outline_of_count(parameters: float, name: str = "", depth: int | None = None) -> Outline:
    """The outline of a dense model of which only the number of parameters is known.

    Args:
        depth: layers; as published models of this size have when None.

    Raises:
        UsageError: a number that no language model has.
    """
    if not math.isfinite(parameters) or not 1e6 <= parameters <= 1e14:
        raise UsageError(f"{parameters:g} parameters cannot be meant", "give a number like 7e9, a named shape or a model")
    layers = depth or _published_depth(parameters)
    per_linear = parameters / (JOINED_LINEARS_PER_LAYER * layers)
    columns = 128 * max(1, round(math.sqrt(per_linear / 2) / 128))
    count = JOINED_LINEARS_PER_LAYER * layers
    rows = max(1, round(parameters / count / columns))
    return Outline(
        name=name or f"{parameters:g} parameters",
        parameters=parameters,
        active_parameters=parameters,
        groups=(LinearGroup("linears", rows, columns, count, count),),
        layers=0,
        heads=0,
        kv_heads=0,
        head_dim=0,
        depth=layers,
        bare=True,
        assumed=(
            f"all parameters are in linears that the scheme quantizes; {layers} layers, as published models of this size have",
            "the cache and attention are not counted: a parameter count does not say how large they are",
        ),
    )
