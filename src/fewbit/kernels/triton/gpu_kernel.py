"""What the GPU engine asks of a kernel beyond `Kernel.apply`: inputs prepared once, sums left to the next kernel, linears joined.

inputs    the format that it takes its inputs in, so that one pass (norm and quantize) serves every linear that shares them
sums      the product without bias as parts [parts, M, N] that add up to it; whatever comes next adds them
join      the packed weights of linears that share their inputs (q, k, v; gate, up) as one
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fewbit.errors import KernelError
from fewbit.formats.spec import QuantSpec
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.triton.environment import on_device

__all__ = ["GpuKernel", "Rows"]


@dataclass(frozen=True)
class Rows:
    """Activations of M tokens as a linear takes them.

    Attributes:
        values: [M, K]: the model's dtype, or int8 or float8_e4m3fn codes.
        scale: float32 [M] of codes; None in high precision.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None


class GpuKernel(Kernel):
    """A kernel that the GPU engine can take apart.

    Class attributes:
        capturable: nothing in it waits for the GPU, so a CUDA graph can hold it.
    """

    capturable: bool = True

    def inputs(self, request: KernelRequest) -> QuantSpec | None:
        """The format of the codes that `sums` takes; None: it takes the inputs in high precision."""
        return None

    @abstractmethod
    def sums(self, x: Rows, packed: Mapping[str, torch.Tensor], request: KernelRequest) -> torch.Tensor:
        """x W^T in parts.

        Args:
            x: of M tokens, in the format of `inputs`.

        Returns:
            [parts, M, N], in the model's dtype when there is one part, else float32.
        """

    def join(self, packed: list[Mapping[str, torch.Tensor]], request: KernelRequest) -> dict[str, torch.Tensor] | None:
        """Packed weights that share their inputs as one of more rows; None where that cannot be."""
        return None

    def apply(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, request: KernelRequest) -> torch.Tensor:
        """See `Kernel.apply`.

        Raises:
            KernelError: x and the packed weight are on different devices.
        """
        from fewbit.kernels.triton.rows import finish, process_rows  # imports Triton

        held = next(iter(packed.values())).device
        if x.device != held:
            raise KernelError(f"{self.name}: the input is on {x.device}, the packed weight on {held}", "move one of them with `.to`")
        rows = x.reshape(-1, request.in_features).contiguous()
        inputs = self.inputs(request)
        shape = (*x.shape[:-1], request.out_features)
        if not rows.shape[0]:
            return x.new_empty(shape)
        with on_device(held):
            taken = Rows(rows) if inputs is None else process_rows(rows, request.dtype, inputs=inputs, static=packed.get("input_scale"))
            return finish(self.sums(taken, packed, request), bias, request.dtype).view(shape)
