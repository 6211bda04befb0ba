"""Quality against the peers: the KL divergence that each side's quantization of the same model costs, from the same tokens and bits.

    python benchmarks/quality_vs_peers.py                        # the bundled model and the second one, three seeds: hours on two cores
    python benchmarks/quality_vs_peers.py --kept                 # peers' figures from benchmarks/results/, fewbit's measured now
    python benchmarks/quality_vs_peers.py --quick                # the bundled model, one seed, W4 g128
    python benchmarks/quality_vs_peers.py --write FILE           # also keep all figures with their versions

Both sides get the same model directory, calibration windows (128 of 512 tokens of the standard library's training part, and those that
fewbit holds back for its checks as well, so that it sees no token more) and spec: symmetric integers, one 16-bit scale per group. AWQ gets
32 windows on both sides, because the peer's search runs each block over all of them some sixty times. lm_head and embeddings stay as they
are. Each side's weights are exported as plain tensors and scored by one evaluator (`_scoring`). Peers run in
float32, which this machine multiplies several times faster than BF16, with their scales rounded to 16 bits.

Peers run with their defaults, in environments of their own (`peers/`). What a run made is cached under results/quality_vs_peers by the
hash of everything it depends on: the model, the tokens, the spec, and the peer's pinned versions or fewbit's sources.

The bars, per model and spec:

    gptq    fewbit's GPTQ over llm-compressor's            awq     fewbit's AWQ over llm-compressor's
    best    one fewbit method, named beforehand, over whichever peer's method turns out best

each as the ratio of mean KL divergences over three calibration seeds (at most 0.95) and the upper end of its paired 95 % interval over
held-out windows (below 1). A side that stores more bits per weight than the other is compared only when it is the peer's. For `best`, a
peer's method that is more than 15 % worse than another peer's at the first seed is out and does not run at the other seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from _bars import Bar, NotMeasuredError, add_arguments, run_bars

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environments import PEERS, interpreter, lock_file

_HERE = Path(__file__).parent
_ROOT = _HERE.parent
SECOND_MODEL = _HERE / "models" / "stdlib-qwen2"
CACHE = _ROOT / "results" / "quality_vs_peers"
KEPT = _HERE / "results"

SPECS = {"w4g128": (4, 128), "w4g32": (4, 32), "w3g128": (3, 128)}
BEST_SPECS = ("w4g128", "w3g128")
SEEDS = (0, 1, 2)
THRESHOLD = 0.95
# A contender for `best` that is this much worse than another at the first seed is out: seeds differ by one or two percent.
SCREEN = 1.15
# Named beforehand: taking the better of several on the very windows that are scored would flatter us.
BEST_METHOD = "gptaq"
# (peer, method) of the two head-to-head bars, and all that `best` is compared with.
HEAD_TO_HEAD = {"gptq": ("llmcompressor", "gptq"), "awq": ("llmcompressor", "awq")}
CONTENDERS = (
    ("llmcompressor", "gptq"),
    ("llmcompressor", "awq"),
    ("gptqmodel", "gptq"),
    ("gptqmodel", "gptaq"),
    ("autoround", "autoround"),
    ("hqq", "hqq"),
)
WINDOWS, AWQ_WINDOWS = 128, 32
WITHOUT_CALIBRATION = {"hqq", "rtn"}
OURS = "fewbit"


@dataclass(frozen=True)
class Run:
    """One quantization by one side."""

    model: str
    side: str
    method: str
    spec: str
    seed: int

    def describe(self) -> str:
        return f"{self.side} {self.method} {self.spec} of {self.model}, seed {self.seed}"


@dataclass(frozen=True)
class Figures:
    """What is kept of a run.

    Attributes:
        kl, loss, flips: per held-out window, see `_scoring.Score`.
        key: hash of all inputs; evaluator: of the scored windows and the model in high precision.
        seconds: of the quantization alone. process_seconds: import and loading counted.
    """

    model: str
    side: str
    method: str
    spec: str
    seed: int
    key: str
    evaluator: str
    kl: list[float]
    loss: list[float]
    flips: list[float]
    effective_bits: float
    seconds: float
    process_seconds: float
    peak_rss_bytes: int
    threads: int
    versions: dict[str, str]
    notes: list[str]


class Bench:
    """Runs, scores and remembers.

    Args:
        models: name to directory.
        seeds: of the calibration windows.
        kept: figures of earlier runs, used for peers whose key is the same.
        threads: of every side; 0 for torch's default.
    """

    def __init__(self, models: dict[str, Path], seeds: Sequence[int], kept: Iterable[Figures], threads: int) -> None:
        self.models, self.seeds, self.threads = models, tuple(seeds), threads
        self._kept = {(figures.key, figures.evaluator): figures for figures in kept}
        self._figures: dict[Run, Figures] = {}
        self._failures: dict[Run, str] = {}

    def evaluator(self, model: str) -> Any:
        """The one evaluator of a model, made once."""
        return _evaluator(self.models[model])

    def tokens(self, run: Run) -> tuple[Path, str, int]:
        """The file of calibration windows [136 or 34, 512], its hash, and the number of windows that none are held back of."""
        samples = AWQ_WINDOWS if run.method == "awq" else WINDOWS
        return *_tokens(self.models[run.model], run.seed, samples), samples

    def figures(self, run: Run) -> Figures:
        """What a run made, from memory, from the cache, from kept figures, or measured now.

        Raises:
            NotMeasuredError: it failed; the same reason each time.
        """
        if run.method in WITHOUT_CALIBRATION and run.seed != self.seeds[0]:
            return self.figures(Run(run.model, run.side, run.method, run.spec, self.seeds[0]))
        if run in self._failures:
            raise NotMeasuredError(self._failures[run])
        if run not in self._figures:
            try:
                self._figures[run] = self._measure(run)
            except NotMeasuredError as error:
                self._failures[run] = str(error)
                raise
        return self._figures[run]

    def _measure(self, run: Run) -> Figures:
        from _scoring import Score

        evaluator = self.evaluator(run.model)
        job, key = self._job(run)
        if run.side != OURS and (key, evaluator.key) in self._kept:
            return self._kept[key, evaluator.key]
        folder = CACHE / f"{run.side}-{run.method}-{run.spec}-{run.model}-{run.seed}-{key}"
        if not (folder / "result.json").is_file():
            print(f"running {run.describe()}", file=sys.stderr, flush=True)
            _run(run, job, folder)
        score_file = folder / f"score-{evaluator.key}.json"
        if not score_file.is_file():
            try:
                evaluator.score(folder / "weights.safetensors").write(score_file)
            except ValueError as error:
                raise NotMeasuredError(f"{run.describe()}: {error}") from error
        score = Score.read(score_file)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        same = {
            name: result[name]
            for name in ("effective_bits", "seconds", "process_seconds", "peak_rss_bytes", "threads", "versions", "notes")
        }
        return Figures(
            **asdict(run), key=key, evaluator=evaluator.key, kl=list(score.kl), loss=list(score.loss), flips=list(score.flips), **same
        )

    def _job(self, run: Run) -> tuple[dict[str, Any], str]:
        """The job's fields, and the hash of everything that its result depends on."""
        tokens, digest, samples = self.tokens(run)
        num_bits, group_size = SPECS[run.spec]
        spec = {"num_bits": num_bits, "group_size": group_size, "symmetric": True}
        own: dict[str, Any] = {"dtype": "float32"}
        if run.side == OURS:
            own = {"dtype": "auto", "options": {"samples": samples}}
        job = {"method": run.method, "seed": run.seed, **spec, **own}
        software = _sources_digest() if run.side == OURS else lock_file(run.side).read_text(encoding="utf-8")
        depends = json.dumps([job, run.side, self.evaluator(run.model).model_key, digest, software], sort_keys=True)
        key = hashlib.sha256(depends.encode()).hexdigest()[:16]
        return {**job, "model": str(self.models[run.model]), "tokens": str(tokens), "threads": self.threads}, key

    def runs(self, specs: Sequence[str], sides: Sequence[str]) -> Iterator[Run]:
        """All that the bars need of these sides. A contender gets its further seeds once its first has left it in the running."""
        for model in self.models:
            for spec in specs:
                always = [*HEAD_TO_HEAD.values(), *((OURS, method) for method in HEAD_TO_HEAD)]
                if spec in BEST_SPECS:
                    always.append((OURS, BEST_METHOD))
                    yield from (Run(model, *one, spec, self.seeds[0]) for one in CONTENDERS if one[0] in sides)
                yield from (Run(model, *one, spec, seed) for seed in self.seeds for one in always if one[0] in sides)
                if spec in BEST_SPECS and set(sides) >= set(PEERS):
                    try:
                        running = self.running(model, spec)
                    except NotMeasuredError:
                        continue  # the bar says so
                    yield from (Run(model, *one, spec, seed) for seed in self.seeds for one in running)

    def running(self, model: str, spec: str) -> list[tuple[str, str]]:
        """The contenders that `SCREEN` leaves, by their KL at the first seed.

        Raises:
            NotMeasuredError: one could not be measured: it might have been the best.
        """
        first = {one: _mean_kl([self.figures(Run(model, *one, spec, self.seeds[0]))]) for one in CONTENDERS}
        return [one for one in CONTENDERS if first[one] <= SCREEN * min(first.values())]


