"""GGUF files of the decode benchmark: random weights in a model's published shapes, in BF16, and what llama-quantize makes of them.

    python benchmarks/peers/decode_models.py qwen2.5-0.5b          # BF16, Q4_0 and Q8_0 under benchmarks/.peers/llamacpp/models

The speed of a product does not depend on the weights' values, so a block of random numbers that repeats will do; every tensor begins at
another place of it, or a runtime would find the layers equal and keep one of them. The vocabulary is made up (words `t0`, `t1`, ...), as
large as the model's. Run by fewbit's own Python: the shapes are `fewbit.models.shapes`'.
"""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from fewbit.models.shapes import shapes_config

__all__ = ["TYPES", "model_file"]

TYPES = ("bf16", "q4_0", "q8_0")
_LLAMA = Path(__file__).parent.parent / ".peers" / "llamacpp"
_LAYER = {
    "attn_q.weight": ("heads", "hidden"),
    "attn_k.weight": ("kv", "hidden"),
    "attn_v.weight": ("kv", "hidden"),
    "attn_output.weight": ("hidden", "heads"),
    "ffn_gate.weight": ("inner", "hidden"),
    "ffn_up.weight": ("inner", "hidden"),
    "ffn_down.weight": ("hidden", "inner"),
    "attn_norm.weight": ("hidden",),
    "ffn_norm.weight": ("hidden",),
    "attn_q.bias": ("heads",),
    "attn_k.bias": ("kv",),
    "attn_v.bias": ("kv",),
}


def model_file(shapes: str, kind: str) -> Path:
    """The GGUF file of these shapes in one of `TYPES`, made when it is missing.

    Raises:
        ValueError: shapes of another architecture than Qwen2 with tied embeddings, or no such type.
        subprocess.CalledProcessError: llama-quantize failed.
    """
    if kind not in TYPES:
        raise ValueError(f"unknown type '{kind}', choose one of {', '.join(TYPES)}")
    path = _LLAMA / "models" / f"{shapes}-{kind}.gguf"
    if path.is_file():
        return path
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    if kind == "bf16":
        _write(partial, shapes_config(shapes))
    else:
        command = [_LLAMA / "build" / "bin" / "llama-quantize", model_file(shapes, "bf16"), partial, kind.upper(), "2"]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr, stderr=subprocess.DEVNULL)
    partial.rename(path)
    return path


def _write(path: Path, config: Any) -> None:
    if config.model_type != "qwen2" or not config.tie_word_embeddings:
        raise ValueError(f"{config.name_or_path} is not a Qwen2 model with tied embeddings")
    writer = GGUFWriter(path, "qwen2")
    writer.add_name(config.name_or_path)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(32)  # mostly BF16
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])
    # The two special words are marked as such: without any OpenVINO's tokenizer does not compile ("ReadValue contains dead weak ptr").
    special, normal = TokenType.CONTROL, TokenType.NORMAL
    writer.add_token_types([special, special, *[normal] * (config.vocab_size - 2)])
    writer.add_token_merges(["t 0", "t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    head_dim = config.hidden_size // config.num_attention_heads
    sizes = {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "heads": config.num_attention_heads * head_dim,
        "kv": config.num_key_value_heads * head_dim,
    }
    block = np.random.default_rng(0).standard_normal(1_048_583, dtype=np.float32) * np.float32(0.02)
    _add(writer, "token_embd.weight", (config.vocab_size, config.hidden_size), block)
    for layer in range(config.num_hidden_layers):
        for name, axes in _LAYER.items():
            _add(writer, f"blk.{layer}.{name}", tuple(sizes[axis] for axis in axes), block)
    _add(writer, "output_norm.weight", (config.hidden_size,), block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, name: str, shape: tuple[int, ...], block: np.ndarray) -> None:
    if len(shape) == 1:
        writer.add_tensor(name, np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32))
        return
    halves = (block.view(np.uint32) >> 16).astype(np.uint16)  # BF16 by cutting: random numbers stay random
    data = np.resize(np.roll(halves, zlib.crc32(name.encode())), shape).view(np.uint8)
    writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.BF16)


if __name__ == "__main__":
    for shapes_name in sys.argv[1:]:
        for type_name in TYPES:
            print(model_file(shapes_name, type_name))
