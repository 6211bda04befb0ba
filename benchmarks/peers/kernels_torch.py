"""Linear layers of torch on the CPU: BF16 plain and prepacked by oneDNN, INT4 in groups, W8A8 by oneDNN, and the unfused way.

`unfused-int4` and `unfused-nf4` are what a program does that has a format and no kernel for it: dequantize the weight, then multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _case import block, distinct, inputs, relative_error, tiled
from _worker import Pass, serve

Call = Callable[[torch.Tensor], torch.Tensor]
_NF4_NEGATIVE = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0)
_NF4_POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
_NF4 = torch.tensor([*_NF4_NEGATIVE, *_NF4_POSITIVE])


def _copies(packed: torch.Tensor, case: dict[str, Any]) -> list[torch.Tensor]:
    array = packed.contiguous().view(torch.uint8).numpy()
    return [torch.from_numpy(distinct(array, i)).view(packed.dtype).view(packed.shape) for i in range(case["copies"])]


def _groups(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0..15 [n, k] uint8 and scales float32 [n, k / group] of symmetric INT4."""
    rows = torch.from_numpy(block(case)).view(256, -1, case["group"])
    scale = rows.abs().amax(-1, keepdim=True) / 7
    codes = (torch.round(rows / scale).clamp(-8, 7) + 8).to(torch.uint8).view(256, -1)
    return torch.from_numpy(tiled(codes.numpy(), case["n"])), torch.from_numpy(tiled(scale.squeeze(-1).numpy(), case["n"]))


def bf16(case: dict[str, Any]) -> tuple[list[Call], int]:
    """F.linear."""
    weight = torch.from_numpy(tiled(block(case), case["n"])).to(torch.bfloat16)
    weights = [w.view(torch.bfloat16) for w in _copies(weight.view(torch.int16), case)]
    return [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights], weight.nbytes


def bf16_prepacked(case: dict[str, Any]) -> tuple[list[Call], int]:
    """oneDNN's linear over a weight in oneDNN's own order, as torch.compile's freezing makes it."""
    weight = torch.from_numpy(tiled(block(case), case["n"])).to(torch.bfloat16)
    run = torch.ops.mkldnn._linear_pointwise
    reorder = torch.ops.mkldnn._reorder_linear_weight
    packed = [reorder(w.view(torch.bfloat16), case["m"]) for w in _copies(weight.view(torch.int16), case)]
    return [lambda x, w=w: run(x, w, None, "none", [], "") for w in packed], weight.nbytes


def int4(case: dict[str, Any]) -> tuple[list[Call], int]:
    """_weight_int4pack_mm_for_cpu."""
    codes, scale = _groups(case)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    both = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
    run, group = torch.ops.aten._weight_int4pack_mm_for_cpu, case["group"]
    weights = [(w, both.clone()) for w in _copies(packed, case)]
    calls: list[Call] = [lambda x, w=w, s=s: run(x, w, group, s) for w, s in weights]
    return calls, packed.nbytes + both.nbytes


def w8a8(case: dict[str, Any]) -> tuple[list[Call], int]:
    """onednn::qlinear_pointwise; the inputs are quantized per token in every call."""
    rows = torch.from_numpy(tiled(block(case), case["n"]))
    scale = rows.abs().amax(1) / 127
    values = torch.round(rows / scale[:, None]).to(torch.int8)
    packed = [torch.ops.onednn.qlinear_prepack(w, None) for w in _copies(values, case)]
    zeros = torch.zeros(case["n"], dtype=torch.int32)
    run = torch.ops.onednn.qlinear_pointwise.default

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = x.float()
        step = x.abs().amax(1, keepdim=True) / 127
        codes = (torch.round(x / step) + 128).to(torch.uint8)
        y: torch.Tensor = run(codes, 1.0, 128, w, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        return y.mul_(step)

    return [lambda x, w=w: call(x, w) for w in packed], values.nbytes


def unfused_int4(case: dict[str, Any]) -> tuple[list[Call], int]:
    """Unpack and dequantize to BF16, then F.linear."""
    codes, scale = _groups(case)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    scale = scale.to(torch.bfloat16)[..., None]

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        both = torch.stack([w & 15, w >> 4], -1).view(case["n"], -1, case["group"])
        weight = (both.to(torch.bfloat16) - 8) * scale
        return torch.nn.functional.linear(x, weight.view(case["n"], -1))

    return [lambda x, w=w: call(x, w) for w in _copies(packed, case)], packed.nbytes + scale.nbytes


def unfused_nf4(case: dict[str, Any]) -> tuple[list[Call], int]:
    """Look up in the table of NF4, scale to BF16, then F.linear."""
    rows = torch.from_numpy(block(case)).view(256, -1, case["group"])
    scale = rows.abs().amax(-1, keepdim=True)
    codes = (rows / scale)[..., None].sub(_NF4).abs().argmin(-1).to(torch.uint8).view(256, -1)
    codes = torch.from_numpy(tiled(codes.numpy(), case["n"]))
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    scale = torch.from_numpy(tiled(scale.numpy(), case["n"])).to(torch.bfloat16)
    table = _NF4.to(torch.bfloat16)

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        both = torch.stack([w & 15, w >> 4], -1).view(case["n"], -1, case["group"])
        return torch.nn.functional.linear(x, (table[both.int()] * scale).view(case["n"], -1))

    return [lambda x, w=w: call(x, w) for w in _copies(packed, case)], packed.nbytes + scale.nbytes


_CONTENDERS = {
    "torch-bf16": bf16,
    "torch-bf16-prepacked": bf16_prepacked,
    "torch-int4": int4,
    "torch-w8a8": w8a8,
    "unfused-int4": unfused_int4,
    "unfused-nf4": unfused_nf4,
}


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    torch.set_num_threads(case["threads"])
    calls, size = _CONTENDERS[case["contender"]](case)
    x = torch.from_numpy(inputs(case)).to(torch.bfloat16)

    def work() -> None:
        with torch.inference_mode():
            for call in calls:
                call(x)

    with torch.inference_mode():
        error = relative_error(calls[0](x).float().numpy(), case)
    return work, {"bytes": size, "calls": len(calls), "relative_error": error, "version": f"torch {torch.__version__}"}


if __name__ == "__main__":
    np.seterr(all="raise")
    serve(setup)
