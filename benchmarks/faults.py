"""The bars of never losing work: kill -9 at random moments, a full disk, and weights and inputs that break naive code.

    python benchmarks/faults.py            # about five minutes; the tmpfs bar needs root and fails without
    python benchmarks/faults.py --list

Every run is a process of its own, forked from one that has imported everything, on a tiny model with random weights. What an interrupted
and resumed run leaves is compared with an uninterrupted run, file by file and byte by byte.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _bars import Bar, NotMeasuredError, add_arguments, run_bars

if TYPE_CHECKING:
    import torch

    from fewbit.results import QuantizeResult

KILLS = 20
SCHEME = "W4A16-G32"
_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of bytes and some pairs of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([inspect.getsource(argparse)], trainer)
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")  # type: ignore[no-untyped-call]
    fast.save_pretrained(directory)


def write_model(directory: Path, change: Callable[[torch.nn.Module], None] | None = None, *, experts: int = 0) -> Path:
    """A Llama, or a Mixtral, with random weights, changed by `change` before it is written."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    config = MixtralConfig(**_SIZES, num_local_experts=experts, num_experts_per_tok=2) if experts else LlamaConfig(**_SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)  # type: ignore[no-untyped-call]
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def quantize(model: Path, out: Path, progress: Callable[[int, int, str], None] | None = None, **changes: Any) -> QuantizeResult:
    """GPTQ with a gate that random weights pass, on one thread."""
    import torch

    from fewbit.walk.settings import CalibrationChoice, GateChoice, WalkSettings
    from fewbit.workflows.quantize import quantize_model

    torch.set_num_threads(1)
    text = Path(inspect.getsourcefile(argparse) or "")
    settings = WalkSettings(
        method="gptq",
        calibration=CalibrationChoice(files=(text,), samples=8, sequence_length=64),
        gate=GateChoice(texts=(text,), windows=4, sequence_length=32, threshold=100.0),
    )
    return quantize_model(model, scheme=SCHEME, out=out, settings=replace(settings, **changes), progress=progress)


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file of a checkpoint."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def different_files(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """Names of files that are missing on one side or differ."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def _child(model: Path, out: Path) -> None:
    quantize(model, out)


