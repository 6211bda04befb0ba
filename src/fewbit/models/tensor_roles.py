"""What tensors are for, guessed from their names: for architectures that no table knows.

Names of weights are alike enough across architectures that embedding, head, norms, routers, experts, attention and feed-forward layers can
be told apart. What the guess cannot tell is `other`; a matrix among those still counts as a linear, as it does for transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fewbit.models.inventory import Role, TensorClass

__all__ = ["classes_of_tensors", "role_of_tensor"]

_RULES: tuple[tuple[Role, str], ...] = (
    ("vision", r"(^|\.)(vision|visual|image|multi_modal|mm_|audio|patch)"),
    ("embedding", r"(embed_tokens|tok_embeddings|word_embeddings|embed_in|(^|\.)wte|(^|\.)wpe|embed_positions|(^|\.)embeddings?)\.weight$"),
    ("head", r"(^|\.)(lm_head|embed_out|output)\.(weight|bias)$"),
    ("norm", r"(norm|(^|\.)ln_?[\dfa-z]*)\.(weight|bias)$|norm\d*\.(weight|bias)$"),
    ("router", r"(router|(mlp|moe|block_sparse_moe|feed_forward)\.gate|shared_expert_gate)(\.|$)"),
    ("shared_expert", r"shared_(expert|mlp)"),
    ("expert", r"(^|\.)experts?(\.|_)"),
    ("attention", r"attn|attention|(^|\.)(q|k|v|o|qkv)_proj"),
    ("mlp", r"mlp|ffn|feed_forward|(^|\.)(fc\d|gate_proj|up_proj|down_proj|w[123]|dense_h_to_4h|dense_4h_to_h)(\.|$)"),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def role_of_tensor(name: str) -> Role:
    """The role that a dotted tensor name suggests."""
    return next((role for role, pattern in _RULES if re.search(pattern, name)), "other")


def classes_of_tensors(
    shapes: Mapping[str, tuple[int, ...]], *, layers: int, expert_share: float = 1.0
) -> tuple[tuple[TensorClass, ...], tuple[TensorClass, ...]]:
    """Classes of tensors by name and shape.

    Args:
        shapes: of all tensors, by dotted name.
        layers: blocks of the decoder; what belongs to later ones guesses further tokens.
        expert_share: of all tokens, those that reach one expert.

    Returns:
        (the model's, those stored beside it).
    """
    counts: dict[tuple[str, Role, tuple[int, ...]], int] = {}
    for name, shape in shapes.items():
        role = role_of_tensor(name)
        block = _LAYER.search(name)
        if block and int(block[1]) >= layers and role != "vision":
            role = "extra"
        stacked = role == "expert" and len(shape) == 3  # transformers keeps the experts of a block in one tensor
        key = (_NUMBER.sub("*", name), role, shape[1:] if stacked else shape)
        counts[key] = counts.get(key, 0) + (shape[0] if stacked else 1)
    classes = [
        TensorClass(
            name,
            role,
            shape,
            count,
            linear=len(shape) == 2 and role not in ("embedding", "norm", "router", "extra"),
            share=expert_share if role == "expert" else 1.0,
        )
        for (name, role, shape), count in counts.items()
    ]
    return tuple(c for c in classes if c.role != "extra"), tuple(c for c in classes if c.role == "extra")
