"""`fewbit formats`: what each number format can hold, and what it costs by granularity.

Three kinds of made-up numbers show why granularity matters, and a real weight shows that it does in practice:

    gaussian       what most rows of a trained weight look like
    heavy-tailed   Student's t with 3 degrees of freedom: rare values many times the usual size
    outliers       rows of different size, and one column in 128 ten times larger: what per-channel scales and groups are made for

Each is quantized by RTN with min-max scales, in BF16 unless the format brings its own, from one scale per tensor to one for 16 values.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from fewbit.checkpoints.safetensors_files import SafetensorsFiles, read_header
from fewbit.errors import CheckpointError, FormatError, ModelNotFoundError, UsageError
from fewbit.formats.cost import storage_bytes
from fewbit.formats.grids import GRIDS, Grid
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import QuantSpec, get_scheme
from fewbit.methods.rtn import rtn
from fewbit.models.reference import reference_model_dir
from fewbit.results import FormatData, FormatErrors, FormatInfo, FormatsResult, HardwareSupport

__all__ = ["describe_formats"]

_ROWS, _COLUMNS, _SEED = 256, 1024, 0
_MAX_ELEMENTS = 1 << 21  # rows beyond that are left out: errors are known to four digits by then
_NEAR_ZERO = 6
_GROUP_SIZES = (256, 128, 64, 32, 16)
_VALUE_FORMATS = {
    "INT8": QuantSpec(8),
    "FP8 E4M3": QuantSpec(8, "float", exponent_bits=4),
    "INT4": QuantSpec(4),
    "NF4": QuantSpec(4, "nf"),
    "INT3": QuantSpec(3),
}
_BLOCK_FORMATS = ("MXFP4", "NVFP4")


def describe_formats(tensor: str | None = None) -> FormatsResult:
    """Describe every format and measure it on numbers.

    Args:
        tensor: `FILE:NAME`, a 2-D tensor of a safetensors file; the last MLP projection of the bundled model when None.

    Raises:
        UsageError: not of the form FILE:NAME.
        ModelNotFoundError: no such file.
        CheckpointError: a damaged file, or no tensor of that name in it.
        FormatError: the tensor is not a 2-D floating-point one, or holds NaN or infinities.
    """
    name, real = _default_weight() if tensor is None else _read_tensor(tensor)
    description = f"{name}, {real.shape[0]} x {real.shape[1]}"
    if real.numel() > _MAX_ELEMENTS:
        real = real[: max(1, _MAX_ELEMENTS // real.shape[1])]
        description += f", the first {real.shape[0]} rows"
    data = [_measure(label, text, numbers) for label, text, numbers in _synthetic()]
    data.append(_measure("real weight", description, real.float()))
    return FormatsResult([_describe(grid) for grid in GRIDS.values()], data, _conclude(data))


def _describe(grid: Grid) -> FormatInfo:
    points = grid.code_points().tolist()
    near_zero = [p for p in points if p > 0][:_NEAR_ZERO] or [grid.smallest * i for i in range(1, _NEAR_ZERO + 1)]
    native = [HardwareSupport(n.hardware, n.source) for n in grid.native]
    return FormatInfo(
        grid.name, grid.label, grid.num_bits, grid.minimum, grid.maximum, grid.smallest, grid.epsilon, points, near_zero, native
    )


def _synthetic() -> list[tuple[str, str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(_SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gaussian = normal(_ROWS, _COLUMNS)
    student = normal(_ROWS, _COLUMNS) / normal(3, _ROWS, _COLUMNS).square().mean(0).sqrt()
    outliers = normal(_ROWS, _COLUMNS) * torch.exp(0.5 * normal(_ROWS, 1))
    outliers[:, 64::128] *= 10
    return [
        ("gaussian", "normal distribution", gaussian),
        ("heavy-tailed", "Student's t, 3 degrees of freedom", student),
        ("outliers", "rows of log-normal size (sigma 0.5), every 128th column ten times larger", outliers),
    ]


def _specs(columns: int) -> list[tuple[str, str, QuantSpec]]:
    """(format, granularity, spec) of everything that fits a weight with that many columns."""
    found: list[tuple[str, str, QuantSpec]] = []
    for name, spec in _VALUE_FORMATS.items():
        found.append((name, "tensor", spec))
        found.append((name, "channel", replace(spec, strategy="channel")))
        groups = [size for size in _GROUP_SIZES if columns % size == 0]
        found.extend((name, f"group {size}", replace(spec, strategy="group", group_size=size)) for size in groups)
    for name in _BLOCK_FORMATS:
        spec_or_none = get_scheme(name).weights
        if spec_or_none is not None and spec_or_none.group_size and columns % spec_or_none.group_size == 0:
            found.append((name, f"group {spec_or_none.group_size}", spec_or_none))
    return found


def _measure(name: str, description: str, numbers: torch.Tensor) -> FormatData:
    rows, columns = numbers.shape
    errors = []
    norm = float(numbers.double().norm())
    for label, granularity, spec in _specs(columns):
        difference = dequantize(rtn(numbers, spec)).sub_(numbers)
        relative = float(difference.double().norm()) / norm if norm else 0.0
        bits = 8 * storage_bytes(spec, rows, columns) / numbers.numel()
        sqnr = -20 * math.log10(max(relative, 1e-12))  # exact numbers (an all-zero weight) show as 240 dB
        errors.append(FormatErrors(label, granularity, bits, bits - spec.num_bits, relative, sqnr))
    return FormatData(name, description, rows, columns, errors)


def _conclude(data: list[FormatData]) -> list[str]:
    by_name = {d.name: {(e.format, e.granularity): e for e in d.errors} for d in data}

    def error(name: str, form: str, granularity: str) -> float | None:
        entry = by_name[name].get((form, granularity))
        return None if entry is None else 100 * entry.relative_error

    found = []
    tensor, channel = error("outliers", "INT8", "tensor"), error("outliers", "INT8", "channel")
    if tensor is not None and channel is not None:
        found.append(
            f"Why per channel: rows differ in size, and one scale for all lets the largest set the step. INT8 errs by {tensor:.2g} % per "
            f"tensor and by {channel:.2g} % per channel on the numbers with outliers, for 16 bits per row."
        )
    whole, group_128, group_32 = (error("gaussian", "INT4", g) for g in ("channel", "group 128", "group 32"))
    if whole is not None and group_128 is not None and group_32 is not None:
        found.append(
            f"Why group 128: INT4 on Gaussian numbers errs by {whole:.3g} % per channel and {group_128:.3g} % with groups of 128, "
            f"for 0.125 bits more. From there every halving takes off about {(group_128 - group_32) / 2:.2g} points and doubles those "
            f"bits: groups of 32 reach {group_32:.3g} % for 0.5 bits."
        )
    flat, real = error("real weight", "INT4", "channel"), error("real weight", "INT4", "group 128")
    if flat is not None and real is not None:
        found.append(f"On the real weight INT4 errs by {flat:.3g} % per channel and {real:.3g} % with groups of 128.")
    return found


def _default_weight() -> tuple[str, torch.Tensor]:
    """The last MLP down projection of the bundled model: trained, and read by the residual stream directly."""
    files = SafetensorsFiles(reference_model_dir())
    projections = [name for name in files.names() if name.endswith("mlp.down_proj.weight")]
    name = max(projections, key=lambda n: [int(number) for number in re.findall(r"\d+", n)])
    return f"{name} of the bundled model", files.get(name)


def _read_tensor(tensor: str) -> tuple[str, torch.Tensor]:
    path, colon, name = tensor.rpartition(":")
    if not colon or not path or not name:
        raise UsageError(f"'{tensor}' is not of the form FILE:NAME", "for example model.safetensors:model.layers.0.mlp.down_proj.weight")
    file = Path(path)
    if not file.is_file():
        raise ModelNotFoundError(f"there is no file '{file}'", "give the path of a .safetensors file, then a colon and a tensor's name")
    entries = read_header(file)
    if name not in entries:
        matrices = [n for n, entry in entries.items() if len(entry.shape) == 2]
        some = ", ".join(matrices[:4]) or "no 2-D tensor"
        raise CheckpointError(f"'{file}' has no tensor '{name}'", f"it has {some}{', ...' if len(matrices) > 4 else ''}")
    with safe_open(file, framework="pt") as opened:
        values: torch.Tensor = opened.get_tensor(name)
    if values.ndim != 2 or not values.is_floating_point() or values.numel() == 0:
        shape = f"{str(values.dtype).removeprefix('torch.')} of shape {list(values.shape)}"
        raise FormatError(f"'{name}' is {shape}", "name a 2-D floating-point weight, for example an MLP projection")
    return name, values
