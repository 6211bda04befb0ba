"""The native extension: whether it is there, its threads, and one call that runs a Linear on tensors.

The extension is missing when fewbit was installed without a C++ compiler. Then kernels refuse with the reason, nothing fails at import.

Threads: the kernels have a pool of their own, which follows torch's thread count, so that `torch.set_num_threads` and OMP_NUM_THREADS mean
all of fewbit. Its threads sleep when they have nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fewbit import _native as native
else:
    try:
        from fewbit import _native as native
    except ImportError:
        native = None

__all__ = ["in_weight_memory", "missing_native", "native", "run_linear", "use_torch_threads"]


def missing_native() -> str | None:
    """A reason when the native extension is not there; else None."""
    if native is not None:
        return None
    return "fewbit was installed without its native code; install it where a C++ compiler is (pip install --force-reinstall fewbit)"


def use_torch_threads() -> int:
    """Let the CPU kernels run on as many threads as torch uses, and say how many those are."""
    count = torch.get_num_threads()
    if native.threads() != count:
        native.set_threads(count)
    return count


def in_weight_memory(packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of packed tensors in the native code's memory for weights: huge pages, one weight behind the other (weight_memory.hpp).

    Args:
        packed: CPU tensors; empty ones stay what they are.
    """
    copies = {}
    for name, tensor in packed.items():
        if tensor.numel() == 0:
            copies[name] = tensor
            continue
        memory = torch.from_dlpack(native.weight_memory(tensor.nbytes))
        copies[name] = memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return copies


def run_linear(linear: native.Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ W.T + bias on all threads.

    Args:
        linear: a weight [out, in] in its packed form.
        x: [..., in], float32 or bfloat16; any strides.
        bias: [out] or None.

    Returns:
        [..., out], x's dtype.
    """
    use_torch_threads()
    rows = x.detach().reshape(-1, linear.in_features)
    if rows.stride(1) != 1 and rows.shape[1] != 1:
        rows = rows.contiguous()
    y = rows.new_empty(rows.shape[0], linear.out_features)
    linear.apply(rows, y, None if bias is None else bias.detach().float().contiguous())
    return y.view(*x.shape[:-1], linear.out_features)
