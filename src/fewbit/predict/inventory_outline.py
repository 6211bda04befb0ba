"""From an inventory (`models.inventory`) to the outline that predictions are made of: matrices, heads and depth, without transformers.

An inventory knows more of the cache than an outline has room for. Both effects that matter are folded into the outline's geometry:

    sliding windows     a layer whose cache stops at w tokens reads w of the context's c: it counts as w / c of a layer
    latent attention    one vector of d values per layer, no separate values: d / 2 for keys and d / 2 for values; every head multiplies
                        all of it (absorbed projections, DeepSeek-V2, arXiv 2405.04434, section 2.1)

so that bytes of the cache are exact at the context that the outline is made for, and operations of attention to a few percent.
"""

from __future__ import annotations

from dataclasses import replace

from fewbit.models.inventory import Inventory, KVLayers, TensorClass
from fewbit.predict.outline import LinearGroup, Outline, outline_of_count

__all__ = ["outline_of_inventory"]


def outline_of_inventory(inventory: Inventory, context: int = 0) -> Outline:
    """The outline of an inventory.

    Args:
        context: tokens cached per sequence in the steps to be predicted; matters only where windows are shorter.

    Raises:
        UsageError: a bare count that no language model has.
    """
    if inventory.bare:
        outline = outline_of_count(inventory.parameters, inventory.name, depth=inventory.layers or None)
        return outline if not inventory.kv else outline.with_cache(*_geometry(inventory.kv[0]))
    groups = _groups(inventory)
    assumed = list(inventory.notes)
    layers = kv_heads = head_dim = heads = 0
    if inventory.kv:
        layers, kv_heads, head_dim, heads = _attention(inventory, context)
    else:
        assumed.append("the cache is unknown and not counted")
    return Outline(
        name=inventory.name,
        parameters=inventory.parameters,
        active_parameters=inventory.active_parameters,
        groups=groups,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        depth=inventory.layers,
        assumed=tuple(assumed),
    )


def _groups(inventory: Inventory) -> tuple[LinearGroup, ...]:
    """Linears that a step reads, the head last; a tied head is the embedding, read once more."""
    linears = [one for one in inventory.tensors if one.quantizable and len(one.shape) == 2]
    groups = [_group(one, inventory) for one in linears]
    head = next((one for one in inventory.tensors if one.role == "head" and len(one.shape) == 2), None)
    if head is None and inventory.tied:
        head = next((one for one in inventory.tensors if one.role == "embedding" and len(one.shape) == 2), None)
    if head is not None:
        groups.append(LinearGroup("lm_head", head.shape[0], head.shape[1], 1, 1, quantizable=False))
    return tuple(groups)


def _group(one: TensorClass, inventory: Inventory) -> LinearGroup:
    name = one.name.removesuffix(".weight").rpartition(".")[2]
    if one.role != "expert" or one.share >= 1.0:
        return LinearGroup(name, one.shape[0], one.shape[1], one.count, one.count)
    count = max(1, round(one.count * one.share))
    routers = sum(c.count for c in inventory.tensors if c.role == "router" and len(c.shape) == 2) or inventory.layers
    return LinearGroup(name, one.shape[0], one.shape[1], count, one.count, per_token=max(1, round(count / routers)))


def _geometry(kv: KVLayers) -> tuple[int, int, int]:
    return kv.layers, kv.heads, kv.head_dim


def _attention(inventory: Inventory, context: int) -> tuple[int, int, int, int]:
    """(layers, heads of keys and values, head dimension, heads) whose product is what a step at this context reads and multiplies."""
    widest = max(inventory.kv, key=lambda kv: kv.values_per_token / kv.layers)
    if widest.tensors == 1:
        widest = replace(widest, head_dim=widest.head_dim // 2, heads=widest.heads, tensors=2)
    per_layer = widest.heads * widest.head_dim * 2
    seen = 0.0
    for kv in inventory.kv:
        share = 1.0 if kv.window is None or context <= kv.window else kv.window / context
        seen += share * kv.values_per_token
    heads = inventory.heads or widest.heads
    latent = inventory.kv[0].tensors == 1
    return max(1, round(seen / per_layer)), widest.heads, widest.head_dim, heads * 2 if latent else heads
