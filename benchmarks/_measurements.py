"""The published measurements (`measurements/public_measurements.csv`, sources in SOURCES.md beside it) as observations that predictions are
fitted and checked with.

Which rows count is decided by columns of the file and by what its sources say of themselves, before anything is fitted:

    one device, dense architecture, a decode time, `use_in_analysis` yes or kv_sweep
    no flag of EXCLUDED_FLAGS: a baseline that ran in another runtime, eager frameworks, unfused kernels, experts, mixed builds, fallbacks
    a 16-bit row of the same device, runtime, version, model, batch and lengths

A device is what its name says without the remark in parentheses: an A100 with a power cap is not another device than an A100.
A row without a stated size of its weights gets parameters x nominal bits / 8, and says so (`nominal`).
"""

from __future__ import annotations

import csv
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewbit.models.inventory_sources import read_inventory
from fewbit.models.shapes import SHAPES
from fewbit.predict.fit import Observed
from fewbit.predict.hardware import Hardware, Kind
from fewbit.predict.outline import Outline, outline_of, outline_of_count
from fewbit.predict.prediction import MeasuredPoint, StepPoint

__all__ = ["DATA", "EXCLUDED_FLAGS", "FAMILIES", "Group", "read_groups"]

DATA = Path(__file__).parent / "measurements" / "public_measurements.csv"
_MODELS = Path(__file__).parent / "measurements" / "models.toml"
_GIB = 2**30

EXCLUDED_FLAGS = frozenset(
    {
        "fp16_baseline_other_runtime",
        "multi_gpu_pcie",
        "no_16bit_baseline",
        "unfused_dequant_kernels",
        "eager_overhead_bound",
        "moe",
        "marlin_fallback",
        "dynamic_act_quant",
        "dynamic_act_quant_slow_path",
        "fp16_tok_s_not_printed",
        "cross_build",
        "pp1_used_as_decode",
        "bf16_slow_path",
    }
)
_USED = frozenset({"yes", "kv_sweep"})

# device_class of the file -> (kind of hardware, bandwidth to start from where the file has none, 1e9 bytes per second)
_KINDS: Mapping[str, tuple[Kind, float]] = {
    "nvidia_consumer": ("nvidia_consumer", 900.0),
    "nvidia_dc": ("nvidia_datacenter", 2000.0),
    "nvidia_pro": ("nvidia_workstation", 700.0),
    "nvidia_jetson_spark": ("nvidia_unified", 240.0),
    "amd_gpu": ("amd_datacenter", 1600.0),
    "amd_igpu": ("amd_unified", 256.0),
    "amd_apu": ("amd_unified", 256.0),
    "intel_gpu": ("intel_datacenter", 1200.0),
    "apple_gpu": ("apple", 300.0),
    "intel_igpu": ("intel_unified", 120.0),
    "x86_cpu": ("cpu", 80.0),
    "arm_cpu": ("cpu", 150.0),
}
# Devices that share a prior.
FAMILIES: Mapping[Kind, str] = {
    "nvidia_consumer": "gpu",
    "nvidia_datacenter": "gpu",
    "nvidia_workstation": "gpu",
    "nvidia_unified": "nvidia_unified",
    "amd_datacenter": "gpu",
    "intel_datacenter": "gpu",
    "amd_unified": "amd_unified",
    "apple": "apple",
    "intel_unified": "intel_unified",
    "cpu": "cpu",
}
# Software whose kernels and launches are alike: (part of the file's text, name).
_RUNTIMES = (("llama.cpp", "llama.cpp"), ("torch", "torch"), ("OpenVINO", "openvino"), ("mlx", "mlx"), ("vLLM", "vllm"))
_SCHEMES = {16: "BF16", 8: "W8A16", 6: "W8A16", 5: "W4A16", 4: "W4A16", 3: "W3A16", 2: "W2A16"}


@dataclass(frozen=True)
class Group:
    """An observation with what the checks need of its rows.

    Attributes:
        observed: for fitting and predicting. row_ids: of the file, baseline first.
        nominal: bytes from nominal bits. known_bandwidth: the file states it. sweep: not of the main set (`kv_sweep`).
    """

    observed: Observed
    row_ids: tuple[str, ...]
    nominal: bool
    known_bandwidth: bool
    sweep: bool