@cache
def _evaluator(directory: Path) -> Any:
    from _scoring import Evaluator

    return Evaluator(directory)


@cache
def _tokens(directory: Path, seed: int, samples: int) -> tuple[Path, str]:
    import torch
    from safetensors.torch import save_file

    from fewbit.checkpoints.sources import open_source
    from fewbit.walk.calibration import load_calibration

    source = open_source(directory)
    drawn = load_calibration(source.tokenizer(), source.config, seed=seed, samples=samples)
    digest = drawn.info.ids_sha256[:16]
    path = CACHE / "tokens" / f"{digest}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": torch.cat([drawn.ids, drawn.held_back])}, path)
    return path, digest


@cache
def _sources_digest() -> str:
    """Hash of those of fewbit's sources that numbers depend on."""
    digest = hashlib.sha256()
    for layer in ("formats", "methods", "models", "walk"):
        for file in sorted((_ROOT / "src" / "fewbit" / layer).rglob("*")):
            if file.suffix in (".py", ".toml"):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _run(run: Run, job: dict[str, Any], folder: Path) -> None:
    """Carry out a job in the side's own interpreter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
    try:
        python = sys.executable if run.side == OURS else str(interpreter(run.side))
    except subprocess.CalledProcessError as error:
        raise NotMeasuredError(f"{run.side} does not install: pip ended with exit code {error.returncode}") from error
    command = [python, str(_HERE / "peers" / f"run_{run.side}.py"), str(folder / "job.json"), str(folder)]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if process.returncode != 0:
        last = ((folder / "log.txt").read_text(encoding="utf-8").strip().splitlines() or ["no message"])[-1]
        raise NotMeasuredError(f"{run.describe()} ended with exit code {process.returncode}: {last}")


# ------------------------------------------------------------------------------------------------------------------ the bars


def _scores(bench: Bench, model: str, side: str, method: str, spec: str) -> list[Figures]:
    return [bench.figures(Run(model, side, method, spec, seed)) for seed in bench.seeds]


def _mean_kl(figures: Sequence[Figures]) -> float:
    return sum(sum(one.kl) / len(one.kl) for one in figures) / len(figures)


def _best_peer(bench: Bench, model: str, spec: str) -> list[Figures]:
    """Of all peers' methods the one with the lowest mean KL. A contender that cannot be measured fails the bar."""
    return min((_scores(bench, model, side, method, spec) for side, method in bench.running(model, spec)), key=_mean_kl)


