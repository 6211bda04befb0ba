"""Every layout: exact round trips, the tensors that other tools write, the values by the published decoding rules, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.checkpoints.express import express
from fewbit.checkpoints.gptq import GptqLayout, GptqReader
from fewbit.checkpoints.layout import Layout, LinearsReader
from fewbit.checkpoints.registry import LAYOUTS, get_layout, quantized_reader
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.checkpoints.shards import copy_into_shards, write_tensors
from fewbit.errors import CheckpointError, FewbitError, FormatError, UnsupportedModelError, UsageError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import SCHEMES, QuantSpec, Scheme, get_scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.methods.rtn import rtn

INVENTORIES: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "inventories.json").read_text())
DIRECTORIES = [name for name in LAYOUTS if not get_layout(name).single_file and not name.startswith("dense")]
WRITABLE = [(name, scheme) for name in DIRECTORIES for scheme in SCHEMES.values() if get_layout(name).supports(scheme) is None]
NAMES = {
    torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def quantized(layout: Layout, scheme: Scheme, rows: int = 256, columns: int = 256, seed: int = 0) -> tuple[Scheme, QuantizedTensor]:
    stored = layout.stored(scheme)
    assert stored.weights is not None
    static = stored.input_activations is not None and not stored.input_activations.dynamic
    q = rtn(weight(rows, columns, seed), stored.weights)
    return stored, replace(q, input_scale=torch.tensor([0.02])) if static else q


def write(directory: Path, layout: Layout, scheme: Scheme, linears: dict[str, QuantizedTensor]) -> LinearsReader:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for prefix, q in linears.items() for name, tensor in layout.write_linear(prefix, q, scheme).items()}
    write_tensors(directory / "made.safetensors", tensors)
    files = SafetensorsFiles(directory / "made.safetensors")
    metadata = layout.metadata(scheme, {p: q.shape for p, q in linears.items()}, [f"{p}.weight" for p in linears])
    copy_into_shards(directory, [(name, files.entry(name)) for name in files.names()], metadata=metadata)
    (directory / "made.safetensors").unlink()
    fields = layout.config_fields(scheme, ["lm_head"])
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": fields}))
    for name, content in layout.companions(scheme, ["lm_head"]).items():
        (directory / name).write_text(json.dumps(content))
    return quantized_reader(directory, fields)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(one, other)


@pytest.mark.parametrize(("name", "scheme"), WRITABLE, ids=lambda value: getattr(value, "name", value))
def test_what_was_written_is_read_bit_for_bit(name: str, scheme: Scheme, tmp_path: Path) -> None:
    layout = get_layout(name)
    stored, one = quantized(layout, scheme)
    linears = {Q: one, DOWN: quantized(layout, scheme, 64, 512, 1)[1]}
    reader = write(tmp_path / "out", layout, stored, linears)
    assert set(reader.linears) == set(linears) and reader.scheme.weights == stored.weights
    assert (reader.scheme.input_activations is None) == (stored.input_activations is None)
    assert reader.owned == set(reader.files.names())
    for prefix, q in linears.items():
        read = reader.read(prefix)
        assert read.spec == q.spec
        for field in ("values", "scale", "zero_point", "g_idx", "codebook", "input_scale"):
            assert same(getattr(read, field), getattr(q, field)), field
        assert torch.equal(dequantize(read), dequantize(q)) or (scheme.weights is not None and scheme.weights.global_scale)


INVENTORY_SCHEMES = {
    "gptqmodel_gptq4": ("gptq", "W4A16"),
    "gptqmodel_gptq3": ("gptq", "W3A16"),
    "gptqmodel_gptq8": ("gptq", "W8A16-G128"),
    "gptqmodel_gptq4_v2": ("gptq_v2", "W4A16"),
    "bnb_nf4": ("bitsandbytes", "NF4"),
    "bnb_int8": ("bitsandbytes", "LLM-INT8"),
    "torchao_int8wo": ("torchao", "W8A16"),
    "torchao_int8dyn": ("torchao", "W8A8"),
    "torchao_fp8wo": ("torchao", "FP8A16"),
    "torchao_intx4": ("torchao", "W4A16-G32"),
    "modelopt_fp8_pc_pt": ("modelopt", "FP8"),
    "autoround_ar4_gptq": ("gptq", "W4A16"),
    "autoround_ar4_awq": ("awq", "W4A16"),
}
# what config.json says, besides the names of tools and of linears that are left out
SAID = {
    "bnb_nf4": ("bitsandbytes", "NF4"),
    "bnb_int8": ("bitsandbytes", "LLM-INT8"),
    "torchao_int8wo": ("torchao", "W8A16"),
    "torchao_int8dyn": ("torchao", "W8A8"),
    "torchao_fp8wo": ("torchao", "FP8A16"),
    "torchao_intx4": ("torchao", "W4A16-G32"),
    "modelopt_fp8_pc_pt": ("modelopt", "FP8"),
}


@pytest.mark.parametrize("inventory", INVENTORY_SCHEMES)
def test_names_dtypes_and_shapes_are_those_of_other_tools(inventory: str) -> None:
    name, scheme = INVENTORY_SCHEMES[inventory]
    layout = get_layout(name)
    ours = {}
    for prefix, columns in ((Q, 256), (DOWN, 768)):
        stored, q = quantized(layout, get_scheme(scheme), 256, columns)
        for part, tensor in layout.write_linear(prefix, q, stored).items():
            ours[part] = [NAMES[tensor.dtype], list(tensor.shape)]
    assert ours == INVENTORIES[inventory]["tensors"]


@pytest.mark.parametrize("inventory", SAID)
def test_config_json_says_what_other_tools_say(inventory: str) -> None:
    name, scheme = SAID[inventory]
    layout = get_layout(name)
    ours = layout.config_fields(layout.stored(get_scheme(scheme)), [])
    theirs = INVENTORIES[inventory]["quantization_config"]
    own = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore", "producer", "bnb_4bit_compute_dtype")

    def plain(value: Any) -> Any:
        return {k: plain(v) for k, v in value.items() if k not in (*own, "_version")} if isinstance(value, dict) else value

    assert plain(ours) == plain(theirs)


@pytest.mark.parametrize("inventory", [name for name, row in INVENTORIES.items() if row["quantization_config"]])
def test_other_tools_checkpoints_have_a_reader_that_knows_their_linears(inventory: str, tmp_path: Path) -> None:
    row = INVENTORIES[inventory]
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    tensors = {name: torch.zeros(shape, dtype=dtypes[dtype]) for name, (dtype, shape) in row["tensors"].items()}
    for name in tensors:
        if ".quant_state." in name:  # JSON as bytes
            state = {"quant_type": name[-3:], "blocksize": 64, "shape": [256, 256], "nested_offset": 0.0}
            tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    write_tensors(tmp_path / "model.safetensors", tensors)
    try:
        reader = quantized_reader(tmp_path, row["quantization_config"])
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    assert {Q, DOWN} <= set(reader.linears)
    assert reader.owned == set(tensors)
    assert reader.scheme.weights is not None


# ------------------------------------------------------------------------------------- the values, by the published decoding rules


def decoded_gptq(tensors: dict[str, torch.Tensor], bits: int, version: int) -> torch.Tensor:
    """[in, out], element by element."""
    stream = [tensors["qweight"].T.contiguous().numpy().astype("uint32"), tensors["qzeros"].numpy().astype("uint32")]
    scales, g_idx = tensors["scales"].float(), tensors["g_idx"].tolist()

    def field(words: Any, index: int) -> int:
        number = sum(int(word) << (32 * i) for i, word in enumerate(words))
        return number >> (bits * index) & (2**bits - 1)

    columns, rows = len(g_idx), scales.shape[1]
    result = torch.empty(columns, rows)
    for i in range(columns):
        for o in range(rows):
            zero = field(stream[1][g_idx[i]], o) + (1 if version == 1 else 0)
            result[i, o] = (field(stream[0][o], i) - zero) * scales[g_idx[i], o]
    return result


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (3, False), (4, True), (4, False), (8, True)])
def test_gptq_values_by_the_rule(bits: int, symmetric: bool) -> None:
    layout = GptqLayout(1)
    scheme = layout.stored(Scheme("", weights=QuantSpec(bits, strategy="group", group_size=32, symmetric=symmetric)))
    assert scheme.weights is not None
    q = rtn(weight(32, 64), scheme.weights)
    tensors = {name.removeprefix("p."): tensor for name, tensor in layout.write_linear("p", q, scheme).items()}
    assert torch.equal(decoded_gptq(tensors, bits, 1 if symmetric else 2).T, dequantize(q))


def test_awq_values_by_the_rule() -> None:
    layout = get_layout("awq")
    scheme = layout.stored(get_scheme("W4A16-ASYM"))
    assert scheme.weights is not None
    q = rtn(weight(16, 128), scheme.weights)
    tensors = {name.removeprefix("p."): tensor for name, tensor in layout.write_linear("p", q, scheme).items()}
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for i in range(128):
        for o in range(16):
            shift = 4 * order.index(o % 8)
            code = int(tensors["qweight"][i, o // 8]) >> shift & 0xF
            zero = int(tensors["qzeros"][0, o // 8]) >> shift & 0xF
            assert (code - zero) * tensors["scales"][0, o].float() == dequantize(q)[o, i]


# ----------------------------------------------------------------------------------------------------- GPTQ's versions and orders


def gptq_directory(tmp_path: Path, **changed: Any) -> tuple[Path, dict[str, Any], QuantizedTensor]:
    layout = GptqLayout(1)
    scheme, q = quantized(layout, get_scheme("W4A16-G32"))
    reader = write(tmp_path / "gptq", layout, scheme, {Q: q})
    return reader.directory, {**reader.fields, **changed}, q


def test_gptq_symmetric_zero_points_are_those_of_the_versions() -> None:
    scheme, q = quantized(GptqLayout(1), get_scheme("W4A16"))
    for version, word in ((1, 0x77777777), (2, 0x88888888 - 2**32)):
        zeros = GptqLayout(version).write_linear(Q, q, scheme)[f"{Q}.qzeros"]
        assert bool((zeros == word).all())


def test_a_version_that_contradicts_the_zero_points_is_refused(tmp_path: Path) -> None:
    directory, fields, _ = gptq_directory(tmp_path, checkpoint_format="gptq_v2")
    with pytest.raises(CheckpointError, match="versions 1 and 2"):
        GptqReader(directory, fields).read(Q)


def test_a_zero_point_of_zero_in_version_1_borrows_from_its_neighbour(tmp_path: Path) -> None:
    directory, fields, q = gptq_directory(tmp_path, sym=False)
    files = SafetensorsFiles(directory)
    tensors = {name: files.get(name) for name in files.names()}
    zeros = torch.arange(8 * 32, dtype=torch.int64).view(8, 32).remainder(2**32)  # every field takes the value 0 somewhere
    tensors[f"{Q}.qzeros"] = (zeros - 0x11111111).to(torch.int32)
    write_tensors(directory / "model.safetensors", tensors)
    read = GptqReader(directory, fields).read(Q)
    assert read.zero_point is not None
    expected = [[int(zeros[g, o // 8]) >> (4 * (o % 8)) & 0xF for g in range(8)] for o in range(256)]
    assert (read.zero_point + 8).tolist() == expected
    assert torch.equal(read.values, q.values)


def test_reordered_columns_are_read(tmp_path: Path) -> None:
    directory, fields, q = gptq_directory(tmp_path, desc_act=True)
    files = SafetensorsFiles(directory)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3))
    g_idx = (torch.arange(256, dtype=torch.int32) // 32)[order]
    write_tensors(directory / "model.safetensors", {**{n: files.get(n) for n in files.names()}, f"{Q}.g_idx": g_idx})
    read = GptqReader(directory, fields).read(Q)
    assert read.g_idx is not None and torch.equal(read.g_idx, g_idx)
    assert torch.equal(dequantize(read), q.values.float() * q.scale.float()[:, g_idx.long()])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": "4"}, "no integer"),
        ({"bits": True}, "no integer"),
        ({"bits": 5}, "2, 3, 4 or 8"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 96}, "whole groups"),
        ({"group_size": 64}, "scales"),
        ({"sym": "yes"}, "neither true nor false"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"checkpoint_format": ["gptq"]}, "packed as"),
    ],
)
def test_gptq_fields_that_do_not_fit_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory, fields, _ = gptq_directory(tmp_path, **changed)
    with pytest.raises(FewbitError, match=message):
        GptqReader(directory, fields).read(Q)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_missing_or_reshaped_part_is_refused_by_name(name: str, tmp_path: Path) -> None:
    layout = get_layout(name)
    scheme = next(scheme for layout_name, scheme in WRITABLE if layout_name == name)
    stored, q = quantized(layout, scheme)
    reader = write(tmp_path / "out", layout, stored, {Q: q})
    tensors = {part: reader.files.get(part) for part in reader.files.names()}
    for part in tensors:
        if part.endswith("g_idx"):
            continue  # may be absent
        directory = tmp_path / part
        directory.mkdir()
        (directory / "config.json").write_text((reader.directory / "config.json").read_text())
        write_tensors(directory / "model.safetensors", {n: t for n, t in tensors.items() if n != part} | {"other.bias": torch.zeros(1)})
        with pytest.raises(FewbitError):
            quantized_reader(directory, reader.fields).read(Q)


def test_what_a_layout_lacks_is_refused_with_a_reason() -> None:
    for name, scheme, reason in (("gptq", "NF4", "NF4"), ("gptq", "W8A8", "input"), ("awq", "W8A16", "4 bits"), ("awq", "FP8A16", "FP8")):
        assert reason in str(get_layout(name).supports(get_scheme(scheme)))
    with pytest.raises(UsageError, match="unknown format"):
        get_layout("onnx")
    with pytest.raises(FormatError, match="whole 32-bit words"):
        get_layout("gptq").check_shape("p", 12, 64, QuantSpec(4, strategy="group", group_size=32))
    with pytest.raises(FormatError, match="eight"):
        get_layout("awq").check_shape("p", 12, 64, QuantSpec(4, strategy="group", group_size=32))


# ------------------------------------------------------------------------------------------------------ from one layout to another


def lossless_pairs() -> list[tuple[str, str, str]]:
    """Scheme, and two layouts that hold its grid with scales that both of their dtypes hold."""
    pairs = []
    for scheme in ("W4A16-G32", "W4A16-ASYM", "W3A16", "W8A16", "W8A8", "LLM-INT8", "FP8A16", "FP8", "NF4", "MXFP4"):
        spec = get_scheme(scheme).weights
        assert spec is not None
        nearest = {name: get_layout(name).nearest(spec) for name in DIRECTORIES}
        holders = [name for name, held in nearest.items() if held is not None and held.num_bits == spec.num_bits]
        pairs += [(scheme, one, other) for one in holders for other in holders if one != other]
    return pairs


@pytest.mark.parametrize(("scheme", "one", "other"), lossless_pairs(), ids=lambda value: value)
def test_there_and_back_between_two_layouts_is_byte_identical(scheme: str, one: str, other: str) -> None:
    first, second = get_layout(one), get_layout(other)
    base = get_scheme(scheme)
    assert base.weights is not None
    q = rtn(weight(64, 256), replace(base.weights, scale_dtype="bfloat16") if base.weights.scale_dtype == "float32" else base.weights)
    if q.scale.is_floating_point():  # scales that BF16 and FP16 both hold: what a layout rounds is `express`'s own test
        q = replace(q, scale=q.scale.float().clamp_min(2**-10).to(torch.float16).to(torch.bfloat16).to(q.scale.dtype))
    here = first.nearest(q.spec)
    assert here is not None
    start = express(q, here).tensor
    there = second.nearest(here)
    if there is None:
        pytest.skip(f"{other} does not hold {here}")
    moved = express(start, there)
    back = express(moved.tensor, here)
    assert moved.rounded_scales == back.rounded_scales == 0
    schemes = [Scheme("", weights=spec, input_activations=base.input_activations) for spec in (here, there)]
    before, after = (first.write_linear("p", tensor, schemes[0]) for tensor in (start, back.tensor))
    assert before.keys() == after.keys() and all(same(before[name], after[name]) for name in before)
    assert torch.equal(dequantize(moved.tensor), dequantize(start))
