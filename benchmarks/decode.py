"""fewbit's engine against llama.cpp and OpenVINO GenAI on whole models: decode, prefill, a batch of eight; and what loading adds to memory.

    python benchmarks/decode.py                                # all bars; needs benchmarks/.peers/{llamacpp,openvino}
    python benchmarks/decode.py --only qwen2.5-0.5b-int4       # the bars whose names begin so
    python benchmarks/decode.py --results FILE                 # keeps what is measured in FILE, and measures only what is not there
    python benchmarks/decode.py --prepare                      # only make the GGUF files

Models have random weights in the shapes of Qwen2.5 0.5B and 1.5B, in every contender's own format. Each contender is a process
(`peers/decode_NAME.py`) that stays; passes of 4 or 8 steps at 128 tokens of context, or of one prefill, take turns (`_interleaved.py`),
reads of memory among them. What is compared are medians of the passes that had the cores to themselves. Printed with each: bytes read per
token and the format of the output head, since llama.cpp's Q4_0 files keep it in Q6_K or Q8_0; fewbit has it in INT8 here, or in INT4 where
the name says so. What that costs in quality is printed last: the divergence of the bundled model with nothing but its head quantized.

`--hold` waits for a line on standard input when the models of a group are loaded, so that several benchmarks of one machine can take turns.

Decode passes, too, where memory forbids to be faster: at 0.92 of the measured bandwidth over the bytes per token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _bars import Bar, NotMeasuredError, add_arguments, run_bars
from _interleaved import Contender, PeerError, Series, Worker, interleave

_HERE = Path(__file__).parent
SHAPES = ("qwen2.5-0.5b", "qwen2.5-1.5b")
# Contenders that are resident together, by the bits of their weights.
GROUPS = {
    "int4": ("fewbit-int4", "fewbit-int4-head4", "llamacpp-q4_0", "openvino-q4_0"),
    "int8": ("fewbit-int8", "llamacpp-q8_0"),
    "bf16": ("fewbit-bf16", "llamacpp-bf16"),
}
PHASES: dict[str, dict[str, int]] = {
    "decode": {"batch": 1, "context": 128, "steps": 8, "prompt": 0},
    "prefill128": {"batch": 1, "context": 0, "steps": 0, "prompt": 128},
    "prefill512": {"batch": 1, "context": 0, "steps": 0, "prompt": 512},
    "batch8": {"batch": 8, "context": 128, "steps": 4, "prompt": 0},
}
# A pass should stay below a second (`_interleaved.py`), and eight steps of 3 GB each would not.
STEPS_SHARE = {("qwen2.5-1.5b", "bf16"): 2}
# What the bars ask for: only the INT4 group has more than decode.
PHASES_OF = {"int4": tuple(PHASES), "int8": ("decode",), "bf16": ("decode",)}
PREFILL_PEERS = ("llamacpp-q4_0", "openvino-q4_0")
MEMORY_SHARE = 0.92  # of bandwidth: nobody has to be faster
GROWTH = 1.1
_GIB = 1 << 30


@dataclass
class Measured:
    """One phase: passes of each contender, why others are missing, GB/s of reads in the same run."""

    series: dict[str, Series]
    bandwidth: float
    reasons: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)  # when, on what

    def to_json(self) -> dict[str, Any]:
        """All passes in seconds, and what is known about each contender."""
        series = {name: {"seconds": s.kept, "dropped": s.dropped, "fastest": s.fastest, **s.facts} for name, s in self.series.items()}
        bandwidth = None if math.isnan(self.bandwidth) else self.bandwidth  # NaN is no JSON
        return {**self.about, "read_bandwidth_gb_per_s": bandwidth, "contenders": series, "not_measured": self.reasons}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Measured:
        """The inverse of `to_json`."""
        series = {}
        for name, facts in kept["contenders"].items():
            rest = {key: value for key, value in facts.items() if key not in ("seconds", "dropped", "fastest")}
            series[name] = Series(facts["seconds"], facts["dropped"], facts["fastest"], rest)
        about = {key: value for key, value in kept.items() if isinstance(value, str)}
        bandwidth = kept["read_bandwidth_gb_per_s"]
        return cls(series, float("nan") if bandwidth is None else bandwidth, kept["not_measured"], about)

    def rate(self, name: str) -> float:
        """Tokens per second."""
        return self._facts(name)["tokens"] / self.series[name].median()

    def memory_rate(self, name: str) -> float:
        """Steps per second that 0.92 of the bandwidth allows."""
        return MEMORY_SHARE * self.bandwidth * 1e9 / self._facts(name)["bytes"]

    def rows(self, title: str) -> list[str]:
        """Rows of the table in BENCHMARKS.md."""
        rows = []
        for name, series in self.series.items():
            facts, counted = series.facts, f"{len(series.kept)} of {len(series.kept) + series.dropped}"
            try:
                rate = f"{self.rate(name):,.1f}"
            except NotMeasuredError:
                rate = f"- (fastest {facts['tokens'] / series.fastest:,.1f})"
            reads = "-" if math.isnan(self.bandwidth) else f"{self.bandwidth:.1f}"
            size = f"{facts['bytes'] / 1e6:.0f}" if facts["bytes"] else "-"
            rows.append(f"| {title} | {reads} | {name} | {rate} | {counted} | {size} | {facts['head']} |")
        return rows

    def _facts(self, name: str) -> dict[str, Any]:
        if name not in self.series:
            raise NotMeasuredError(self.reasons.get(name, "not run"))
        return self.series[name].facts

    def lines(self, title: str) -> list[str]:
        """A table for a person."""
        found = [f"{title}: reads {self.bandwidth:.1f} GB/s"]
        for name, series in self.series.items():
            facts = series.facts
            try:
                rate = f"{self.rate(name):9.1f} tokens/s {series.median() / facts['passes'] * 1e3:8.2f} ms/pass"
            except NotMeasuredError as error:
                rate = f"{error}; the fastest pass: {facts['tokens'] / series.fastest:.1f} tokens/s"
            about = f"{facts['bytes'] / 1e6:7.0f} MB/token, head {facts['head']}" if facts["bytes"] else f"head {facts['head']}"
            found.append(f"  {name:<18} {rate}  {about}; {facts['version']}{'; ' + facts['kernels'] if 'kernels' in facts else ''}")
        return [*found, *(f"  {name:<18} {reason}" for name, reason in self.reasons.items())]


class Models:
    """Measures groups on demand, each once; with a results file each phase is kept there, and none is measured that it has."""

    def __init__(self, threads: int, passes: int, limit: float, results: Path | None = None, hold: bool = False, only: str = "") -> None:
        self.only = only
        self.threads, self.passes, self.limit, self.results, self.hold = threads, passes, limit, results, hold
        kept = json.loads(results.read_text(encoding="utf-8")) if results is not None and results.is_file() else {}
        self._done = {title: Measured.from_json(measured) for title, measured in kept.items()}

    def phase(self, shapes: str, group: str, phase: str) -> Measured:
        """The measurements of one phase; what its group lacks is measured when it is first asked for."""
        title = f"{shapes} {group} {phase}"
        if title not in self._done:
            self._measure(shapes, group, phase)
        return self._done[title]

    def table(self) -> str:
        """All that is kept, for BENCHMARKS.md."""
        head = [
            "| pass | reads GB/s | contender | tokens/s | counted passes | MB per token | head |",
            "| --- | ---: | --- | ---: | ---: | ---: | --- |",
        ]
        return "\n".join([*head, *(row for title, measured in self._done.items() for row in measured.rows(title))])

    def _measure(self, shapes: str, group: str, asked: str) -> None:
        """Measure `asked`, and the group's other phases whose bars are wanted as well, while its models are loaded."""
        files = {kind: str(model_file(shapes, kind)) for kind in ("bf16", "q4_0", "q8_0")}
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for name in (*GROUPS[group], "read"):
                peer = name.split("-")[0]
                python = _HERE / ".peers" / "openvino" / "bin" / "python" if peer == "openvino" else sys.executable
                script = _HERE / "peers" / ("kernels_read.py" if peer == "read" else f"decode_{peer}.py")
                workers[name] = Worker(name, python, script, threads=self.threads)
                stack.callback(workers[name].close)
            holds = self.hold
            for phase in PHASES_OF[group]:
                title = f"{shapes} {group} {phase}"
                if title in self._done or not (phase == asked or f"{shapes}-{group}-{phase}".startswith(self.only)):
                    continue
                case = {"shapes": shapes, "threads": self.threads, "gguf": files, **PHASES[phase]}
                case["steps"] //= STEPS_SHARE.get((shapes, group), 1)
                # Only one row of a prompt passes the head: one format of it will do, and a prefill takes seconds.
                names = tuple(name for name in GROUPS[group] if not (case["prompt"] and name.endswith("head4")))
                self._done[title] = self._phase(workers, case, names, title if holds else "")
                holds = False
                print("\n".join(self._done[title].lines(title)), flush=True)
                self._keep()

    def _keep(self) -> None:
        if self.results is not None:
            self.results.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({title: done.to_json() for title, done in self._done.items()}, indent=1)
            self.results.write_text(text + "\n", encoding="utf-8")

    def _phase(self, workers: dict[str, Worker], case: dict[str, Any], names: tuple[str, ...], wait: str) -> Measured:
        from fewbit import _native

        found, reasons = [], {}
        for name in names:
            try:
                facts = workers[name].ask(op="setup", key=name, case={**case, "contender": name})
                found.append(Contender(name, workers[name], name, facts))
            except PeerError as error:
                reasons[name] = str(error)
        reads = [f"read-{distance}-{streams}-huge" for distance, streams in _native.read_loops()]
        for read in reads:
            facts = workers["read"].ask(op="setup", key=read, case={"contender": read, "bytes": _GIB, "threads": self.threads})
            found.append(Contender(read, workers["read"], read, facts))
        if wait:
            print(f"{wait}: set up, waiting for a line", flush=True)
            sys.stdin.readline()
        series = interleave(found, passes=self.passes, limit_seconds=self.limit)
        rates = [_GIB / median for read in reads if (median := _median(series.pop(read))) is not None]
        for worker in workers.values():
            worker.ask(op="drop")
        about = {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": _cpu(), "platform": platform.platform()}
        about["threads"] = str(self.threads)
        return Measured(series, max(rates, default=float("nan")) / 1e9, reasons, about)


def _cpu() -> str:
    """The CPU's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _median(series: Series) -> float | None:
    try:
        return series.median()
    except NotMeasuredError:
        return None


def model_file(shapes: str, kind: str) -> Path:
    """`peers/decode_models.model_file`, which needs nothing of the peers' environments but llama-quantize."""
    sys.path.insert(0, str(_HERE / "peers"))
    from decode_models import model_file as made

    return Path(made(shapes, kind))


def print_head_kl(name: str) -> None:
    """KL divergence per token of the bundled model whose head alone is quantized."""
    from fewbit.workflows.evaluate import evaluate

    quality = evaluate(None, scheme="BF16", lm_head=name, max_tokens=8192).quality
    assert quality is not None
    kl = quality.kl_divergence_nats
    flips = quality.flip_share.value
    print(f"head {name}: KL {kl.value:.6f} nats per token ({kl.low:.6f} to {kl.high:.6f}), flips {flips:.4f}", flush=True)


def growth() -> float:
    """Growth of RSS from before loading a 1.5B INT4 model to after its first token, over its packed size and the cache."""
    script = _HERE / "peers" / "decode_memory.py"
    done = subprocess.run([sys.executable, script, SHAPES[1]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotMeasuredError(done.stderr.strip().splitlines()[-1])
    facts = json.loads(done.stdout.splitlines()[-1])
    print(f"memory: {json.dumps(facts)}", flush=True)
    return float((facts["after"] - facts["before"]) / (facts["packed"] + facts["cache"]))


def bars(models: Models, only: str) -> list[Bar]:
    """The bars whose names begin with `only`."""
    made: list[Bar] = []

    def add(name: str, value: Callable[[], float], op: str, threshold: float, note: str) -> None:
        if name.startswith(only):
            made.append(Bar(name, value, op, threshold, note))

    def decode(shapes: str, group: str, ours: str, theirs: str, factor: float) -> float:
        measured = models.phase(shapes, group, "decode")
        return measured.rate(ours) / min(factor * measured.rate(theirs), measured.memory_rate(ours))

    def ratio(shapes: str, phase: str, peers: tuple[str, ...]) -> float:
        measured = models.phase(shapes, "int4", phase)
        return measured.rate("fewbit-int4") / max(measured.rate(peer) for peer in peers)

    for shapes in SHAPES:
        for group, ours, theirs, factor in (
            ("int4", "fewbit-int4", "llamacpp-q4_0", 1.10),
            ("int4", "fewbit-int4-head4", "llamacpp-q4_0", 1.15),
            ("int8", "fewbit-int8", "llamacpp-q8_0", 1.05),
            ("bf16", "fewbit-bf16", "llamacpp-bf16", 1.0),
        ):
            note = f"speed over what is asked: {factor} x {theirs}, or {MEMORY_SHARE} of bandwidth"
            name = f"{shapes}-{group}{'-head4' if 'head4' in ours else ''}-decode"
            add(name, lambda s=shapes, g=group, o=ours, t=theirs, f=factor: decode(s, g, o, t, f), ">=", 1.0, note)  # type: ignore[misc]
        for phase in ("prefill128", "prefill512"):
            add(f"{shapes}-int4-{phase}", lambda s=shapes, p=phase: ratio(s, p, PREFILL_PEERS), ">=", 1.0, "over the best peer")  # type: ignore[misc]
        add(f"{shapes}-int4-batch8", lambda s=shapes: ratio(s, "batch8", ("llamacpp-q4_0",)), ">=", 1.5, "over llama.cpp")  # type: ignore[misc]
    add("memory-growth", growth, "<=", GROWTH, "growth of RSS over packed size and cache, 1.5B INT4")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=11, help="passes of each contender that count")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds of passes per phase")
    parser.add_argument("--only", default="", help="bars whose names begin so")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep what is measured in FILE; what it has is not measured again")
    parser.add_argument("--table", action="store_true", help="print what --results holds as a table, and measure nothing")
    parser.add_argument("--hold", action="store_true", help="wait for a line on standard input before the passes of each group")
    parser.add_argument("--prepare", action="store_true", help="make the GGUF files and measure nothing")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.prepare:
        for shapes in SHAPES:
            for kind in ("bf16", "q4_0", "q8_0"):
                print(model_file(shapes, kind))
        return 0
    models = Models(arguments.threads, arguments.passes, arguments.limit, arguments.results, arguments.hold, arguments.only)
    if arguments.table:
        print(models.table())
        return 0
    code = run_bars(bars(models, arguments.only), list_only=arguments.list, json_file=arguments.json)
    if not arguments.list and "head".startswith(arguments.only):
        print_head_kl("int8")
        print_head_kl("int4")
    return code


if __name__ == "__main__":
    sys.exit(main())
