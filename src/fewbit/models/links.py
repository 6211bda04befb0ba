"""Which layer feeds which: the links of a block along which a scale per channel may be moved, resolved against its modules.

The table of families says it with names; a block says what is really there: whether its MLP is a mixture of experts, whether the experts
are one 3-D parameter or a list of linears, how many query heads read one key-value head.

A link has a producer with channels, and readers with columns. Usually channel c feeds column c of every reader. Two things make it less
simple: in grouped-query attention a channel of a key-value head feeds one column for each query head of its group (`Link.channels`), and in
a fused projection only some rows are the producer's channels (`Link.rows`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PretrainedConfig

from fewbit.models.accounting import kv_shape
from fewbit.models.families import Family

__all__ = ["Link", "block_family", "block_links", "fused_groups"]

LinkKind = Literal["norm", "linear", "heads", "experts"]


@dataclass(frozen=True)
class Link:
    """A place where a scale can be folded.

    Attributes:
        kind: what the producer is: a `norm`; a `linear` whose outputs reach the readers channel by channel; one whose outputs do so through
            attention's `heads`; or all `experts` at once as 3-D parameters [experts, out, in], with a scale for each expert.
        producer: its dotted name in the block.
        readers: the dotted names of all modules and parameters that read what it produces.
        gain_offset: of a norm: it multiplies by offset + gain.
        head_dim, query_heads, kv_heads: of `heads`, else 0.
        per_head: a fused projection has [query, key, value] for each head, not the values last.
    """

    kind: LinkKind
    producer: str
    readers: tuple[str, ...]
    gain_offset: float = 0.0
    head_dim: int = 0
    query_heads: int = 0
    kv_heads: int = 0
    per_head: bool = False

    @property
    def shares_channels(self) -> bool:
        """Whether one channel of the producer feeds several columns of a reader."""
        return self.kind == "heads" and self.query_heads != self.kv_heads

    def channels(self, columns: int) -> torch.Tensor:
        """int64 [columns]: the producer's channel that feeds each column of the readers."""
        column = torch.arange(columns)
        if not self.shares_channels:
            return column
        head = column // self.head_dim
        return head // (self.query_heads // self.kv_heads) * self.head_dim + column % self.head_dim

    def rows(self, out_features: int, channels: int) -> torch.Tensor:
        """int64 [channels]: the producer's row of each channel.

        Args:
            out_features: all rows that it has.
        """
        channel = torch.arange(channels)
        if self.per_head and out_features != channels:
            parts = out_features // channels
            return channel // self.head_dim * parts * self.head_dim + (parts - 1) * self.head_dim + channel % self.head_dim
        return channel + (out_features - channels)


def block_family(family: Family, block: nn.Module) -> Family:
    """The row that holds for this block: the sparse one where it has a mixture of experts."""
    has_experts = family.experts and any(name == family.experts for name, _ in block.named_modules())
    return family.sparse if family.sparse is not None and has_experts else family


def block_links(family: Family, config: PretrainedConfig, block: nn.Module) -> list[Link]:
    """The links of one block, in the order in which data flows through attention and MLP.

    Links whose producer or readers the block lacks are left out, as are those whose condition the configuration does not meet.

    Args:
        family: the row of the table.
        config: the model's.
        block: its modules, on any device; `meta` will do.
    """
    text = config.get_text_config(decoder=True)
    row = block_family(family, block)
    found: list[Link] = []
    if _holds(row, "norms", text):
        found += [Link("norm", norm, tuple(_expanded(block, row, readers)), row.norm_gain_offset) for norm, readers in row.norms.items()]
    if _holds(row, "head_pairs", text):
        _, kv_heads, head_dim = kv_shape(config)
        heads, per_head = text.num_attention_heads, row.packed_values == "per_head"
        found += [Link("heads", p, (c,), 0.0, head_dim, heads, kv_heads, per_head) for p, c in row.head_pairs]
    if _holds(row, "value_pairs", text):
        for producer, consumer in row.value_pairs:
            found += _pairs(block, row, producer, consumer)
    return [link for link in found if link.readers and all(_exists(block, name) for name in (link.producer, *link.readers))]


def fused_groups(family: Family, block: nn.Module) -> list[tuple[str, ...]]:
    """Linears of the block that a runtime joins into one; those of a mixture's experts, expert by expert.

    Groups of which the block lacks a member are left out, so are experts that are one parameter already.
    """
    row = block_family(family, block)
    groups = []
    for names in row.fused:
        if "*" in names[0]:
            groups += [tuple(name.replace("*", expert) for name in names) for expert in _experts(block, row)]
        else:
            groups.append(names)
    return [group for group in groups if all(_exists(block, name) for name in group)]


def _holds(row: Family, what: str, config: PretrainedConfig) -> bool:
    return all(getattr(config, name, None) == value for name, value in row.needs.get(what, {}).items())


def _exists(block: nn.Module, name: str) -> bool:
    """Whether the block has a module with a weight, or a parameter, of that dotted name."""
    parent, _, last = name.rpartition(".")
    try:
        owner = block.get_submodule(parent)
    except AttributeError:
        return False
    found = getattr(owner, last, None)
    return isinstance(found, nn.Parameter) or getattr(found, "weight", None) is not None


def _experts(block: nn.Module, row: Family) -> list[str]:
    """The names of a mixture's experts when they are modules of their own; empty when they are 3-D parameters."""
    return [name for name, _ in block.get_submodule(row.experts).named_children() if name.isdigit()]


def _expanded(block: nn.Module, row: Family, names: tuple[str, ...]) -> Iterator[str]:
    """Names with `*` replaced by each expert, or by the 3-D parameter that holds the linear of all."""
    given: set[str] = set()
    for name in names:
        for real in [name] if "*" not in name else [name.replace("*", expert) for expert in _experts(block, row)] or [_stacked(name)]:
            if real not in given:
                given.add(real)
                yield real


def _stacked(name: str) -> str:
    """`mlp.experts.*.up_proj` -> `mlp.experts.gate_up_proj`: transformers keeps gate and up of all experts as one parameter."""
    prefix, _, last = name.partition("*.")
    return prefix + {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}.get(last, last)


def _pairs(block: nn.Module, row: Family, producer: str, consumer: str) -> Iterator[Link]:
    if "*" not in producer:
        yield Link("linear", producer, (consumer,))
        return
    experts = _experts(block, row)
    for expert in experts:
        yield Link("linear", producer.replace("*", expert), (consumer.replace("*", expert),))
    if not experts:
        yield Link("experts", _stacked(producer), (_stacked(consumer),))
