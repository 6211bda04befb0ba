"""`fewbit decide`: models, devices and a workload in, what to deploy and why out.

Each model is read once (`models.inventory_sources`), each device comes from the table or a file, and each pair is a cell that is decided
on its own. Quality that was measured (`fewbit compare` results, or perplexities) goes before priors; measured times calibrate the device.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from fewbit.decide.candidates import Situation, situation_of
from fewbit.decide.choose import decide_cell
from fewbit.decide.decision import DecideResults
from fewbit.decide.quality import MeasuredQuality, measured_from_perplexities, parse_perplexities
from fewbit.decide.scene import scene_of
from fewbit.decide.serving import runtime_names
from fewbit.decide.workload import Workload, get_workload, with_limits
from fewbit.errors import UsageError
from fewbit.models.inventory import Inventory
from fewbit.models.inventory_sources import read_inventory
from fewbit.predict.hardware import Hardware
from fewbit.predict.measured import read_measured
from fewbit.predict.outline import outline_of
from fewbit.predict.plausible import examine
from fewbit.predict.prediction import MeasuredPoint
from fewbit.report.results_file import read_results
from fewbit.results import CompareResults
from fewbit.workflows.predict import resolve_hardware

__all__ = ["decide_deployment", "parse_prices", "quality_of_results"]


def decide_deployment(
    models: Sequence[str | Path],
    hardware: Sequence[str],
    *,
    workload: str | Path | Workload = "chat",
    batch: int | None = None,
    prompt: int | None = None,
    new_tokens: int | None = None,
    max_ms_per_token: float | None = None,
    max_ttft_ms: float | None = None,
    max_quality_loss: float | None = None,
    quality: Path | None = None,
    perplexity: str | Mapping[str, float] | None = None,
    measured: Sequence[str | MeasuredPoint] = (),
    prices: Mapping[str, float] | None = None,
    hardware_file: Path | None = None,
    machine: Path | None = None,
    bandwidth_gb_s: float | None = None,
    runtime: str | None = None,
    layers: int = 0,
    kv_heads: int = 0,
    head_dim: int = 0,
    out: Path | None = None,
    command: str = "",
) -> DecideResults:
    """What to deploy: one cell for each model and device.

    Args:
        models: as `models.inventory_sources.read_inventory` takes them. hardware: names of devices.
        workload: a name of `decide/workloads.toml`, a TOML file, or a workload; the options after it replace its fields.
        max_ms_per_token, max_ttft_ms: milliseconds. max_quality_loss: percent of perplexity.
        quality: results of `fewbit compare` on the model. perplexity: `bf16=12.4,int8=12.48`, or a mapping by scheme.
        measured: times on the device, as words, files (`predict.measured`) or points; for one model on one device.
        machine: for `this-machine`: what `fewbit bench --machine --json` printed; measured now when None.
        bandwidth_gb_s: in place of the data sheet's; for one device.
        runtime: the only one that may be used, for example `vLLM`; any when None.
        prices: per hour and device, by the device's name, or under the empty name for all.
        hardware_file: TOML with further devices.
        layers, kv_heads, head_dim: the cache's geometry, for a bare count.
        out: a directory for decide.html, decide.json, decide.csv and the figures; None writes nothing.

    Raises:
        OutputError: `out` cannot be written.
        UsageError: no model or device, an unknown one, options that contradict each other, or figures that cannot be meant.
        ModelError, CheckpointError: as `read_inventory` and `read_results`.
    """
    if not models or not hardware:
        raise UsageError("a decision needs a model and a device", "name them, for example qwen2.5-7b --hardware h100-sxm")
    if measured and (len(models) > 1 or len(hardware) > 1):
        raise UsageError("measured times belong to one model on one device", "decide one pair at a time, or leave them out")
    if bandwidth_gb_s is not None and len(hardware) > 1:
        raise UsageError("a bandwidth belongs to one device", "decide one device at a time, or add it with --hardware-file")
    base = workload if isinstance(workload, Workload) else get_workload(workload)
    served = with_limits(
        base,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        max_ms_per_token=max_ms_per_token,
        max_ttft_ms=max_ttft_ms,
        max_quality_loss=max_quality_loss,
    )
    devices = [_device(name, hardware_file, machine, bandwidth_gb_s) for name in dict.fromkeys(hardware)]
    for name in prices or {}:
        if name and not any(name == device.name or name in device.aliases for device in devices):
            raise UsageError(f"a price was given for '{name}', which is no --hardware here", "name the device as --hardware does")
    inventories = {str(name): read_inventory(name, layers=layers, kv_heads=kv_heads, head_dim=head_dim) for name in dict.fromkeys(models)}
    losses, warnings = _qualities(quality, perplexity, inventories)
    points, doubts = _points(measured, devices[0], next(iter(inventories.values())))
    warnings += doubts
    situations = [
        _situation(inventory, name, device, served, losses, points, prices or {}, _runtime(runtime, device))
        for name, inventory in inventories.items()
        for device in devices
    ]
    results = DecideResults(served, [decide_cell(situation) for situation in situations], warnings, command)
    if out is not None:
        from fewbit.report.decide_page import write_decide  # matplotlib, which a decision in the terminal does not need

        write_decide(results, [scene_of(situation) for situation in situations], out)
    return results


def _device(name: str, file: Path | None, machine: Path | None, bandwidth_gb_s: float | None) -> Hardware:
    mine = name.strip().lower() == "this-machine"
    return resolve_hardware(name, file=file, machine=machine if mine else None, bandwidth_gb_s=bandwidth_gb_s)


def _situation(
    inventory: Inventory,
    name: str,
    device: Hardware,
    workload: Workload,
    losses: Sequence[MeasuredQuality],
    measured: Sequence[MeasuredPoint],
    prices: Mapping[str, float],
    runtime: str,
) -> Situation:
    price = next((value for key, value in prices.items() if key == device.name or key in device.aliases), prices.get(""))
    model = _loadable(name, inventory)
    return situation_of(inventory, model, device, workload, points=measured, measured=losses, price_per_hour=price, runtime=runtime)


def _runtime(name: str | None, device: Hardware) -> str:
    """The runtime's name as the table of kernels writes it."""
    if name is None:
        return ""
    known = runtime_names(device)
    found = next((one for one in known if name.strip().lower() in (one.lower(), one.lower().partition(" (")[0])), None)
    if found is None:
        raise UsageError(
            f"nothing is known of the runtime '{name}' on {device.label}", f"choose one of {', '.join(known)}, or leave it out"
        )
    return found.partition(" (")[0]


