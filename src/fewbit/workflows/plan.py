"""`fewbit plan`: configuration, scheme and device in, what becomes of every class of tensors out.

Without the cost nothing here needs torch, which is why the answer comes within a second for any size of model. The cost is the estimate of
`walk.estimate`, the same that `fewbit quantize` prints before it begins.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fewbit.decide.plan import PlanResults, make_plan
from fewbit.errors import UnsupportedModelError, UsageError
from fewbit.formats.spec import Scheme, get_scheme
from fewbit.models.inventory import Inventory
from fewbit.models.inventory_sources import read_inventory
from fewbit.predict.hardware import get_hardware
from fewbit.results import QuantizeEstimate

__all__ = ["plan_model"]


def plan_model(
    model: str | Path | None = None,
    *,
    scheme: str | Scheme = "W4A16",
    kv: str | None = None,
    hardware: str | None = None,
    hardware_file: Path | None = None,
    batch: int = 1,
    context: int = 4096,
    layers: int = 0,
    kv_heads: int = 0,
    head_dim: int = 0,
    method: str = "",
    cost: bool = False,
    figure: Path | None = None,
) -> PlanResults:
    """What a scheme makes of a model.

    Args:
        model: a directory, a config.json, a hub id, published shapes, or a parameter count such as `7e9`; the reference model when None.
        scheme: formats of weights and inputs, or of the cache. kv: format of the cache beside it, `BF16`, `KV-INT8`, `KV-FP8`, `KV-INT4`.
        hardware: a device of `predict/hardware.toml` or of `hardware_file`; None leaves kernels and capacity out.
        batch, context: sequences at once, and tokens of each.
        layers, kv_heads, head_dim: the cache's geometry, for a bare count.
        method: how the numbers are chosen, for the cost; a scheme's usual method when empty.
        cost: estimate memory, disk and time of producing the checkpoint; this measures the machine for two seconds.

        figure: an SVG file for memory against context and batch; None draws nothing.

    Raises:
        OutputError: `figure` cannot be written.
        UsageError: an unknown scheme, device or cache format, or sizes that are not positive.
        ModelError, CheckpointError: as `models.inventory_sources.read_inventory`.
        FormatError: a group size that does not divide a linear.
    """
    if batch < 1 or context < 1:
        raise UsageError(f"batch {batch} and context {context} cannot be meant", "give positive numbers")
    resolved = get_scheme(scheme) if isinstance(scheme, str) else scheme
    cached = get_scheme(kv) if kv is not None else None
    if cached is not None and cached.kv_keys is None and cached.name != "BF16":
        raise UsageError(f"scheme '{kv}' has no format for the cache", "choose BF16, KV-INT8, KV-FP8 or KV-INT4")
    device = get_hardware(hardware, file=hardware_file) if hardware is not None else None
    inventory = read_inventory(model, layers=layers, kv_heads=kv_heads, head_dim=head_dim)
    result = make_plan(inventory, resolved, cached, device, batch=batch, context=context)
    if figure is not None:
        from fewbit.report.files import write_text  # and matplotlib, which a plan in the terminal does not need
        from fewbit.report.plan_figures import memory_figure

        write_text(figure, memory_figure(inventory, resolved, cached, device, batch=batch, context=context).svg + "\n")
    if not cost:
        return result
    estimate, note = _cost(inventory, model, resolved, method)
    return replace(result, cost=estimate, cost_note=note)


def _cost(inventory: Inventory, model: str | Path | None, scheme: Scheme, method: str) -> tuple[QuantizeEstimate | None, str]:
    """Of this machine; a text where it cannot be said."""
    if scheme.weights is None:
        return None, "nothing is written: the scheme changes no weights"
    if inventory.bare:
        return None, "a parameter count is not enough: name a model"
    import torch

    from fewbit.decide.produce import usual_method
    from fewbit.walk.estimate import Group, Workload, estimate_quantization
    from fewbit.walk.rates import measure_rates
    from fewbit.walk.settings import WalkSettings

    if not inventory.layers:
        raise UnsupportedModelError(f"'{inventory.name}' has no blocks to walk through", "leave the cost out")
    per_block: list[Group] = []
    for one in inventory.tensors:
        if one.quantizable and len(one.shape) == 2:
            repeated = max(1, round(one.count / inventory.layers))
            per_block += [Group((one.shape[0],), one.shape[1], one.share)] * repeated
    outside = sum(c.parameters for c in inventory.tensors if "*" not in c.name)
    work = Workload(
        blocks=(tuple(per_block),) * inventory.layers,
        outside=(),
        block_parameters=((inventory.parameters - outside) // inventory.layers,) * inventory.layers,
        kept_bytes=2 * (inventory.parameters - inventory.quantizable_parameters),
        source_bytes=inventory.stored_bytes or 2 * inventory.parameters,
        vocabulary=inventory.vocabulary,
        width=inventory.hidden_size,
        positions=inventory.max_context,
    )
    settings = WalkSettings(method=method or usual_method(scheme))
    estimate = estimate_quantization(work, scheme, settings, torch.float32, measure_rates(scheme, settings, torch.float32, Path.cwd()))
    return (
        estimate,
        f"{settings.method} on this machine, {torch.get_num_threads()} threads, {settings.calibration.samples} calibration windows",
    )