def _ratio(ours: Sequence[Figures], theirs: Sequence[Figures]) -> tuple[float, float, float]:
    from _scoring import Score, ratio_of_means

    if any(one.evaluator != ours[0].evaluator for one in (*ours, *theirs)):
        raise NotMeasuredError("the two sides were scored on different windows")
    if ours[0].effective_bits > theirs[0].effective_bits + 1e-9:
        raise NotMeasuredError(f"fewbit stores {ours[0].effective_bits:.3f} bits per weight, the peer {theirs[0].effective_bits:.3f}")
    a, b = ([Score(tuple(one.kl), tuple(one.loss), tuple(one.flips)) for one in side] for side in (ours, theirs))
    return ratio_of_means(a, b)


def bars(bench: Bench, specs: Sequence[str]) -> list[Bar]:
    """All bars: a ratio and the upper end of its interval, per model, kind and spec."""
    found: list[Bar] = []

    def add(name: str, note: str, ratio: Callable[[], tuple[float, float, float]]) -> None:
        found.append(Bar(f"{name}-ratio", lambda: ratio()[0], "<=", THRESHOLD, f"mean KL, {note}"))
        found.append(Bar(f"{name}-upper", lambda: ratio()[2], "<", 1.0, "upper end of the ratio's paired 95 % interval"))

    for model in bench.models:
        for spec in specs:
            for method, (side, theirs) in HEAD_TO_HEAD.items():

                def head(model: str = model, spec: str = spec, method: str = method, side: str = side, theirs: str = theirs) -> Any:
                    return _ratio(_scores(bench, model, OURS, method, spec), _scores(bench, model, side, theirs, spec))

                add(f"{model}-{spec}-{method}", f"fewbit {method} over {side} {theirs}", head)
            if spec in BEST_SPECS:

                def best(model: str = model, spec: str = spec) -> Any:
                    return _ratio(_scores(bench, model, OURS, BEST_METHOD, spec), _best_peer(bench, model, spec))

                add(f"{model}-{spec}-best", f"fewbit {BEST_METHOD} over the best peer", best)
    return found


