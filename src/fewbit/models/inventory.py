"""Every tensor of a model, class by class, from its configuration alone: what a plan, a prediction and a decision start from.

A model of 70 or 670 billion parameters has a few dozen *classes* of tensors: the same matrix in every block, the same expert 256 times. A
class has a name with `*` for the numbers, a role, a shape and a count, so

    parameters = sum over classes of count * product(shape)

is exact to the tensor, and the whole inventory takes milliseconds and no weights. What is cached per token follows from the same
configuration, layer by layer, because layers differ: a sliding window stops growing, latent attention (MLA) caches one vector per layer.

`models.inventory_sources` makes inventories: from configurations, from the weight files' own index, from a bare parameter count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from fewbit.formats.sizes import bits_per_weight, cached_bytes, storage_bytes
from fewbit.formats.spec import QuantSpec, Scheme

__all__ = ["Inventory", "KVLayers", "Role", "TensorClass"]

Role = Literal["embedding", "attention", "mlp", "expert", "shared_expert", "router", "norm", "head", "vision", "extra", "other"]
_HIGH_PRECISION_ROLES = ("embedding", "head", "vision", "extra")


@dataclass(frozen=True)
class TensorClass:
    """Tensors of one name and shape.

    Attributes:
        name: dotted, `*` for the number of the block or the expert.
        role: what they are for.
        shape: of one; a linear's weight is [out, in], and a bare parameter count a vector.
        count: how many there are.
        linear: the weight of a linear; one in the decoder's blocks is what weight schemes quantize.
        share: of all tokens, those that reach it: experts_per_token / experts for experts, else 1.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    count: int
    linear: bool = False
    share: float = 1.0

    @property
    def parameters(self) -> int:
        """Of all of them."""
        return self.count * math.prod(self.shape)

    @property
    def quantizable(self) -> bool:
        """Whether a weight scheme applies to it; embedding, head, router, norms and vision towers stay in high precision."""
        return self.linear and self.role not in _HIGH_PRECISION_ROLES

    def bytes_in(self, spec: QuantSpec | None, high_precision_bytes: float = 2) -> float:
        """Of all of them in a format, scales and zero points included; in high precision when it is None or does not apply.

        Raises:
            FormatError: a group size that does not divide the columns.
        """
        if spec is None or not self.quantizable:
            return self.parameters * high_precision_bytes
        if len(self.shape) == 1:  # a bare count: no rows and columns
            return self.parameters * bits_per_weight(spec) / 8
        return self.count * storage_bytes(spec, self.shape[0], self.shape[1])


@dataclass(frozen=True)
class KVLayers:
    """Layers whose caches are alike.

    Attributes:
        layers: how many.
        heads, head_dim: of keys and values; latent: one head of the latent vector.
        tensors: 2 for keys and values, 1 for a latent vector.
        window: tokens that are kept at most; None for all.
    """

    layers: int
    heads: int
    head_dim: int
    tensors: int = 2
    window: int | None = None

    @property
    def values_per_token(self) -> int:
        """Numbers that one token adds, in all these layers."""
        return self.layers * self.heads * self.head_dim * self.tensors

    def bytes_per_token(self, keys: QuantSpec | None, values: QuantSpec | None, high_precision_bytes: int = 2) -> float:
        """Of one token in these layers, in the formats of keys and values."""
        per_head = cached_bytes(keys, self.head_dim, high_precision_bytes)
        per_head += cached_bytes(values, self.head_dim, high_precision_bytes) if self.tensors == 2 else 0.0
        return self.layers * self.heads * per_head


@dataclass(frozen=True)
class Inventory:
    """What a model consists of.

    Attributes:
        name: what a person calls it. model_type: transformers' name of the architecture; empty for a bare count.
        tensors: the model's, embedding first. extra: stored beside them and not used in ordinary inference.
        layers, hidden_size, vocabulary, heads: of the text decoder; 0 where unknown.
        kv: how keys and values are cached; empty where unknown.
        tied: the output head is the embedding.
        max_context: tokens that positions reach; None where unknown.
        source: `configuration`, `tensor index` or `parameter count`.
        stored_bytes: of the weight files, where an index or the files say so. stored_dtypes: parameters by dtype, where headers were read.
        quantized_as: the layout that the configuration says its weights are stored in already; empty for high precision.
        notes: what was assumed, and contradictions between configuration and files.
    """

    name: str
    model_type: str
    tensors: tuple[TensorClass, ...]
    layers: int = 0
    hidden_size: int = 0
    vocabulary: int = 0
    heads: int = 0
    kv: tuple[KVLayers, ...] = ()
    tied: bool = False
    max_context: int | None = None
    extra: tuple[TensorClass, ...] = ()
    source: str = "configuration"
    stored_bytes: int | None = None
    stored_dtypes: dict[str, int] = field(default_factory=dict)
    quantized_as: str = ""
    notes: tuple[str, ...] = ()

    @property
    def bare(self) -> bool:
        """Only a parameter count is known."""
        return self.source == "parameter count"

    @property
    def parameters(self) -> int:
        """All of the model's; tied ones once; without `extra`."""
        return sum(c.parameters for c in self.tensors)

    @property
    def extra_parameters(self) -> int:
        """Of `extra`."""
        return sum(c.parameters for c in self.extra)

    @property
    def active_parameters(self) -> int:
        """That one token is multiplied with: experts by their share, without the embedding, of which it reads one row (a tied one is the
        head, and counts)."""
        return round(sum(c.parameters * c.share for c in self.tensors if (c.role != "embedding" or self.tied) and c.role != "vision"))

    @property
    def quantizable_parameters(self) -> int:
        """In linears that a weight scheme quantizes."""
        return sum(c.parameters for c in self.tensors if c.quantizable)

    def bytes_in(self, spec: QuantSpec | None, high_precision_bytes: float = 2) -> float:
        """Of the whole model with its quantizable linears in a format and the rest in high precision.

        Raises:
            FormatError: a group size that does not divide a linear's columns.
        """
        return sum(c.bytes_in(spec, high_precision_bytes) for c in self.tensors)

    def kv_bytes_per_token(self, scheme: Scheme | None = None, high_precision_bytes: int = 2) -> float:
        """That one more token of one sequence takes, as long as no window is full.

        Args:
            scheme: whose formats of keys and values; None for high precision.
        """
        keys, values = (None, None) if scheme is None else (scheme.kv_keys, scheme.kv_values)
        return sum(layers.bytes_per_token(keys, values, high_precision_bytes) for layers in self.kv)

    def kv_bytes(self, tokens: int, scheme: Scheme | None = None, high_precision_bytes: int = 2) -> float:
        """Of one sequence of that length: sliding windows stop growing, and the newest tokens of a quantized cache may stay in 16 bit.

        Args:
            tokens: of the sequence.
            scheme: as in `kv_bytes_per_token`.
        """
        keys, values = (None, None) if scheme is None else (scheme.kv_keys, scheme.kv_values)
        recent = scheme.kv_residual_window if scheme is not None and keys is not None else 0
        total = 0.0
        for layers in self.kv:
            kept = tokens if layers.window is None else min(tokens, layers.window)
            newest = min(recent, kept)
            total += (kept - newest) * layers.bytes_per_token(keys, values, high_precision_bytes)
            total += newest * layers.bytes_per_token(None, None, high_precision_bytes)
        return total

    def by_role(self) -> dict[str, int]:
        """Parameters by role, in the order of `tensors`."""
        return _sums((c.role, c.parameters) for c in self.tensors)


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for key, value in pairs:
        sums[key] = sums.get(key, 0) + value
    return sums
