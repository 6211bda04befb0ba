"""Devices: what their memory and their matrix units can do, as data with sources (`hardware.toml` beside this file).

Two figures of a device decide most of a step: bytes per second of its memory and dense operations per second in each number format that
its matrix units multiply. Rates with 2:4 sparsity, which data sheets print first, are never used. A format that the units do not multiply
is not in `dense_tflop_s`: its weights are converted to 16 bit before the product, however few bits they have in memory.

Add a device with a table of the same form in a file of your own (`--hardware-file`), or describe this machine by measuring it
(`fewbit bench --machine`), which `measured_hardware` turns into the same type.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from fewbit.errors import UsageError
from fewbit.predict.rates import Rates
from fewbit.results import MachineResult

__all__ = ["HARDWARE", "ComputeFormat", "Hardware", "Kind", "get_hardware", "measured_hardware", "read_hardware"]

Kind = Literal[
    "nvidia_datacenter",
    "nvidia_workstation",
    "nvidia_consumer",
    "nvidia_unified",
    "amd_datacenter",
    "amd_unified",
    "intel_datacenter",
    "apple",
    "intel_unified",
    "cpu",
]
ComputeFormat = Literal["bf16", "int8", "fp8", "fp4", "int4"]
_GIB = 2**30
# What is not there for weights and cache. Discrete cards: driver, context and the runtime's own buffers. Unified memory and CPUs share
# with an operating system.
_RESERVED_GIB = {"discrete": 1.5, "shared": 4.0}
_LARGEST_RESERVED_SHARE = 0.25


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: what `--hardware` takes. label: what people call it.
        kind: class of device; the priors of the efficiencies are per class.
        memory_bytes: capacity. bandwidth_gb_s: data sheet (or measured), 1e9 bytes per second.
        dense_tflop_s: 1e12 operations per second of the matrix units without sparsity, by the format they multiply; `bf16` is always there.
        vector_tflop_s: 1e12 FP32 operations per second of the ordinary units, which unpack weights before 16-bit products.
        capability: CUDA compute capability; None for others.
        measured: bandwidth and rates were measured on the machine, not read in a data sheet.
        null_op_us: microseconds of a smallest operator where it was measured.
        rates: of the kernels that run, where they were measured; then they count, and not the peaks.
        sources, note: where the figures come from and what was derived.
        aliases: other names.
    """

    name: str
    label: str
    kind: Kind
    memory_bytes: int
    bandwidth_gb_s: float
    dense_tflop_s: Mapping[str, float]
    vector_tflop_s: float
    capability: float | None = None
    measured: bool = False
    null_op_us: float | None = None
    rates: Rates | None = None
    sources: tuple[str, ...] = ()
    note: str = ""
    aliases: tuple[str, ...] = field(default=())

    @property
    def shares_memory(self) -> bool:
        """The operating system lives in the same memory."""
        return self.kind in ("nvidia_unified", "amd_unified", "apple", "intel_unified", "cpu")

    @property
    def reserved_bytes(self) -> int:
        """Memory that driver, runtime and operating system need: a rule of thumb, at most a quarter of the device."""
        needed = _RESERVED_GIB["shared" if self.shares_memory else "discrete"] * _GIB
        return int(min(needed, _LARGEST_RESERVED_SHARE * self.memory_bytes))

    def multiplies(self, number_format: str) -> bool:
        """Whether the matrix units multiply this format itself."""
        return number_format in self.dense_tflop_s