def read_groups(path: Path = DATA) -> list[Group]:
    """All observations of the file that may be used, in its order."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if _usable(row)]
    keys = ("source_group", "device", "runtime", "runtime_version_or_date", "model", "batch", "prompt_len", "gen_len")
    found: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    outlines: dict[tuple[str, str], Outline] = {}
    return [group for members in found.values() for group in _group(members, outlines)]


def _usable(row: Mapping[str, str]) -> bool:
    flags = {flag.strip() for flag in row["flag"].split(";") if flag.strip()}
    return (
        row["n_devices"] == "1"
        and row["arch"] == "dense"
        and bool(row["decode_ms_per_tok"])
        and row["use_in_analysis"] in _USED
        and not flags & EXCLUDED_FLAGS
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _outline(row: Mapping[str, str]) -> Outline:
    """From a published shape of that name, else from the number of parameters."""
    name = row["model"].lower().replace("llama-3.1", "llama-3").replace("llama ", "llama-")
    plain = re.sub(r"[ _]", "-", name)
    shape = next((known for known in SHAPES if plain.startswith(known)), None)
    if shape is not None:
        return outline_of(read_inventory(shape))
    facts = tomllib.loads(_MODELS.read_text(encoding="utf-8"))
    fact = next((facts[known] for known in sorted(facts, key=len, reverse=True) if plain.startswith(known)), None)
    if fact is not None:
        return outline_of_count(fact["parameters"] * 1e9, depth=fact["layers"])
    stated = _number(row["params_b"])
    named = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)\s*(b|m)(?![a-z0-9])", name)
    if stated is None and named is not None:
        stated = float(named[1]) / (1000 if named[2] == "m" else 1)
    return outline_of_count((stated or 3.0) * 1e9)


def _hardware(row: Mapping[str, str]) -> tuple[Hardware, bool]:
    kind, typical = _KINDS[row["device_class"]]
    bandwidth, rate = _number(row["mem_bw_gbs"]), _number(row["fp16_tflops_dense"])
    device = Hardware(
        name=row["device"],
        label=row["device"],
        kind=kind,
        memory_bytes=round((_number(row["mem_gb"]) or 64) * _GIB),
        bandwidth_gb_s=bandwidth or typical,
        dense_tflop_s={"bf16": rate or typical / 5},
        vector_tflop_s=(rate or typical / 5) / 8,
    )
    return device, bandwidth is not None


def _context(row: Mapping[str, str]) -> int:
    """Mean depth of the cache: llama-bench decodes from an empty context, others after the prompt."""
    generated = _number(row["gen_len"]) or 0.0
    before = 0.0 if "llama" in row["runtime"].lower() else _number(row["prompt_len"]) or 0.0
    return round(before + generated / 2)


def _group(members: Sequence[Mapping[str, str]], outlines: dict[tuple[str, str], Outline]) -> Iterator[Group]:
    baselines = [row for row in members if row["precision_class"] == "w16"]
    if not baselines or len(members) < 2:
        return
    first = baselines[0]
    key = (first["model"], first["params_b"])
    if key not in outlines:
        outlines[key] = _outline(first)
    outline, nominal = outlines[key], _number(first["size_gib"]) is None
    hardware, known = _hardware(first)

    def point(row: Mapping[str, str]) -> MeasuredPoint:
        bits = float(row["nominal_bits"])
        size = outline.parameters * bits / 8 if nominal else float(row["size_gib"]) * _GIB
        asked = StepPoint("decode", _SCHEMES[round(bits)], batch=int(_number(row["batch"]) or 1), context=_context(row))
        return MeasuredPoint(asked, float(row["decode_ms_per_tok"]), size, row["row_id"])

    others = [row for row in members if row not in baselines and (nominal or _number(row["size_gib"]) is not None)]
    others = [row for row in others if round(float(row["nominal_bits"])) in _SCHEMES]
    if not others:
        return
    tokens, prompt = _number(first["prefill_tok_s"]), _number(first["prompt_len"])
    prefill = None
    if tokens and prompt and _number(first["fp16_tflops_dense"]) and "pp_anomalous" not in first["flag"]:
        prefill = MeasuredPoint(StepPoint("prefill", context=round(prompt)), 1e3 * prompt / tokens, None, first["row_id"])
    observed = Observed(
        device=re.sub(r"\s*\(.*?\)", "", first["device"]),
        family=FAMILIES[hardware.kind],
        runtime=next((name for part, name in _RUNTIMES if part in first["runtime"]), "other"),
        hardware=hardware,
        outline=outline,
        baseline=point(first),
        others=tuple(point(row) for row in others),
        bits=tuple(round(float(row["nominal_bits"])) for row in others),
        prefill=prefill,
        known_bandwidth=known,
    )
    ids = tuple(row["row_id"] for row in (first, *others))
    yield Group(observed, ids, nominal, known, first["use_in_analysis"] == "kv_sweep")