def table(bench: Bench, figures: Iterable[Figures]) -> list[str]:
    """The figures as lines: mean over seeds, and each seed's KL."""
    rows: dict[tuple[str, str, str, str], dict[int, Figures]] = {}
    for one in figures:
        rows.setdefault((one.model, one.spec, one.side, one.method), {})[one.seed] = one
    head = f"{'model':<16} {'spec':<7} {'side':<14} {'method':<16} {'bits':>6} {'KL':>9} {'perplexity':>10} {'seconds':>8}  KL of each seed"
    lines = [head]
    for key in sorted(rows, key=lambda key: (key[0], key[1], _mean_kl(list(rows[key].values())))):
        runs = list(rows[key].values())
        perplexity = sum(_perplexity(one) for one in runs) / len(runs)
        seconds = sum(one.seconds for one in runs) / len(runs)
        each = " ".join(f"{_mean_kl([rows[key][seed]]):.5f}" for seed in sorted(rows[key]))
        model, spec, side, method = key
        lines.append(
            f"{model:<16} {spec:<7} {side:<14} {method:<16} {runs[0].effective_bits:>6.3f} {_mean_kl(runs):>9.5f} {perplexity:>10.4f} "
            f"{seconds:>8.1f}  {each}"
        )
    for model in bench.models:
        lines.append(
            f"{model}: perplexity {bench.evaluator(model).perplexity:.4f} in high precision, {len(bench.evaluator(model).ids)} windows"
        )
    return lines


def _perplexity(figures: Figures) -> float:
    return math.exp(sum(figures.loss) / len(figures.loss))


def _read_kept() -> list[Figures]:
    kept: list[Figures] = []
    for file in sorted(KEPT.glob("quality_vs_peers-*.json")):
        kept += [Figures(**one) for one in json.loads(file.read_text(encoding="utf-8"))["runs"]]
    return kept


def _write(path: Path, figures: Sequence[Figures]) -> None:
    def rounded(one: Figures) -> dict[str, Any]:
        fields = asdict(one)
        for name in ("kl", "loss", "flips"):
            fields[name] = [float(f"{value:.6g}") for value in fields[name]]
        return fields

    document = {"schema_version": 1, "command": " ".join(sys.argv), "cpu_count": os.cpu_count(), "runs": [rounded(one) for one in figures]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")


def main() -> int:
    from fewbit.models.reference import reference_model_dir

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="model directories; the bundled and the second model when left out")
    parser.add_argument("--quick", action="store_true", help="the bundled model, one seed, W4 g128")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N")
    parser.add_argument("--specs", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--kept", action="store_true", help="take peers' figures from benchmarks/results where their inputs are the same")
    parser.add_argument("--only", nargs="+", choices=[*PEERS, OURS], metavar="SIDE", help="only run and list these sides, judge nothing")
    parser.add_argument("--threads", type=int, default=0, help="of every side; torch's default when left out")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep all figures")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.specs = SEEDS[:1], ["w4g128"]
    paths = arguments.models or [reference_model_dir(), *([] if arguments.quick else [SECOND_MODEL])]
    models = {path.resolve().name: path.resolve() for path in paths}
    bench = Bench(models, arguments.seeds, _read_kept() if arguments.kept else [], arguments.threads)
    listed = bars(bench, arguments.specs)
    if arguments.list:
        return run_bars(listed, list_only=True)
    figures: dict[tuple[str, str], Figures] = {}
    for run in bench.runs(arguments.specs, arguments.only or [*PEERS, OURS]):
        try:
            one = bench.figures(run)
            figures[one.key, one.evaluator] = one
        except NotMeasuredError as error:
            print(f"not measured: {error}", file=sys.stderr)
    print("\n".join(table(bench, figures.values())), flush=True)
    if arguments.write is not None:
        _write(arguments.write, list(figures.values()))
    return 0 if arguments.only else run_bars(listed, json_file=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
