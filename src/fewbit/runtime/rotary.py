"""Cosine and sine of the rotary embedding, from the model's own module, so that every scaling type is what transformers makes of it.

Most types (default, linear, YaRN, Llama 3) have fixed frequencies: the table is computed once for all positions. Two have not. `dynamic`
stretches the frequencies with the length of the sequence, `longrope` switches to others beyond the original length; what transformers then
uses for a token depends on how long the sequence is in that forward pass. For these the rows of a pass are computed right before it, by the
same call that transformers makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["RotaryTable", "rotary_refusal"]

_FIXED = ("default", "linear", "yarn", "llama3")
_CHANGING = ("dynamic", "longrope")


def rotary_refusal(module: Any, head_dim: int) -> str | None:
    """Why the engine cannot use the embedding of this module; None when it can.

    Args:
        module: transformers' rotary embedding of the model.
        head_dim: channels of a head.
    """
    kind = module.rope_type
    if not isinstance(kind, str) or kind not in _FIXED + _CHANGING:
        return f"the engine does not know the rotary embedding '{kind}'"
    rotated = 2 * module.inv_freq.shape[0]
    return None if rotated == head_dim else f"the engine rotates whole heads of {head_dim} channels, the model {rotated} of them"


class RotaryTable:
    """Rows of cosine and sine by position.

    Args:
        module: transformers' rotary embedding of the model.
        positions: rows.
        dtype: of the model; the values are rounded to it, as transformers does.

    Attributes:
        tables: (cosine, sine), float32 [positions, head_dim / 2].
    """

    def __init__(self, module: Any, positions: int, dtype: torch.dtype) -> None:
        self._module = module
        self._like = torch.empty(0, dtype=dtype)
        self._changes = module.rope_type in _CHANGING
        half = module.inv_freq.shape[0]
        self.tables = (torch.zeros(positions, half), torch.zeros(positions, half))
        if not self._changes:
            self._fill(0, positions)

    def prepare(self, lengths: Sequence[int], tokens: int) -> None:
        """Make the rows of the next pass right.

        Args:
            lengths: tokens that each sequence has.
            tokens: that are appended to each.
        """
        if self._changes:
            for length in lengths:
                self._fill(length, min(length + tokens, self.tables[0].shape[0]))

    @torch.inference_mode()
    def _fill(self, first: int, last: int) -> None:
        if first >= last:
            return
        cosine, sine = self._module(self._like, torch.arange(first, last)[None])
        for table, values in zip(self.tables, (cosine, sine), strict=True):
            table[first:last] = values[0, :, : table.shape[1]].float()
