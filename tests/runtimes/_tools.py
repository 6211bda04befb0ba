"""Other tools make checkpoints; runs under the Python of an environment that has them, and imports nothing of fewbit.

    python _tools.py CASE MODEL OUT

leaves the tool's checkpoint in OUT and, in OUT.safetensors, each linear's weight as the tool's own code dequantizes it: `P.weight`
[out, in] in the dtype in which it does that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors.torch import save_file

TEXT = [f"def function_{i}(x, y):\n    return x * {i} + y ** {i % 7}\n\nimport module_{i}\n" * 12 for i in range(24)]


def linears(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The linears of the blocks, whatever class they are by now."""
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            yield name, module


def windows(directory: Path) -> list[dict[str, torch.Tensor]]:
    """Calibration text as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=128)) for text in TEXT]


def load(directory: Path, **options: Any) -> Any:
    """A model on the CPU in BF16."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map="cpu", **options)


def bitsandbytes(model: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Its 4-bit types and INT8 through transformers, which serializes them."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from transformers import BitsAndBytesConfig

    quantized = load(model, quantization_config=BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **options))
    quantized.save_pretrained(out)
    found = {}
    for name, module in linears(load(out)):
        weight = module.weight
        if options.get("load_in_8bit"):
            found[name] = int8_vectorwise_dequant(
                weight.data if weight.CB is None else weight.CB, weight.SCB if weight.SCB is not None else module.state.SCB
            )
        else:
            weight.quant_state.dtype = torch.float32
            found[name] = dequantize_4bit(weight.data, weight.quant_state)
    return found


def torchao(model: Path, out: Path, kind: str) -> dict[str, torch.Tensor]:
    """Its configurations through transformers, which serializes them."""
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )
    from transformers import TorchAoConfig

    configs: dict[str, Callable[[], Any]] = {
        "int8wo": Int8WeightOnlyConfig,
        "int8dyn": Int8DynamicActivationInt8WeightConfig,
        "fp8wo": Float8WeightOnlyConfig,
        "intx4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }
    quantized = load(model, quantization_config=TorchAoConfig(configs[kind]()))
    quantized.save_pretrained(out)
    return {name: module.weight.dequantize() for name, module in linears(load(out))}


def gptqmodel(
    model: Path, out: Path, bits: int = 4, sym: bool = True, desc_act: bool = False, checkpoint: str = "gptq"
) -> dict[str, torch.Tensor]:
    """GPTQModel's GPTQ; dequantized by its own linear."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=32, sym=sym, desc_act=desc_act, format=checkpoint, device="cpu")
    quantized = GPTQModel.load(str(model), config, dtype=torch.bfloat16)
    quantized.quantize(windows(model), batch_size=1)
    quantized.save(str(out))
    again = GPTQModel.load(str(out), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)  # BF16 would round the scales
    return {name: module.dequantize_weight().T for name, module in linears(again.model)}


def llmcompressor(model: Path, out: Path, preset: str, **options: Any) -> dict[str, torch.Tensor]:
    """llm-compressor's presets, round to nearest; dequantized by compressed-tensors."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from torch.utils.data import DataLoader
    from transformers import CompressedTensorsConfig

    quantized = load(model)
    rows = [{name: value[0] for name, value in window.items()} for window in windows(model)]
    recipe = QuantizationModifier(targets=["Linear"], scheme=preset, ignore=["lm_head"], **options)
    oneshot(model=quantized, dataset=DataLoader(rows, batch_size=1), recipe=recipe, num_calibration_samples=8)
    quantized.save_pretrained(out, save_compressed=True)
    plain = load(out, quantization_config=CompressedTensorsConfig(run_compressed=False))
    return {name: module.weight for name, module in linears(plain)}


def autoround(model: Path, out: Path, layout: str) -> dict[str, torch.Tensor]:
    """AutoRound with few iterations; dequantized as it leaves the weights, (code - zero point) x scale."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    rows = [{name: value[:, :64] for name, value in window.items()} for window in windows(model)[:8]]
    tuner = AutoRound(
        load(model), AutoTokenizer.from_pretrained(model), bits=4, group_size=32, sym=True, iters=2, nsamples=8, seqlen=64, dataset=rows,
        device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    tuned, _ = tuner.quantize()
    found = {name: module.weight.detach().clone() for name, module in linears(tuned)}
    tuner.save_quantized(str(out), format=layout)
    return found


def modelopt(model: Path, out: Path, preset: str) -> dict[str, torch.Tensor]:
    """ModelOpt's export for Hugging Face; dequantized by its own tensor classes. (What it simulates, `weight_quantizer(weight)`, is not
    what it exports: its export rounds the other way where BF16 lies between two codes. For the INT4 that it exports it has no class.)
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
    from safetensors.torch import load_file

    quantized, rows = load(model), windows(model)[:8]
    mtq.quantize(quantized, getattr(mtq, preset), lambda m: [m(**row) for row in rows])
    export_hf_checkpoint(quantized, export_dir=str(out))
    tensors, found = load_file(out / "model.safetensors"), {}
    for name in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        shape = (weight.shape[0], weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1))
        if weight.dtype == torch.uint8:
            packed = NVFP4QTensor(torch.Size(shape), torch.float32, weight)
            double = tensors[f"{name}.weight_scale_2"]
            found[name] = packed.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
            continue
        blocks = {0: 128, 1: 128} if scale.dim() == 4 else None
        scale = scale.reshape(scale.shape[0], scale.shape[2]) if blocks else scale.reshape(-1, 1) if scale.dim() == 1 else scale
        found[name] = FP8QTensor(torch.Size(shape), torch.float32, weight).dequantize(torch.float32, scale=scale, block_sizes=blocks)
    return found


