"""The compressed-tensors layout: exact round trips, the library's own decompression, llm-compressor's inventories."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig as LayoutConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.checkpoints.compressed_tensors import CompressedTensorsReader, layout_format, quantization_config, supports, write_linear
from fewbit.checkpoints.shards import write_tensors
from fewbit.errors import CheckpointError, FewbitError, FormatError, ModelNotFoundError, UnsupportedModelError, UsageError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import SCHEMES, QuantSpec, Scheme, get_scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.methods.rtn import rtn

WRITABLE = [name for name, scheme in SCHEMES.items() if supports(scheme) is None]
INVENTORIES = json.loads((Path(__file__).parent / "data" / "llm_compressor.json").read_text())["checkpoints"]
SAFETENSORS_NAMES = {
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}


def write(directory: Path, scheme: Scheme, linears: dict[str, QuantizedTensor]) -> Path:
    directory.mkdir(exist_ok=True)
    tensors = {name: tensor for prefix, q in linears.items() for name, tensor in write_linear(prefix, q, scheme).items()}
    write_tensors(directory / "model.safetensors", tensors)
    config = {"model_type": "llama", "quantization_config": quantization_config(scheme, ["lm_head"])}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same(read: QuantizedTensor, written: QuantizedTensor) -> None:
    assert read.spec == written.spec
    assert torch.equal(bits(read.values), bits(written.values)) and read.values.dtype == written.values.dtype
    assert torch.equal(bits(read.scale), bits(written.scale)) and read.scale.dtype == written.scale.dtype
    assert (read.zero_point is None) == (written.zero_point is None)
    if read.zero_point is not None and written.zero_point is not None:
        assert torch.equal(read.zero_point, written.zero_point) and read.zero_point.dtype == torch.int8
    if written.global_scale is not None:
        assert read.global_scale is not None
        torch.testing.assert_close(read.global_scale, written.global_scale, rtol=2**-22, atol=0)  # a reciprocal there and back


def test_every_scheme_has_an_answer() -> None:
    assert {"W8A16", "W4A16", "W4A16-G32", "W4A16-ASYM", "W3A16", "W2A16", "W8A8", "FP8", "FP8-BLOCK", "NVFP4", "MXFP4"} <= set(WRITABLE)
    assert set(SCHEMES) - set(WRITABLE) == {"BF16", "NF4", "FP8-E5M2", "KV-INT8", "KV-FP8", "KV-INT4", "KV-INT4-KIVI"}


@pytest.mark.parametrize(
    ("name", "reason"), [("NF4", "no NF4"), ("FP8-E5M2", "no FP8 E5M2"), ("KV-INT4", "only the KV cache"), ("BF16", "quantizes nothing")]
)
def test_what_the_layout_lacks_is_refused_by_name(name: str, reason: str) -> None:
    assert reason in str(supports(get_scheme(name)))
    with pytest.raises(UsageError, match=name):
        quantization_config(get_scheme(name), [])


def test_kv_cache_is_fp8_with_a_static_scale_per_tensor_or_refused() -> None:
    static = QuantSpec(8, "float", "tensor", exponent_bits=4)
    allowed = replace(get_scheme("FP8"), kv_keys=static, kv_values=static)
    assert quantization_config(allowed, [])["kv_cache_scheme"]["num_bits"] == 8
    for preset, reason in (("KV-INT8", "not in INT8"), ("KV-INT4", "not in INT4"), ("KV-FP8", "dynamic scales")):
        cache = get_scheme(preset)
        assert reason in str(supports(replace(get_scheme("W4A16"), kv_keys=cache.kv_keys, kv_values=cache.kv_values)))


@pytest.mark.parametrize("name", WRITABLE)
def test_round_trip_and_the_library_decompresses_to_the_same_weights(name: str, tmp_path: Path) -> None:
    scheme = get_scheme(name)
    assert scheme.weights is not None
    static = {"input_scale": torch.tensor([0.02])} if scheme.input_activations and not scheme.input_activations.dynamic else {}
    linears = {f"model.layers.{i}.mlp.up_proj": replace(rtn(weight(256, 256, i), scheme.weights), **static) for i in range(2)}
    reader = CompressedTensorsReader(write(tmp_path / "out", scheme, linears))
    assert reader.scheme.weights == scheme.weights and reader.scheme.input_activations == scheme.input_activations
    assert reader.scheme.name == name and reader.ignore == ("lm_head",) and set(reader.linears) == set(linears)
    layout = LayoutConfig.model_validate(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    for prefix, q in linears.items():
        assert_same(reader.read(prefix), q)
        parts = {n.removeprefix(prefix + "."): reader.files.get(n) for n in reader.files.names() if n.startswith(prefix)}
        theirs = BaseCompressor.get_value_from_registry(layout.format).decompress(parts, layout.config_groups["group_0"])["weight"]
        if name == "NVFP4":  # the library takes the product in bfloat16, with the scales rounded first
            torch.testing.assert_close(theirs.float(), dequantize(q), rtol=2**-6, atol=1e-6)
        else:
            assert torch.equal(theirs.to(torch.bfloat16), dequantize(q, torch.bfloat16))


@settings(max_examples=40)
@given(
    num_bits=st.integers(2, 8),
    symmetric=st.booleans(),
    rows=st.integers(1, 70),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([None, 4, 20, 32]),
    seed=st.integers(0, 2**31),
)
def test_integers_of_any_width_survive_packing(
    tmp_path_factory: pytest.TempPathFactory, num_bits: int, symmetric: bool, rows: int, groups: int, group_size: int | None, seed: int
) -> None:
    strategy = "channel" if group_size is None else "group"
    spec = QuantSpec(num_bits, strategy=strategy, group_size=group_size, symmetric=symmetric)  # type: ignore[arg-type]
    columns, generator = groups * (group_size or 7), torch.Generator().manual_seed(seed)
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1)
    shape = (rows, 1 if group_size is None else groups)
    q = QuantizedTensor(
        values=torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8),
        scale=torch.rand(shape, generator=generator).to(torch.bfloat16),
        spec=spec,
        zero_point=None if symmetric else torch.randint(low, high, shape, generator=generator, dtype=torch.int8),
    )
    directory = write(tmp_path_factory.mktemp("packed") / "out", Scheme("any", weights=spec), {"a.b": q})
    assert_same(CompressedTensorsReader(directory).read("a.b"), q)


@pytest.mark.parametrize("name", sorted(INVENTORIES))
def test_tensors_and_configuration_are_those_of_llm_compressor(name: str) -> None:
    scheme, theirs = get_scheme(name), INVENTORIES[name]
    assert scheme.weights is not None
    if name == "FP8-BLOCK":  # llm-compressor stores BF16 scales and quantizes activations in groups of 128; both are allowed
        scheme = replace(scheme, weights=replace(scheme.weights, scale_dtype="bfloat16"))
    ours: dict[str, dict[str, object]] = {}
    for prefix, shape in {"model.layers.0.self_attn.k_proj": (128, 256), "model.layers.0.mlp.down_proj": (256, 768)}.items():
        assert scheme.weights is not None
        tensors = write_linear(prefix, rtn(weight(*shape), scheme.weights), scheme)
        ours |= {n: {"dtype": SAFETENSORS_NAMES[t.dtype], "shape": list(t.shape)} for n, t in tensors.items()}
    assert ours == theirs["tensors"]
    config = quantization_config(scheme, ["lm_head"])
    assert set(config) == set(theirs["quantization_config"]) | {"moe_sparsity_config"}  # a field that newer versions added
    same = ("format", "ignore", "quant_method", "quantization_status", "kv_cache_scheme")
    assert {key: config[key] for key in same} == {key: theirs["quantization_config"][key] for key in same}
    ours_group, their_group = config["config_groups"]["group_0"], theirs["quantization_config"]["config_groups"]["group_0"]
    words = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "scale_dtype", "block_structure")
    targets = ("weights",) if name == "FP8-BLOCK" else ("weights", "input_activations")
    for target in targets:
        left, right = ours_group[target], their_group[target]
        assert (left is None) == (right is None)
        if left is not None:
            assert {word: left.get(word) for word in words} == {word: right.get(word) for word in words}


def test_int8_weights_are_packed_alone_and_plain_beside_int8_activations() -> None:
    assert layout_format(get_scheme("W8A16")) == "pack-quantized"
    assert layout_format(get_scheme("W8A8")) == "int-quantized"
    assert layout_format(get_scheme("FP8")) == "float-quantized"


def test_a_group_index_and_another_format_are_refused() -> None:
    scheme = get_scheme("W4A16-G32")
    assert scheme.weights is not None
    q = rtn(weight(32, 64), scheme.weights)
    with pytest.raises(FormatError, match="group index"):
        write_linear("a", replace(q, g_idx=torch.arange(64, dtype=torch.int32) // 32), scheme)
    with pytest.raises(FormatError, match="W8A16"):
        write_linear("a", q, get_scheme("W8A16"))


@pytest.mark.parametrize(
    ("part", "damaged", "says"),
    [
        ("weight_shape", torch.tensor([32, 2**40]), "weight_packed"),
        ("weight_shape", torch.tensor([-32, 64]), "weight_packed"),
        ("weight_packed", torch.zeros(32, 8, dtype=torch.float32), "float32"),
        ("weight_scale", torch.full((32, 2), float("nan"), dtype=torch.bfloat16), "NaN"),
        ("weight_scale", torch.ones(32, 3, dtype=torch.bfloat16), r"\[32, 2\]"),
        ("weight_zero_point", None, "weight_zero_point"),
    ],
)
def test_damaged_tensors_are_named(part: str, damaged: torch.Tensor | None, says: str, tmp_path: Path) -> None:
    scheme = Scheme("any", weights=QuantSpec(4, strategy="group", group_size=32, symmetric=False))
    assert scheme.weights is not None
    tensors = write_linear("a", rtn(weight(32, 64), scheme.weights), scheme)
    del tensors[f"a.{part}"]
    write_tensors(tmp_path / "model.safetensors", tensors | ({f"a.{part}": damaged} if damaged is not None else {}))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization_config(scheme, [])}))
    with pytest.raises(CheckpointError, match=says):
        CompressedTensorsReader(tmp_path).read("a")


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (None, ModelNotFoundError),
        ("[", CheckpointError),
        ([], CheckpointError),
        ({}, CheckpointError),
        ({"quantization_config": 3}, CheckpointError),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}}, UnsupportedModelError),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": 3}}}}, CheckpointError),
    ],
)
def test_a_configuration_that_is_none_is_refused(config: Any, error: type[FewbitError], tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"a.weight": torch.ones(2)})
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(error):
        CompressedTensorsReader(tmp_path)


def test_llm_int8_is_w8a16_for_others_and_keeps_its_threshold_for_us(tmp_path: Path) -> None:
    scheme = get_scheme("LLM-INT8")
    assert scheme.weights is not None and scheme.input_activations is not None
    config = quantization_config(scheme, [])
    assert config["format"] == layout_format(get_scheme("W8A16")) and config["config_groups"]["group_0"]["input_activations"] is None
    q = rtn(weight(64, 128), scheme.weights)
    out = write(tmp_path / "out", scheme, {"up_proj": q})
    assert_same(CompressedTensorsReader(out).read("up_proj"), q)
    assert CompressedTensorsReader(out).scheme == scheme
    other = replace(scheme, name="", input_activations=replace(scheme.input_activations, outlier_threshold=4.5))
    threshold = CompressedTensorsReader(write(tmp_path / "other", other, {"up_proj": q})).scheme.input_activations
    assert threshold is not None and threshold.outlier_threshold == 4.5
    path = out / "config.json"
    path.write_text(path.read_text().replace('"outlier_threshold": 6.0', '"outlier_threshold": "many"'))
    with pytest.raises(CheckpointError, match="fewbit's own"):
        _ = CompressedTensorsReader(out).scheme