def read_hardware(text: str, where: str = "hardware.toml") -> dict[str, Hardware]:
    """Devices of a TOML document.

    Args:
        text: tables as in `hardware.toml`.
        where: the file's name, for messages.

    Raises:
        UsageError: not TOML, a field is missing or unknown, or a figure is not positive.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {error}", "see predict/hardware.toml in the package for the form") from error
    return {name: _device(name, table, where) for name, table in tables.items()}


_REQUIRED = ("label", "kind", "memory_gib", "bandwidth", "dense", "sources")
_OPTIONAL = ("aliases", "capability", "note", "vector")
_VECTOR_SHARE = 1 / 8


def _device(name: str, table: Any, where: str) -> Hardware:
    here = f"device '{name}' in {where}"
    if not isinstance(table, dict):
        raise UsageError(f"{here} is not a table", f"write [{name}] and the fields {', '.join(_REQUIRED)} below it")
    missing = [key for key in _REQUIRED if key not in table]
    unknown = [key for key in table if key not in (*_REQUIRED, *_OPTIONAL)]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown fields {', '.join(unknown)}"
        raise UsageError(f"{here} {what}", f"fields are {', '.join(_REQUIRED)}, optionally {', '.join(_OPTIONAL)}")
    if table["kind"] not in get_args(Kind):
        raise UsageError(f"{here} has the unknown kind '{table['kind']}'", f"choose one of {', '.join(get_args(Kind))}")
    dense = table["dense"]
    if not isinstance(dense, dict) or "bf16" not in dense or set(dense) - set(get_args(ComputeFormat)):
        raise UsageError(f"{here}: dense must give bf16 and may give {', '.join(get_args(ComputeFormat)[1:])}", "1e12 dense operations/s")
    vector = table.get("vector", dense["bf16"] * _VECTOR_SHARE)
    figures = {"memory_gib": table["memory_gib"], "bandwidth": table["bandwidth"], "vector": vector, **dense}
    for key, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise UsageError(f"{here}: {key} is {value!r}", "give a positive number")
    return Hardware(
        name=name,
        label=str(table["label"]),
        kind=table["kind"],
        memory_bytes=round(table["memory_gib"] * _GIB),
        bandwidth_gb_s=float(table["bandwidth"]),
        dense_tflop_s={key: float(value) for key, value in dense.items()},
        vector_tflop_s=float(vector),
        capability=table.get("capability"),
        sources=tuple(table["sources"]),
        note=str(table.get("note", "")),
        aliases=tuple(table.get("aliases", ())),
    )


HARDWARE: Mapping[str, Hardware] = read_hardware(files("fewbit.predict").joinpath("hardware.toml").read_text(encoding="utf-8"))


def get_hardware(name: str, *, bandwidth_gb_s: float | None = None, file: Path | None = None) -> Hardware:
    """The device of that name or alias, upper or lower case.

    Args:
        name: of `HARDWARE`, or of `file`.
        bandwidth_gb_s: in place of the data sheet's.
        file: TOML with further devices, which go before the package's own.

    Raises:
        UsageError: no such device, an unreadable file, or a bandwidth that is not positive.
    """
    known = dict(HARDWARE)
    if file is not None:
        try:
            known |= read_hardware(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the hardware file {file}: {error}", "give a TOML file") from error
    wanted = name.strip().lower()
    device = known.get(wanted) or next((d for d in known.values() if wanted in d.aliases or wanted == d.name.lower()), None)
    if device is None:
        near = [key for key in known if wanted and (wanted in key or key in wanted)]
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(known)}"
        raise UsageError(f"unknown hardware '{name}'", f"{hint}; add a device with --hardware-file")
    if bandwidth_gb_s is None:
        return device
    if not 0 < bandwidth_gb_s < 1e6:
        raise UsageError(f"a bandwidth of {bandwidth_gb_s:g} GB/s cannot be meant", "give 1e9 bytes per second")
    return replace(device, bandwidth_gb_s=bandwidth_gb_s)


def measured_hardware(machine: MachineResult, memory_bytes: int, label: str = "this machine", compute: str = "exact") -> Hardware:
    """The machine that `fewbit bench --machine` measured, as a device.

    Args:
        machine: the measurement. With rates of kernels, peaks are the best that any of them reached.
        memory_bytes: its capacity.
        label: its processor.
        compute: which kernels run, `exact` ones or those with `int8-activations`.
    """
    peaks = {"bf16": machine.gemm_gflop_s / 1e3}
    rates = None if machine.rates is None else Rates(machine.rates, compute)
    bandwidth = machine.read_bandwidth_gb_s
    if rates is not None:
        bandwidth = rates.measured.read_bandwidth_gb_s
        for name, scheme in (("bf16", "BF16"), ("int8", "W8A8")):
            found = rates.kernel(scheme)
            if found:
                peaks[name] = max(peaks.get(name, 0.0), rates.peak_tera(found))
    return Hardware(
        name="this-machine",
        label=label,
        kind="cpu",
        memory_bytes=memory_bytes,
        bandwidth_gb_s=bandwidth,
        dense_tflop_s=peaks,
        vector_tflop_s=peaks["bf16"],
        measured=True,
        null_op_us=machine.time_per_null_op_us,
        rates=rates,
        sources=(f"fewbit bench --machine: {machine.bandwidth_method}",),
    )
