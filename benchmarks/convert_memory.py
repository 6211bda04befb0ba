"""The memory bar of `fewbit convert`: a checkpoint is larger than what is needed to write it in another layout.

    python benchmarks/convert_memory.py --folder /where/5/GB/are/free        # all 32 blocks of Llama-2-7B
    python benchmarks/convert_memory.py --blocks 4                           # the first ones: the peak does not depend on their number
    python benchmarks/convert_memory.py --list

A GPTQ checkpoint (affine, version 2) in the shapes of Llama-2-7B is made of holes: zeros that take no disk, with real headers. It is
converted to AWQ in a process of its own, streaming, and checked by reading it back; the peak is VmHWM of that process, interpreter and
libraries included. Embedding and head have their full 262 MB each whatever the number of blocks, and are the largest tensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _bars import Bar, NotMeasuredError, add_arguments, run_bars
from faults import write_tokenizer

GIB = 2**30
GROUP = 128
PROGRAM = """
import sys
from pathlib import Path
from fewbit.workflows.convert import convert_checkpoint
convert_checkpoint(sys.argv[1], layout="awq", out=sys.argv[2])
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(line.split()[1]) * 1024)
"""


def write_holes(directory: Path, blocks: int) -> Path:
    """A checkpoint whose tensors are zeros that the file system does not store."""
    from fewbit.models.shapes import shapes_config

    config = shapes_config("llama-2-7b")
    config.num_hidden_layers = blocks
    config.architectures = ["LlamaForCausalLM"]
    fields = {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": False, "quant_method": "gptq", "checkpoint_format": "gptq_v2"}
    config.quantization_config = {**fields, "lm_head": False}
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    tensors: dict[str, tuple[str, list[int]]] = {
        name: ("BF16", [vocabulary, hidden]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    tensors["model.norm.weight"] = ("BF16", [hidden])
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears = {**attention, "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ("BF16", [hidden])
        for name, (rows, columns) in linears.items():
            tensors[f"{prefix}.{name}.qweight"] = ("I32", [columns // 8, rows])
            tensors[f"{prefix}.{name}.qzeros"] = ("I32", [columns // GROUP, rows // 8])
            tensors[f"{prefix}.{name}.scales"] = ("F16", [columns // GROUP, rows])
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"BF16": 2, "F16": 2, "I32": 4}[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    directory.mkdir(parents=True)
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    config.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def peak(folder: Path, blocks: int) -> float:
    """Peak resident memory in GiB."""
    with tempfile.TemporaryDirectory(prefix="fewbit-convert-", dir=folder) as place:
        source = write_holes(Path(place) / "source", blocks)
        command = [sys.executable, "-c", PROGRAM, str(source), str(Path(place) / "out")]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise NotMeasuredError((process.stderr.strip().splitlines() or ["no message"])[-1])
    return int(process.stdout.strip().splitlines()[-1]) / GIB


def main() -> None:
    """Measure, and print the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are put")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of the model")
    options = parser.parse_args()
    note = f"GiB of VmHWM, GPTQ to AWQ in the shapes of Llama-2-7B, {options.blocks} blocks"
    bars = [Bar("convert-peak-memory", lambda: peak(options.folder, options.blocks), "<", 1.5, note)]
    raise SystemExit(run_bars(bars, list_only=options.list, json_file=options.json))


if __name__ == "__main__":
    main()
