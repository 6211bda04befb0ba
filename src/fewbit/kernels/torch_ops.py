"""What this build of torch has. The operators that the fused CPU kernels call are not part of torch's stable interface: one may be absent
in another release or build, and that is a reason to pass a kernel over, not an ImportError."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["aligned", "missing_ops"]

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` contiguous and beginning on a cache line; a copy only when it is not so already (a slice, a view into a mapped file)."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def missing_ops(names: Iterable[str], namespace: str = "aten") -> str | None:
    """A reason naming the operators that this torch lacks; None when all are there."""
    missing = [name for name in names if not hasattr(getattr(torch.ops, namespace), name)]
    return f"torch {torch.__version__} has no {namespace}::{', '.join(missing)}" if missing else None
