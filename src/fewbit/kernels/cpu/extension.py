"""The native extension: whether it is there, its threads, and one call that runs a Linear on tensors.

The extension is missing when fewbit was installed without a C++ compiler. Then kernels refuse with the reason, nothing fails at import.

Threads: the kernels have a pool of their own, which follows torch's thread count, so that `torch.set_num_threads` and OMP_NUM_THREADS mean
all of fewbit. Its threads sleep when they have nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.utils.dlpack import from_dlpack

from fewbit.kernels.base import KernelRequest

if TYPE_CHECKING:
    from fewbit import _native as native
else:
    try:
        from fewbit import _native as native
    except ImportError:
        native = None

__all__ = ["in_weight_memory", "missing_native", "native", "refuse_ragged_groups", "refuse_request", "run_linear", "use_torch_threads"]

_LINE_BYTES = 64


def missing_native() -> str | None:
    """A reason when the native extension is not there; else None."""
    if native is not None:
        return None
    return "fewbit was installed without its native code; install it again where a C++ compiler is"


def refuse_request(request: KernelRequest) -> str | None:
    """Why none of the native kernels could run a request here; None when nothing stands against it but the shape."""
    if request.device != "cpu":
        return f"runs on the CPU, not on {request.device}"
    if request.dtype not in (torch.bfloat16, torch.float32):
        return f"takes inputs in bfloat16 or float32, not {request.dtype}"
    return missing_native()


def refuse_ragged_groups(request: KernelRequest) -> str | None:
    """A reason when the last group of a row would be short; else None."""
    size = None if request.weights is None else request.weights.group_size
    if size is None or request.in_features % size == 0:
        return None
    return f"needs in_features divisible by the group size, {size}, not {request.in_features}"


def use_torch_threads() -> int:
    """Let the CPU kernels run on as many threads as torch uses, and say how many those are."""
    count = torch.get_num_threads()
    if native.threads() != count:
        native.set_threads(count)
    return count


def in_weight_memory(packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of packed tensors in the native code's memory for weights (huge pages, weight_memory.hpp), tile by tile one behind the other.

    At one token a weight is read from end to end; its scales in a second stream beside its codes would cost bandwidth.

    Args:
        packed: CPU tensors [tiles, ...], and others of one dimension (tables, factors), which are copied as they are.

    Returns:
        Views of one memory: tensor i of tile t, then tensor i + 1 of tile t, ..., then tile t + 1, each on a cache line.
    """
    tiled = {name: tensor for name, tensor in packed.items() if tensor.dim() > 1}
    views = {name: tensor.clone() for name, tensor in packed.items() if name not in tiled}
    starts, stride = {}, 0
    for name, tensor in tiled.items():
        starts[name] = stride
        stride += -(-tensor[:1].nbytes // _LINE_BYTES) * _LINE_BYTES
    tiles = max((tensor.shape[0] for tensor in tiled.values()), default=0)
    memory = from_dlpack(native.weight_memory(tiles * stride))
    for name, tensor in tiled.items():
        size = tensor.element_size()
        inner = tensor[:1].contiguous().stride()[1:]
        views[name] = memory.view(tensor.dtype).as_strided(tensor.shape, (stride // size, *inner), starts[name] // size)
        views[name].copy_(tensor)
    return views


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
    y = rows.new_empty(rows.shape[0], linear.out_features)
    if rows.shape[0] == 0:  # torch takes an empty tensor for contiguous whatever its strides
        return y.view(*x.shape[:-1], linear.out_features)
    if rows.stride(1) != 1 and rows.shape[1] != 1:
        rows = rows.contiguous()
    linear.apply(rows, y, None if bias is None else bias.detach().float().contiguous())
    return y.view(*x.shape[:-1], linear.out_features)
