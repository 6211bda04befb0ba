"""fewbit on an NVIDIA GPU: machine, correctness, kernels, decode steps, KV caches, predictions. One command, one table, one JSON file.

    python benchmarks/gpu.py                                   # on the GPU that is there, under nine minutes on an H200
    python benchmarks/gpu.py --only kernels                    # one section (and what it needs)
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny         # no GPU: everything once, in Triton's interpreter; figures mean nothing

Times are taken under CUDA graphs over rotated copies of weights and caches that exceed four times the second-level cache. Kernels are
compiled first, on all cores; on a device that `kernels/triton/tuning.toml` does not know, block sizes are searched, used and printed.

Every section runs in a process of its own with a time limit, and the results file is written anew after each: a section that crashes, hangs
or runs out of memory takes nothing else with it. What did not fit into a section's time is listed as skipped; a contender that fails is
listed with its reason.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _bars import run_bars

from fewbit.kernels.triton.environment import interpreted, refuse_device

_SECTIONS = ("tune", "correctness", "kernels", "end-to-end", "cache", "predict", "peers")
_WHOLE = 525.0  # seconds for everything
# section: seconds after which it begins nothing new; killed some later. What is left at the end is for peers and transformers.
_SECONDS = {"machine": 20, "compile": 60, "tune": 40, "correctness": 55, "kernels": 95, "torch-int4": 12, "steps-3b": 25, "steps-8b": 30,
            "batches": 40, "cache": 30, "predict": 20, "transformers-3b": 90, "peers": 60, "transformers-8b": 90}  # fmt: skip
_GRACE = 15.0
Report = dict[str, Any]


def _compile(settings: Any, seconds: float, sections: tuple[str, ...], capability: int, rows: list[Any]) -> None:
    """Every kernel that the sections launch, on all cores but two; runs in a process that never touches the GPU."""
    from _gpu_compile import compile_many, only_compile
    from _gpu_launches import jobs
    from _gpu_report import MODELS

    from fewbit.kernels.triton.tuning import install

    install(rows)
    launches, errors = only_compile(capability, jobs(sections, MODELS, capability >= 89))
    failed = [f"{name}: {reason}" for name, reason in errors.items()]
    failed += compile_many(launches, max((os.cpu_count() or 2) - 2, 1), seconds)
    settings.write(fact="compiled", **{"is": {"kernels": len(launches), "not_compiled_ahead": failed}})


def _predict(settings: Any, report: Report) -> None:
    from _gpu_predict import predict_rows
    from _gpu_report import MODELS

    steps = [row for row in report.get("batches", []) if row["shapes"] == MODELS[0]]
    for row in predict_rows(report["facts"], report["machine"], steps, MODELS[0]):
        settings.record("predict", row)


def measure(settings: Any, sections: tuple[str, ...], keep: Callable[[Report], None], seconds: float = _WHOLE) -> Report:
    """All sections asked for, each in a process of its own.

    Args:
        keep: called with the report after every section.
        seconds: for everything.
    """
    from _gpu_cache import measure_cache
    from _gpu_correctness import check
    from _gpu_end_to_end import measure_batches, measure_single, measure_transformers
    from _gpu_kernels import measure_kernels
    from _gpu_machine import measure_machine
    from _gpu_peers import measure_peers, measure_torch
    from _gpu_report import MODELS, add_ratios
    from _gpu_sections import merge, run_section
    from _gpu_tune import as_toml, measure_tiles, rows_from

    from fewbit.kernels.triton import tuning

    report: Report = {"schema_version": 1, "command": sys.argv, "date": time.strftime("%Y-%m-%d"), "failures": {}, "skipped": {}}
    begin, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="fewbit-gpu-"))

    def section(name: str, work: Callable[[Any, float], None], wanted: bool = True) -> None:
        left = seconds - (time.monotonic() - begin)
        if not wanted:
            return
        if settings.cuda and left < 10:
            report["skipped"].setdefault(name, []).append("the whole section")
            return
        limit = min(_SECONDS[name], left - 5) if settings.cuda else 900.0
        print(f"section: {name} ({time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True)
        entries = run_section(name, lambda s: work(s, limit), settings, min(limit + _GRACE, left) if settings.cuda else limit, folder)
        merge(report, name, entries)
        add_ratios(report)
        report["seconds"] = time.monotonic() - begin
        keep(report)

    section("machine", lambda s, limit: measure_machine(s))
    machine, facts = report.get("machine"), report.get("facts", {})
    if machine is None:
        report.setdefault("facts", {"interpreted": not settings.cuda})
        return report
    capability = round(float(facts.get("capability", 9.0)) * 10)
    named = tuning.rows_of(str(facts["device"]))
    ahead = functools.partial(_compile, capability=capability, rows=named or [])
    tune = "tune" in sections and (settings.tiny or named is None)
    section("compile", lambda s, limit: ahead(s, limit, sections=("tune",)), tune and settings.cuda)
    section("tune", measure_tiles, tune)
    found = rows_from(report) if settings.cuda else []
    if found:
        tuning.install(found)
        report["tuned"] = as_toml(str(facts["device"]), found)
        ahead = functools.partial(_compile, capability=capability, rows=found)
    rest = tuple(name for name in sections if name != "tune")
    section("compile", lambda s, limit: ahead(s, limit, sections=rest), settings.cuda)
    section("correctness", check, "correctness" in sections)
    section("kernels", lambda s, limit: measure_kernels(s, limit, machine), "kernels" in sections)
    section("torch-int4", lambda s, limit: measure_torch(s, limit, machine), "kernels" in sections)
    steps = "end-to-end" in sections or "predict" in sections
    section("steps-3b", lambda s, limit: measure_single(s, limit, MODELS[0]), "end-to-end" in sections)
    section("steps-8b", lambda s, limit: measure_single(s, limit, MODELS[1]), "end-to-end" in sections and not settings.tiny)
    section("batches", lambda s, limit: measure_batches(s, limit, MODELS[0]), steps)
    section("cache", lambda s, limit: measure_cache(s, limit, machine), "cache" in sections)
    section("predict", lambda s, limit: _predict(s, report), "predict" in sections)
    section("transformers-3b", lambda s, limit: measure_transformers(s, limit, MODELS[0]), "end-to-end" in sections)
    section("peers", lambda s, limit: measure_peers(s, limit, machine), "peers" in sections)
    section("transformers-8b", lambda s, limit: measure_transformers(s, limit, MODELS[1]), "end-to-end" in sections and not settings.tiny)
    return report


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, in Triton's interpreter where there is no GPU")
    parser.add_argument("--only", choices=_SECTIONS, action="append", help="these sections")
    parser.add_argument("--seconds", type=float, default=_WHOLE, help=f"for everything on a GPU (default: {_WHOLE:.0f})")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the results go (default: benchmarks/results/gpu-DATE.json; results/gpu.schema.json)",
    )
    parser.add_argument("--list", action="store_true", help="name the bars on a GPU, measure nothing")
    options = parser.parse_args()
    if options.list:
        from _gpu_report import bars

        return run_bars(bars({"failures": {}, "facts": {}}, _SECTIONS), list_only=True)
    refused = _refusal(options.tiny)
    if refused is not None:
        print(f"gpu.py: {refused}", file=sys.stderr)
        return 2
    from _gpu_common import Settings
    from _gpu_report import bars, tables  # needs Triton

    cuda = not interpreted()
    os.environ["FEWBIT_TRITON_SEARCH"] = "0"  # the rows of the section `tune`, or of the table, are what is measured
    settings = Settings("cuda" if cuda else "cpu", options.tiny, torch.bfloat16 if cuda else torch.float32)
    sections = tuple(options.only or _SECTIONS)
    parts = (
        "gpu",
        *(("tiny",) if options.tiny else ()),
        *(options.only or ()),
        time.strftime("%Y-%m-%d"),
    )  # a whole run is not overwritten
    file = options.json or Path(__file__).parent / "results" / f"{'-'.join(parts)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)

    def keep(report: Report) -> None:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
        partial.replace(file)

    report = measure(settings, sections, keep, options.seconds)
    keep(report)
    print(tables(report))
    return run_bars(bars(report, sections))


def _refusal(tiny: bool) -> str | None:
    """Why nothing can be measured here; None where something can."""
    if interpreted():
        return refuse_device("cpu") if tiny else "TRITON_INTERPRET=1 runs the smallest sizes only: add --tiny"
    # in a process of its own: the processes of the sections are forks of this one, which must not have touched the device
    with multiprocessing.get_context("fork").Pool(1) as pool:
        refused = pool.apply(refuse_device, ("cuda",))
    return refused and f"{refused}; TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny runs everything small without a GPU"


if __name__ == "__main__":
    sys.exit(main())
