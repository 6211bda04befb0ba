"""What `fewbit convert` carried over, and what it lost."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN

__all__ = ["ConvertResult"]


@dataclass(frozen=True, config=FROZEN)
class ConvertResult:
    """What `fewbit convert` wrote.

    Attributes:
        model, out: from where, and the directory or file that was made.
        source_layout, source_scheme: of the checkpoint that was read. layout, layout_format, scheme: of the one that was written.
        quantized_linears: linears that were carried over.
        kept_tensors: tensors in high precision, unchanged.
        scales: stored scales of the source. rounded_scales: of those, the ones that the new layout cannot hold exactly.
        worst_scale_change: largest relative change of a scale.
        losses: what is not as in the source, one sentence each; empty: every integer, scale and zero point is.
        source_bytes, checkpoint_bytes: of the files' tensors.
        notes: what else there is to know.
    """

    model: str
    out: str
    source_layout: str
    source_scheme: str
    layout: str
    layout_format: str
    scheme: str
    quantized_linears: int
    kept_tensors: int
    scales: int
    rounded_scales: int
    worst_scale_change: float
    losses: list[str]
    source_bytes: int
    checkpoint_bytes: int
    duration_s: float
    notes: list[str] = Field(default_factory=list)