def _loadable(name: str, inventory: Inventory) -> str:
    """What a command can load: the hub id of published shapes; a bare count names no model."""
    if inventory.bare:
        return "MODEL"
    table = tomllib.loads(files("fewbit.models").joinpath("shapes.toml").read_text(encoding="utf-8"))
    row = table.get(name.removeprefix("shapes:").lower())
    return name if row is None or Path(name).exists() else str(row["hub_id"])


def _points(measured: Sequence[str | MeasuredPoint], device: Hardware, inventory: Inventory) -> tuple[list[MeasuredPoint], list[str]]:
    """The measured points that can be true, and what is odd about the others."""
    points = [point for one in measured for point in (read_measured(one) if isinstance(one, str) else [one])]
    outline = outline_of(inventory)
    steps = [examine(device, outline, point) for point in points]
    return [step.measured for step in steps if step.used], [step.problem for step in steps if step.problem]


def _qualities(
    quality: Path | None, perplexity: str | Mapping[str, float] | None, inventories: Mapping[str, Inventory]
) -> tuple[list[MeasuredQuality], list[str]]:
    """Measured losses of both sources, perplexities last, and what is doubtful about them."""
    losses: list[MeasuredQuality] = []
    warnings = []
    if quality is not None:
        results = read_results(quality)
        losses += quality_of_results(results, str(quality))
        source, size = results.model.source, results.model.parameters
        if any(inventory.parameters != size for inventory in inventories.values()):
            warnings.append(f"quality was measured on {source} with {size:,} parameters, which is not every model decided here")
    if perplexity is not None:
        table = parse_perplexities(perplexity) if isinstance(perplexity, str) else dict(perplexity)
        losses += measured_from_perplexities(table)
    if (quality is not None or perplexity is not None) and len(inventories) > 1:
        warnings.append("one set of quality figures was applied to several models")
    return losses, warnings


def quality_of_results(results: CompareResults, source: str = "fewbit compare") -> list[MeasuredQuality]:
    """Losses of the schemes that a comparison measured; of several rows with one scheme, the first.

    Raises:
        UsageError: it measured no quality.
    """
    found: dict[str, MeasuredQuality] = {}
    for row in results.variants:
        if row.quality is None or row.variant.scheme == "BF16":
            continue
        delta = row.quality.perplexity_delta_percent
        where = f"{source}, {row.variant.label}"
        found.setdefault(row.variant.scheme, MeasuredQuality(row.variant.scheme, delta.value, delta.low, delta.high, where))
    if not found:
        raise UsageError(f"{source} holds no measured quality", "run fewbit compare with quality, on the model itself")
    return list(found.values())


def parse_prices(texts: Sequence[str]) -> dict[str, float]:
    """Prices per hour of `2.5` (every device) or `h100-sxm=2.5`.

    Raises:
        UsageError: not a number, negative, or a device twice.
    """
    prices: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        key = name.strip().lower() if equals else ""
        try:
            price = float(value)
        except ValueError:
            price = -1.0
        if not 0 <= price < 1e6 or key in prices:
            raise UsageError(f"'{text}' is no price per hour", "write 2.5 or h100-sxm=2.5, each device once")
        prices[key] = price
    return prices