CASES: dict[str, Callable[[Path, Path], dict[str, torch.Tensor]]] = {
    "bnb-nf4": lambda m, o: bitsandbytes(m, o, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb-nf4-double": lambda m, o: bitsandbytes(m, o, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb-fp4": lambda m, o: bitsandbytes(m, o, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bnb-int8": lambda m, o: bitsandbytes(m, o, load_in_8bit=True),
    "torchao-int8wo": lambda m, o: torchao(m, o, "int8wo"),
    "torchao-int8dyn": lambda m, o: torchao(m, o, "int8dyn"),
    "torchao-fp8wo": lambda m, o: torchao(m, o, "fp8wo"),
    "torchao-intx4": lambda m, o: torchao(m, o, "intx4"),
    "gptqmodel-4": gptqmodel,
    "gptqmodel-4-asym": lambda m, o: gptqmodel(m, o, sym=False),
    "gptqmodel-4-act": lambda m, o: gptqmodel(m, o, desc_act=True),
    "gptqmodel-3": lambda m, o: gptqmodel(m, o, bits=3),
    "gptqmodel-8-v2": lambda m, o: gptqmodel(m, o, bits=8, checkpoint="gptq_v2"),
    "llmcompressor-w4a16": lambda m, o: llmcompressor(m, o, "W4A16"),
    "llmcompressor-w4a16-asym": lambda m, o: llmcompressor(m, o, "W4A16_ASYM"),
    "llmcompressor-w8a8": lambda m, o: llmcompressor(m, o, "W8A8"),
    "llmcompressor-fp8": lambda m, o: llmcompressor(m, o, "FP8"),
    "llmcompressor-fp8-dynamic": lambda m, o: llmcompressor(m, o, "FP8_DYNAMIC"),
    "llmcompressor-nvfp4a16": lambda m, o: llmcompressor(m, o, "NVFP4A16"),
    "autoround-gptq": lambda m, o: autoround(m, o, "auto_gptq"),
    "autoround-awq": lambda m, o: autoround(m, o, "auto_awq"),
    "autoround": lambda m, o: autoround(m, o, "auto_round"),
    "modelopt-fp8": lambda m, o: modelopt(m, o, "FP8_DEFAULT_CFG"),
    "modelopt-fp8-pc": lambda m, o: modelopt(m, o, "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "modelopt-fp8-block": lambda m, o: modelopt(m, o, "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "modelopt-w4a16-nvfp4": lambda m, o: modelopt(m, o, "W4A16_NVFP4_CFG"),
    "modelopt-nvfp4": lambda m, o: modelopt(m, o, "NVFP4_DEFAULT_CFG"),
}


def main(case: str, model: Path, out: Path) -> None:
    weights = CASES[case](model, out)
    save_file({f"{name}.weight": value.detach().contiguous() for name, value in weights.items()}, f"{out}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
