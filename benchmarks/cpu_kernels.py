"""fewbit's CPU kernels against the peers', in turns, as shares of the read bandwidth of the same run.

    python benchmarks/cpu_kernels.py                     # all bars; needs the peers' environments in benchmarks/.peers
    python benchmarks/cpu_kernels.py --only m8           # the cases whose name begins so
    python benchmarks/cpu_kernels.py --results FILE      # keeps every measured case in FILE, and measures only those that are not there

Every contender is a process of its own (`peers/kernels_NAME.py`) that holds as many copies of the weight as make four times the last-level
cache; a pass multiplies with each copy once. Passes take turns (`_interleaved.py`); the figures are medians of the passes that had the
cores to themselves. Bandwidth is the median of the best of `fewbit._native.read_loops()`, with huge pages and without, over 1 GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _bars import Bar, NotMeasuredError, add_arguments, run_bars
from _interleaved import Contender, PeerError, Series, Worker, interleave

_HERE = Path(__file__).parent
PEERS_AT_4_BITS = (
    "llamacpp-q4_0", "llamacpp-q4_k", "llamacpp-iq4_nl", "onnxruntime-4bit-b32", "onnxruntime-4bit-b128", "openvino-int4", "torch-int4",
)  # fmt: skip
_SINGLE = (
    *PEERS_AT_4_BITS, "onnxruntime-2bit-b128", "llamacpp-q8_0", "torch-bf16", "torch-bf16-prepacked", "torch-w8a8", "bnb-nf4",
    "unfused-int4", "unfused-nf4", "fewbit-int4", "fewbit-int4-exact", "fewbit-int8", "fewbit-int3", "fewbit-int2", "fewbit-w8a8",
    "fewbit-bf16", "fewbit-nf4", "fewbit-mxfp4", "fewbit-fp8",
)  # fmt: skip
_BARS = (
    *PEERS_AT_4_BITS,
    "onnxruntime-2bit-b128",
    "torch-bf16",
    "fewbit-int4",
    "fewbit-int4-exact",
    "fewbit-int8",
    "fewbit-int3",
    "fewbit-int2",
)
_BATCH = (
    *PEERS_AT_4_BITS, "torch-bf16", "torch-w8a8", "fewbit-int4", "fewbit-int8", "fewbit-w8a8", "fewbit-bf16", "fewbit-nf4", "fewbit-fp8",
)  # fmt: skip
CASES: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "m1-4096x4096": (4096, 4096, 1, _SINGLE),
    "m1-11008x4096": (11008, 4096, 1, _BARS),
    "m1-4096x11008": (4096, 11008, 1, _BARS),
}
CASES |= {f"m{m}-4096x4096": (4096, 4096, m, _BATCH) for m in (8, 32, 128)}
# A long prompt: bound by arithmetic, so that two copies of the weight will do.
CASES["m2048-4096x4096"] = (4096, 4096, 2048, ("openvino-int4", "torch-bf16", "torch-w8a8", "fewbit-int4", "fewbit-int8", "fewbit-w8a8"))
_LONG_PROMPT = 1024
_GIB, _CACHE_BYTES = 1 << 30, 36 << 20
_BITS = {"bf16": 16, "int8": 8, "q8_0": 8, "w8a8": 8, "fp8": 8}
FAST_MEMORY = 55.0  # GB/s, above which 4-bit kernels are bound by their arithmetic
LIMITED = 50.0  # GB/s that the shares of INT3 and INT2 refer to at most


@dataclass
class Measured:
    """Series of one case by contender, reasons of those that did not start, and GB/s of the reads."""

    series: dict[str, Series]
    reasons: dict[str, str]
    bandwidth: float
    about: dict[str, str]  # when, on what

    def to_json(self) -> dict[str, Any]:
        """All passes in seconds, and what is known about each contender."""
        series = {name: {"seconds": s.kept, "dropped": s.dropped, **s.facts} for name, s in self.series.items()}
        return {**self.about, "read_bandwidth_gb_per_s": self.bandwidth, "contenders": series, "not_measured": self.reasons}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Measured:
        """The inverse of `to_json`."""
        series = {}
        for name, facts in kept["contenders"].items():
            rest = {key: value for key, value in facts.items() if key not in ("seconds", "dropped")}
            series[name] = Series(facts["seconds"], facts["dropped"], facts=rest)
        about = {key: value for key, value in kept.items() if isinstance(value, str)}
        return cls(series, kept["not_measured"], kept["read_bandwidth_gb_per_s"], about)

    def seconds(self, name: str) -> float:
        """Median seconds of one product."""
        if name not in self.series:
            raise NotMeasuredError(self.reasons.get(name, "not run"))
        return self.series[name].median() / int(self.series[name].facts["calls"])

    def share(self, name: str, ceiling: float = float("inf")) -> float:
        """Bytes of the weight per second over the read bandwidth."""
        return self.series_bytes(name) / self.seconds(name) / 1e9 / min(self.bandwidth, ceiling)

    def series_bytes(self, name: str) -> int:
        """Bytes of one weight."""
        self.seconds(name)
        return int(self.series[name].facts["bytes"])

    def best(self, names: tuple[str, ...]) -> float:
        """Seconds of the fastest; every one of them must have been measured."""
        return min(self.seconds(name) for name in names)


class Kernels:
    """Runs cases on demand, each once."""

    def __init__(self, threads: int, passes: int, limit: float, results: Path | None = None, hold: bool = False) -> None:
        self.threads, self.passes, self.limit, self.results, self.hold = threads, passes, limit, results, hold
        kept = json.loads(results.read_text(encoding="utf-8")) if results is not None and results.is_file() else {}
        self._done = {name: Measured.from_json(case) for name, case in kept.items()}

    @property
    def kept(self) -> tuple[str, ...]:
        """The cases that are measured already."""
        return tuple(self._done)

    def case(self, name: str) -> Measured:
        """The case's measurements; a table of them is printed when they are made."""
        if name not in self._done:
            self._done[name] = self._measure(name)
            print(table(name, self._done[name]), flush=True)
            if self.results is not None:
                self.results.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps({case: done.to_json() for case, done in self._done.items()}, indent=1)
                self.results.write_text(text + "\n", encoding="utf-8")
        return self._done[name]

    def _measure(self, name: str) -> Measured:
        from fewbit import _native

        n, k, m, contenders = CASES[name]
        reads = [f"read-{d}-{s}-{pages}" for pages in ("huge", "small") for d, s in _native.read_loops()]
        found, reasons = [], {}
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for contender in (*reads, *contenders):
                peer = contender.split("-")[0].replace("unfused", "torch").replace("bnb", "bitsandbytes")
                bits = next((bits for word, bits in _BITS.items() if word in contender), 4)
                copies = max(2, -(-4 * _CACHE_BYTES * 8 // (n * k * bits)))
                if m >= _LONG_PROMPT or (peer == "torch" and "unfused" in contender):
                    copies = 2  # the unfused make a BF16 copy, far larger than the cache, at every call
                case = {
                    "n": n,
                    "k": k,
                    "m": m,
                    "group": 128,
                    "copies": copies,
                    "threads": self.threads,
                    "contender": contender,
                    "bytes": _GIB,
                }
                try:
                    if peer not in workers:
                        python = _HERE / ".peers" / peer / "bin" / "python"
                        own = sys.executable if peer in ("fewbit", "torch", "read", "llamacpp") else python
                        workers[peer] = Worker(peer, own, _HERE / "peers" / f"kernels_{peer}.py", threads=self.threads)
                        stack.callback(workers[peer].close)
                    facts = workers[peer].ask(op="setup", key=contender, case=case)
                    found.append(Contender(contender, workers[peer], contender, facts))
                except (OSError, PeerError) as error:
                    reasons[contender] = str(error)
            if self.hold:
                print(f"{name}: set up, waiting for a line", flush=True)
                sys.stdin.readline()
            series = interleave(found, passes=self.passes, limit_seconds=self.limit)
        rates = []
        for read in reads:
            with contextlib.suppress(NotMeasuredError, KeyError):
                rates.append(_GIB / series[read].median() / 1e9)
        about = {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": _cpu(), "platform": platform.platform()}
        about["threads"] = str(self.threads)
        return Measured(series, reasons, max(rates, default=float("nan")), about)


def _cpu() -> str:
    """The CPU's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(name: str, measured: Measured) -> str:
    """One line per contender."""
    lines = [f"{name}: reads {measured.bandwidth:.1f} GB/s"]
    for contender, series in measured.series.items():
        try:
            seconds = measured.seconds(contender)
        except NotMeasuredError as error:
            lines.append(f"  {contender:<24} {error}")
            continue
        rate = series.facts["bytes"] / seconds / 1e9
        error_text = f"error {series.facts['relative_error']:.4f}" if "relative_error" in series.facts else ""
        lines.append(f"  {contender:<24} {seconds * 1e6:9.1f} us {rate:7.1f} GB/s {error_text} {series.facts.get('version', '')}")
    return "\n".join([*lines, *(f"  {contender:<24} {reason}" for contender, reason in measured.reasons.items())])


def markdown(kernels: Kernels, contenders: tuple[str, ...] = _SINGLE) -> str:
    """The kept cases as a table: microseconds of one product; at one token the share of the read bandwidth behind it."""
    cases = [name for name in CASES if name in kernels.kept]
    lines = ["| microseconds (share of the read bandwidth) |" + "".join(f" {name} |" for name in cases), "| --- |" + " ---: |" * len(cases)]
    lines.append("| reads, GB/s |" + "".join(f" {kernels.case(name).bandwidth:.1f} |" for name in cases))
    for contender in contenders:
        cells = []
        for name in cases:
            measured = kernels.case(name)
            try:
                cell = f"{measured.seconds(contender) * 1e6:,.0f}"
                cell += f" ({measured.share(contender):.2f})" if name.startswith("m1-") else ""
            except NotMeasuredError:
                cell = "-"
            cells.append(cell)
        if any(cell != "-" for cell in cells):
            lines.append(f"| {contender} |" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines)


def _ahead(measured: Measured) -> float:
    """Time that the bar of INT4 at M = 1 allows, over fewbit's: 1.05x the best peer or 0.97 of bandwidth; 1.15x where memory is fast."""
    best = measured.best(PEERS_AT_4_BITS)
    if measured.bandwidth > FAST_MEMORY:
        return best / 1.15 / measured.seconds("fewbit-int4")
    allowed = max(best / 1.05, measured.series_bytes("fewbit-int4") / (0.97e9 * measured.bandwidth))
    return allowed / measured.seconds("fewbit-int4")


def bars(kernels: Kernels, only: str) -> list[Bar]:
    """The bars of the cases whose names begin with `only`."""
    made: list[Bar] = []

    def add(case: str, what: str, value: Callable[[Measured], float], op: str, threshold: float, note: str) -> None:
        if case.startswith(only):
            made.append(Bar(f"{case}-{what}", lambda: value(kernels.case(case)), op, threshold, note))

    for case in (name for name in CASES if name.startswith("m1-")):
        add(case, "int4-share", lambda m: m.share("fewbit-int4"), ">=", 0.92, "of read bandwidth")
        add(case, "int4-ahead", _ahead, ">=", 1.0, "allowed time over fewbit's: 1.05x the best peer or 0.97 of bandwidth")
        add(case, "int8-share", lambda m: m.share("fewbit-int8"), ">=", 0.92, "of read bandwidth")
        add(case, "int3-share", lambda m: m.share("fewbit-int3", LIMITED), ">=", 0.80, "of read bandwidth, of 50 GB/s at most")
        add(case, "int2-share", lambda m: m.share("fewbit-int2", LIMITED), ">=", 0.80, "of read bandwidth, of 50 GB/s at most")
        add(case, "int2-over-onnxruntime", lambda m: m.seconds("onnxruntime-2bit-b128") / m.seconds("fewbit-int2"), ">", 1.0, "speed")
        add(case, "int4-exact-share", lambda m: m.share("fewbit-int4-exact"), ">=", 0.85, "of read bandwidth")
    add("m8-4096x4096", "int4-over-best-peer", lambda m: m.best(PEERS_AT_4_BITS) / m.seconds("fewbit-int4"), ">", 1.0, "speed")
    for case, factor in (("m32-4096x4096", 2.4), ("m128-4096x4096", 2.0), ("m2048-4096x4096", 1.0)):
        add(case, "int4-over-bf16", lambda m: m.seconds("torch-bf16") / m.seconds("fewbit-int4"), ">=", factor, "speed over F.linear")
    for case in ("m32-4096x4096", "m128-4096x4096"):
        add(case, "w8a8-over-onednn", lambda m: m.seconds("torch-w8a8") / m.seconds("fewbit-w8a8"), ">=", 1.0, "speed over oneDNN's")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=15, help="passes of each contender that count")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of passes per case")
    parser.add_argument("--only", default="", help=f"cases whose names begin so: {', '.join(CASES)}")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="keep the measured cases in FILE; those that it has are not measured again"
    )
    parser.add_argument("--table", action="store_true", help="print what --results has as Markdown and measure nothing")
    parser.add_argument("--hold", action="store_true", help="wait for a line on standard input before the passes of each case")
    add_arguments(parser)
    arguments = parser.parse_args()
    kernels = Kernels(arguments.threads, arguments.passes, arguments.limit, arguments.results, arguments.hold)
    if arguments.table:
        print(markdown(kernels))
        return 0
    return run_bars(bars(kernels, arguments.only), list_only=arguments.list, json_file=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