@dataclass
class Faults:
    """Runs the experiments in a folder of its own.

    Attributes:
        root: where models and checkpoints are put.
        seed: of the moments.
        resumed_blocks: blocks that resumed runs found finished; the experiment means something only when there are some.
    """

    root: Path
    seed: int = 0
    resumed_blocks: int = 0
    killed: int = 0
    differing: list[str] = field(default_factory=list)

    @cached_property
    def model(self) -> Path:
        """The healthy model."""
        return write_model(self.root / "model")

    @cached_property
    def expected(self) -> tuple[dict[str, bytes], float]:
        """The files of an uninterrupted run, and the seconds that it takes."""
        quantize(self.model, self.root / "first")  # imports everything, so that the children below do not, and begin at once
        started = time.monotonic()
        self.run(self.root / "whole")
        return files_of(self.root / "whole"), time.monotonic() - started

    def run(self, out: Path, kill_after: float | None = None) -> bool:
        """One run in a process of its own; True when it was killed before it ended."""
        process = multiprocessing.get_context("fork").Process(target=_child, args=(self.model, out))
        process.start()
        if kill_after is not None:
            time.sleep(kill_after)
            process.kill()
        process.join()
        if kill_after is None and process.exitcode != 0:
            raise NotMeasuredError(f"a run that nobody disturbed ended with exit code {process.exitcode}")
        return process.exitcode == -9

    def kill(self, times: int) -> None:
        """Kill so many runs at random moments, resume each, and compare."""
        expected, seconds = self.expected
        generator = random.Random(self.seed)
        for trial in range(times):
            out = self.root / f"killed-{trial}"
            self.killed += self.run(out, generator.random() * seconds)
            partial = out.with_name(f"{out.name}.partial")
            self.resumed_blocks += len(list(partial.glob("steps/block-*.json")))
            if not out.exists() or partial.exists():
                self.run(out)
            self.differing += different_files(expected, files_of(out))
            if partial.exists():
                self.differing.append(partial.name)

    def full_disk(self) -> list[str]:
        """A disk that is too small is refused; one that somebody else fills meanwhile stops the run; with room again it goes on.

        Returns:
            What was wrong.

        Raises:
            NotMeasuredError: no tmpfs can be mounted.
        """
        from fewbit.errors import OutputError, UsageError

        mount = self.root / "tmpfs"
        mount.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotMeasuredError(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        wrong: list[str] = []
        filler = mount / "filler"

        def fill(blocks: int, *_: object) -> None:
            if blocks == 1 and not filler.exists():
                filler.write_bytes(bytes(shutil.disk_usage(mount).free - 2 * 4096))

        try:
            try:
                quantize(self.model, mount / "out")
                wrong.append("a disk that is too small was not refused")
            except UsageError:
                wrong += [f"{path.name} is there" for path in mount.iterdir()]
            subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
            try:
                quantize(self.model, mount / "out", progress=fill)
                wrong.append("the disk was not full")
            except OutputError as error:
                if "No space left" not in str(error):
                    wrong.append(f"another error: {error}")
            if (mount / "out").exists():
                wrong.append("a checkpoint is there")
            finished = len(list((mount / "out.partial").glob("steps/block-*.json")))
            if not finished:
                wrong.append("no finished block was kept")
            filler.unlink()
            result = quantize(self.model, mount / "out")
            if sum(block.resumed for block in result.blocks) != finished:
                wrong.append("finished blocks were done again")
            wrong += different_files(self.expected[0], files_of(mount / "out"))
        finally:
            subprocess.run(["umount", str(mount)], check=True)
        return wrong


# ------------------------------------------------------------------------------------------------ weights and inputs that break


def bad_numbers(out: Path) -> list[str]:
    """Tensors of a checkpoint that are not finite."""
    from fewbit.checkpoints.safetensors_files import SafetensorsFiles

    files = SafetensorsFiles(out)
    floats = (name for name in files.names() if files.get(name).is_floating_point())
    return [name for name in floats if not bool(files.get(name).float().isfinite().all())]


def nan_weights(root: Path) -> list[str]:
    """A NaN among the weights: the tensor is named, nothing is written."""
    from fewbit.errors import CheckpointError

    def poison(model: Any) -> None:
        model.model.layers[2].mlp.up_proj.weight[3, 5] = float("nan")

    model = write_model(root / "nan", poison)
    try:
        quantize(model, root / "nan-out")
    except CheckpointError as error:
        wrong = [] if "model.layers.2.mlp.up_proj.weight" in str(error) and "NaN" in str(error) else [str(error)]
        return wrong + (["a checkpoint was written"] if (root / "nan-out").exists() else [])
    return ["no error"]


def rank_deficient(root: Path) -> list[str]:
    """Fewer tokens than columns: the second moments are singular, and damping or a fallback deals with it."""
    from fewbit.walk.settings import CalibrationChoice

    text = Path(inspect.getsourcefile(argparse) or "")
    model = write_model(root / "few")
    few = CalibrationChoice(files=(text,), samples=1, sequence_length=16)
    result = quantize(model, root / "few-out", calibration=few)
    wrong = [layer.name for layer in result.layers if layer.method == "high precision" or layer.error is None]
    return wrong + bad_numbers(root / "few-out")


def zero_layer(root: Path) -> list[str]:
    """A linear whose weights are all zero stays zero."""
    import torch

    from fewbit.checkpoints.compressed_tensors import CompressedTensorsReader
    from fewbit.formats.quantize import dequantize

    name = "model.layers.1.self_attn.o_proj"

    def silence(model: Any) -> None:
        model.get_submodule(name).weight.zero_()

    quantize(write_model(root / "zero", silence), root / "zero-out")
    reader = CompressedTensorsReader(root / "zero-out")
    wrong = [] if name in reader.linears and not bool(torch.count_nonzero(dequantize(reader.read(name)))) else ["the zeros are not zero"]
    return wrong + bad_numbers(root / "zero-out")


def dead_inputs(root: Path) -> list[str]:
    """Channels that no token uses: they take no part, and the others are rounded as well as ever."""

    def deaden(model: Any) -> None:
        model.model.layers[0].input_layernorm.weight[:16] = 0
        model.model.layers[3].mlp.up_proj.weight[:32] = 0

    result = quantize(write_model(root / "dead", deaden), root / "dead-out")
    told = [layer for layer in result.layers if any("dead input columns" in note for note in layer.notes)]
    wrong = [] if len(told) == 4 else [f"{len(told)} layers were found to have dead inputs, q, k, v and down_proj do"]
    wrong += [layer.name for layer in told if layer.error is None or layer.rtn_error is None or layer.error > layer.rtn_error]
    return wrong + bad_numbers(root / "dead-out")


def idle_expert(root: Path) -> list[str]:
    """An expert that no token is ever sent to gets sane numbers, and the report says so."""

    def shun(model: Any) -> None:
        for layer in model.model.layers:
            gate = (
                layer.mlp.gate.weight
            )  # [5, hidden]: of v and -v one is positive, and of w and -w; the last one's zero is never in the top two
            gate[1], gate[3], gate[4] = -gate[0], -gate[2], 0

    result = quantize(write_model(root / "moe", shun, experts=5), root / "moe-out")
    counts = [experts.tokens for block in result.blocks for experts in block.experts]
    wrong = [] if counts and all(tokens[4] == 0 for tokens in counts) else [f"tokens per expert: {counts}"]
    idle = [layer for layer in result.layers if ".experts.4." in layer.name]
    wrong += [layer.name for layer in idle if layer.method == "high precision"] + ([] if len(idle) == 12 else ["linears are missing"])
    return wrong + bad_numbers(root / "moe-out")


BROKEN: Mapping[str, Callable[[Path], list[str]]] = {
    "nan-weights": nan_weights,
    "rank-deficient-moments": rank_deficient,
    "all-zero-layer": zero_layer,
    "dead-inputs": dead_inputs,
    "idle-expert": idle_expert,
}


def bars(root: Path, seed: int) -> list[Bar]:
    """All bars, in the order in which they are measured."""
    faults = Faults(root, seed)

    def differing() -> float:
        faults.kill(KILLS)
        return len(faults.differing)

    def count(find: Callable[[], list[str]]) -> Callable[[], float]:
        def measure() -> float:
            wrong = find()
            if wrong:
                print(json.dumps(wrong), file=sys.stderr)
            return len(wrong)

        return measure

    return [
        Bar("kills-differing-files", differing, "==", 0, f"files that differ after {KILLS} kills at random moments"),
        Bar("kills-that-hit", lambda: faults.killed, ">=", KILLS * 0.8, "runs that were killed before they ended"),
        Bar("kills-blocks-resumed", lambda: faults.resumed_blocks, ">=", KILLS / 2, "finished blocks that resumed runs found"),
        Bar("full-disk-faults", count(faults.full_disk), "==", 0, "a filled tmpfs: clean stop, blocks kept, same bytes afterwards"),
        *(Bar(f"{name}-faults", count(lambda find=find: find(root)), "==", 0) for name, find in BROKEN.items()),  # type: ignore[misc]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are killed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return run_bars(bars(Path(folder), arguments.seed), list_only=arguments.list, json_file=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
