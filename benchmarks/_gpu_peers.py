"""The peers of section 3 that import here: torch's int4 kernel, gemlite, bitsandbytes, torchao, and vLLM's Marlin where it is built.

All multiply BF16 rows with 4-bit weights in groups of 128 (bitsandbytes: NF4 in groups of 64). Random codes will do: times do not depend on
them. A peer that does not import, or refuses, is a line among the failures with its own words.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from _gpu_common import Clock, Settings, copies_for, random_rows
from _gpu_kernels import BAR_SHAPES, Multiply, time_contender

from fewbit.errors import FewbitError

__all__ = ["PEERS", "measure_peers", "measure_torch"]

_GROUP = 128
_FEW, _MANY = (1, 4, 8, 16), (128, 32, 64, 1024)
_OTHER_SHAPES = {"8b gate,up": (28672, 4096), "3b gate,up": (22016, 2048)}


def measure_torch(settings: Settings, seconds: float, machine: dict[str, Any]) -> None:
    """torch's own int4 kernel: it is everywhere, so it is measured beside fewbit's."""
    _measure(settings, Clock(seconds, settings), machine, "torch-int4", BAR_SHAPES | _OTHER_SHAPES)


def measure_peers(settings: Settings, seconds: float, machine: dict[str, Any]) -> None:
    """Rows `kernels` of the peers that are installed."""
    clock = Clock(seconds, settings)
    for peer in PEERS:
        if peer != "torch-int4":
            _measure(settings, clock, machine, peer, BAR_SHAPES)


def _measure(settings: Settings, clock: Clock, machine: dict[str, Any], peer: str, shapes: dict[str, tuple[int, int]]) -> None:
    if settings.attempt(f"{peer} is installed", lambda: _MODULES[peer] is None or importlib.import_module(_MODULES[peer])) is None:
        return
    for name, shape in ({"tiny": (48, 256)} if settings.tiny else shapes).items():

        def run(name: str = name, shape: tuple[int, int] = shape) -> None:
            if not settings.cuda:
                raise FewbitError("peers are timed on GPUs")
            first, nbytes = PEERS[peer](settings, *shape)
            copies = [first] + [PEERS[peer](settings, *shape)[0] for _ in range(copies_for(nbytes, settings) - 1)]
            time_contender(settings, clock, machine, peer, name, shape, _FEW + _MANY, copies, nbytes)

        if clock.allows(f"{peer} {name}"):
            settings.attempt(f"{peer} {name}", run)


def _scale_bytes(out: int, columns: int, each: int) -> int:
    return out * columns // _GROUP * each


def _torch_int4(settings: Settings, out: int, columns: int) -> tuple[Multiply, int]:
    codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=settings.device)
    scales = torch.full((columns // _GROUP, out, 2), 0.01, dtype=torch.bfloat16, device=settings.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, _GROUP, scales), packed.nbytes + scales.nbytes


def _gemlite(settings: Settings, out: int, columns: int) -> tuple[Multiply, int]:
    core: Any = importlib.import_module("gemlite.core")
    make = getattr(core, "GemLiteLinear", None) or core.GemLiteLinearTriton
    layer = make(4, group_size=_GROUP, in_features=columns, out_features=out, input_dtype=core.DType.BF16, output_dtype=core.DType.BF16)
    codes = torch.randint(0, 16, (out, columns), dtype=torch.uint8, device=settings.device)
    scales = torch.full((out * columns // _GROUP, 1), 0.01, dtype=torch.bfloat16, device=settings.device)
    layer.pack(codes, scales, torch.full_like(scales, 8.0), None)
    return layer, out * columns // 2 + _scale_bytes(out, columns, 4)


def _bitsandbytes(settings: Settings, out: int, columns: int) -> tuple[Multiply, int]:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    matmul: Any = importlib.import_module("bitsandbytes").matmul_4bit
    packed, state = functional.quantize_4bit(random_rows(settings, out, columns), blocksize=64, quant_type="nf4")
    return lambda x: matmul(x, packed.t(), quant_state=state), packed.nbytes + state.absmax.nbytes


def _torchao(settings: Settings, out: int, columns: int) -> tuple[Multiply, int]:
    quantization: Any = importlib.import_module("torchao.quantization")
    make = quantization.Int4WeightOnlyConfig
    try:  # tinygemm's layout; older versions know no other and have no such argument
        config = make(group_size=_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    except TypeError:
        config = make(group_size=_GROUP)
    linear = torch.nn.Linear(columns, out, bias=False, device=settings.device, dtype=settings.dtype).requires_grad_(False)
    quantization.quantize_(linear, config)
    return linear, out * columns // 2 + _scale_bytes(out, columns, 4)


def _marlin(settings: Settings, out: int, columns: int) -> tuple[Multiply, int]:
    """vLLM's. The kernel's name and arguments have changed often, those of its wrapper in Python less: they go by name, and what a version
    does not take is left out."""
    inspect: Any = importlib.import_module("inspect")
    operators: Any = importlib.import_module("vllm._custom_ops")
    scalars: Any = importlib.import_module("vllm.scalar_type").scalar_types
    utilities: Any = importlib.import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    device = torch.device(settings.device, torch.cuda.current_device())
    codes = torch.randint(-(2**31), 2**31 - 1, (columns // 8, out), dtype=torch.int32, device=device)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    repack = operators.gptq_marlin_repack
    known = {"b_q_weight": codes, "perm": nothing, "size_k": columns, "size_n": out, "num_bits": 4, "is_a_8bit": False}
    weight = repack(**{name: value for name, value in known.items() if name in inspect.signature(repack).parameters})
    scales = torch.full((columns // _GROUP, out), 0.01, dtype=settings.dtype, device=device)
    scales = utilities.marlin_permute_scales(scales, columns, out, _GROUP)
    apply = utilities.apply_gptq_marlin_linear
    options = {
        "weight": weight, "weight_scale": scales, "weight_zp": nothing, "g_idx": nothing, "g_idx_sort_indices": nothing,
        "workspace": utilities.marlin_make_workspace_new(device), "wtype": scalars.uint4b8, "output_size_per_partition": out,
        "input_size_per_partition": columns, "is_k_full": True,
    }  # fmt: skip
    taken = {name: value for name, value in options.items() if name in inspect.signature(apply).parameters}
    return lambda x: apply(x, **taken), weight.nbytes + scales.nbytes


PEERS: dict[str, Callable[[Settings, int, int], tuple[Multiply, int]]] = {
    "torch-int4": _torch_int4, "marlin": _marlin, "gemlite-int4": _gemlite, "torchao-int4": _torchao, "bitsandbytes-nf4": _bitsandbytes,
}  # fmt: skip
_MODULES = {
    "torch-int4": None, "marlin": "vllm._custom_ops", "gemlite-int4": "gemlite", "torchao-int4": "torchao",
    "bitsandbytes-nf4": "bitsandbytes",
}  # fmt: skip
