"""bitsandbytes' `Linear4bit` with NF4 weights on the CPU, in inference."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from _case import block, inputs, relative_error, tiled
from _worker import Pass, serve


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    torch.set_num_threads(case["threads"])
    n, k = case["n"], case["k"]
    weight = torch.from_numpy(tiled(block(case), n)).to(torch.bfloat16)
    layers = []
    for _ in range(case["copies"]):
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False)
        layer.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, blocksize=case["group"], compress_statistics=False, quant_type="nf4", module=layer
        )
        layers.append(layer.to("cpu").eval())
    x = torch.from_numpy(inputs(case)).to(torch.bfloat16)

    def work() -> None:
        with torch.inference_mode():
            for layer in layers:
                layer(x)

    with torch.inference_mode():
        error = relative_error(layers[0](x).float().numpy(), case)
    size = layers[0].weight.nbytes + layers[0].weight.quant_state.absmax.nbytes
    version = f"bitsandbytes {bnb.__version__}, torch {torch.__version__}"
    return work, {"bytes": size, "calls": len(layers), "relative_error": error, "version": version}


if __name__ == "__main__":
    serve(setup)
