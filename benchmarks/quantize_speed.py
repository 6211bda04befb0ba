"""Time to quantize one block of Llama-2-7B's shapes, against llm-compressor and GPTQModel, on the same cores.

    python benchmarks/quantize_speed.py                 # about a quarter of an hour on two cores; nothing else should run
    python benchmarks/quantize_speed.py --stop-at 0     # let the peers finish, however long they take
    python benchmarks/quantize_speed.py --repeats 3     # the least of three runs of each side, in turns

The model is one decoder block with random weights, written to disk as a Hugging Face directory in BF16: hidden size 4096, inner size
11008, 32 heads, and the bundled tokenizer's 4,096 entries for a vocabulary, so that every side can read the same text. Calibration: 8
windows of 512 tokens, the same for all. W4 in groups of 128, symmetric.

What is timed is each library's call that quantizes, in a process of its own: calibration included, imports and loading the model
excluded. For fewbit this is all of `quantize_model`, which also reads the weights, checks each layer on windows that it holds back, and
writes the checkpoint. A peer that has taken three times fewbit's time is stopped: the bar is decided, and the ratio printed is then an
upper bound, which the peer's line says. Peers run in float32: BF16 takes several times as long on a CPU without BF16 instructions. The
time of the whole process and the peak memory are printed beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _bars import Bar, NotMeasuredError, add_arguments, run_bars

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environments import interpreter

_HERE = Path(__file__).parent
CACHE = _HERE.parent / "results" / "quantize_speed"
SAMPLES, TOKENS = 8, 512
THRESHOLD = 0.5
PAIRS = (
    ("gptq-over-llmcompressor", "gptq", "llmcompressor"),
    ("gptq-over-gptqmodel", "gptq", "gptqmodel"),
    ("awq-over-llmcompressor", "awq", "llmcompressor"),
)
OURS = "fewbit"


@dataclass(frozen=True)
class Timing:
    """Seconds of the quantization and of the whole process, and the process's peak memory.

    Attributes:
        finished: False when the process was stopped: it would have taken more than `seconds`, and the rest is not known.
    """

    seconds: float
    process_seconds: float = float("nan")
    peak_rss_bytes: int = 0
    threads: int = 0
    finished: bool = True

    def describe(self) -> str:
        if not self.finished:
            return f"stopped after {self.seconds:.1f} s"
        peak = self.peak_rss_bytes / 2**30
        return f"{self.seconds:8.1f} s   whole process {self.process_seconds:8.1f} s   peak {peak:5.2f} GiB   {self.threads} threads"


def make_model(directory: Path) -> None:
    """Write one block with random weights in BF16, the bundled tokenizer beside it. An existing directory is kept."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fewbit.models.reference import reference_model_dir
    from fewbit.models.shapes import shapes_config

    if (directory / "config.json").is_file():
        return
    tokenizer = AutoTokenizer.from_pretrained(reference_model_dir())
    config = shapes_config("llama-2-7b")
    config.update({"num_hidden_layers": 1, "vocab_size": len(tokenizer)})
    config.update({name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_tokens(directory: Path, file: Path) -> None:
    """The calibration windows, int64 [8, 512], that fewbit will draw from the same seed."""
    from safetensors.torch import save_file

    from fewbit.checkpoints.sources import open_source
    from fewbit.walk.calibration import load_calibration

    source = open_source(directory)
    drawn = load_calibration(source.tokenizer(), source.config, samples=SAMPLES, sequence_length=TOKENS, seed=0)
    save_file({"ids": drawn.ids.contiguous()}, file)


class Timings:
    """Times of all sides, each measured once per repeat, in turns.

    Args:
        threads: of every side; 0 for torch's default.
        repeats: runs of each side.
        stop_at: a peer is stopped after this many times fewbit's seconds; 0 for never.
    """

    def __init__(self, threads: int, repeats: int, stop_at: float, folder: Path = CACHE) -> None:
        self.threads, self.repeats, self.stop_at, self.folder = threads, repeats, stop_at, folder
        self._best: dict[tuple[str, str], Timing] = {}
        self._failures: dict[tuple[str, str], str] = {}

    def measure(self) -> None:
        """Run everything that the bars need; failures are remembered and told by the bars."""
        make_model(self.folder / "model")
        write_tokens(self.folder / "model", self.folder / "tokens.safetensors")
        sides = dict.fromkeys((side, method) for _, method, peer in PAIRS for side in (OURS, peer))
        for _ in range(self.repeats):
            for side, method in sides:
                if (side, method) in self._failures:
                    continue
                try:
                    timing = self._run(side, method)
                except NotMeasuredError as error:
                    self._failures[side, method] = str(error)
                    continue
                known = self._best.get((side, method))
                self._best[side, method] = timing if known is None or timing.seconds < known.seconds else known
                print(f"{side:<14} {method:<5} {timing.describe()}", flush=True)

    def _run(self, side: str, method: str) -> Timing:
        folder = self.folder / f"{side}-{method}"
        folder.mkdir(parents=True, exist_ok=True)
        job: dict[str, Any] = {
            "model": str(self.folder / "model"),
            "tokens": str(self.folder / "tokens.safetensors"),
            "method": method,
            "num_bits": 4,
            "group_size": 128,
            "threads": self.threads,
            "dtype": "float32",
            "export": False,
            "options": {"samples": SAMPLES, "sequence_length": TOKENS} if side == OURS else {},
        }
        (folder / "job.json").write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
        for name in ("result.json", "started"):
            (folder / name).unlink(missing_ok=True)
        try:
            python = sys.executable if side == OURS else str(interpreter(side))
        except subprocess.CalledProcessError as error:
            raise NotMeasuredError(f"{side} does not install: pip ended with exit code {error.returncode}") from error
        command = [python, str(_HERE / "peers" / f"run_{side}.py"), str(folder / "job.json"), str(folder)]
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            limit = self._limit(side, method)
            while process.poll() is None:
                time.sleep(0.5)
                if limit and (folder / "started").is_file() and time.time() - (folder / "started").stat().st_mtime > limit:
                    process.kill()
                    process.wait()
                    return Timing(limit, finished=False)
        if process.returncode != 0:
            last = ((folder / "log.txt").read_text(encoding="utf-8").strip().splitlines() or ["no message"])[-1]
            raise NotMeasuredError(f"{side} {method} ended with exit code {process.returncode}: {last}")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return Timing(*(result[name] for name in ("seconds", "process_seconds", "peak_rss_bytes", "threads")))

    def _limit(self, side: str, method: str) -> float:
        """Seconds after which this side is stopped; 0 for never."""
        ours = self._best.get((OURS, method))
        return 0.0 if side == OURS or ours is None else self.stop_at * ours.seconds

    def seconds(self, side: str, method: str) -> float:
        """Least seconds of the quantization; a lower bound where the side was stopped.

        Raises:
            NotMeasuredError: it failed.
        """
        if (side, method) in self._failures:
            raise NotMeasuredError(self._failures[side, method])
        return self._best[side, method].seconds


def bars(timings: Timings) -> list[Bar]:
    """One ratio of times per peer and method."""

    def ratio(method: str, peer: str) -> Callable[[], float]:
        return lambda: timings.seconds(OURS, method) / timings.seconds(peer, method)

    note = "seconds of the quantization over the peer's"
    return [Bar(name, ratio(method, peer), "<=", THRESHOLD, note) for name, method, peer in PAIRS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side, in turns; the quickest counts")
    parser.add_argument("--threads", type=int, default=0, help="of every side; torch's default when left out")
    parser.add_argument("--stop-at", type=float, default=3.0, metavar="X", help="stop a peer after X times fewbit's seconds; 0 for never")
    add_arguments(parser)
    arguments = parser.parse_args()
    timings = Timings(arguments.threads, arguments.repeats, arguments.stop_at)
    if not arguments.list:
        timings.measure()
    return run_bars(bars(timings), list_only=arguments.list, json_file=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
