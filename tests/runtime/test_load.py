"""Loading: equal to transformers where nothing is quantized, and honest where something is wrong."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from fewbit.checkpoints.sources import DirectorySource, RandomSource
from fewbit.errors import CheckpointError, FormatError, UnsupportedModelError, UsageError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import get_scheme
from fewbit.methods.rtn import rtn
from fewbit.models.experts import unfuse_experts
from fewbit.models.shapes import shapes_config
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.linear import QuantLinear
from fewbit.runtime.load import LoadedModel, load_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gpt_neox", "opt", "phi3"]
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]
IDS = torch.arange(3, 43).view(2, 20)


def load(directory: Path, scheme: str = "BF16", dtype: torch.dtype = torch.bfloat16, **config: object) -> LoadedModel:
    return load_model(DirectorySource(directory), QuantizationConfig(get_scheme(scheme), **config), dtype=dtype)  # type: ignore[arg-type]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS, use_cache=False).logits
    return result


def transformers_logits(directory: Path, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    # Experts one after the other, as fewbit computes them; transformers' default adds them up in another order.
    return logits(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval())


def edit_weights(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXTURES, "gpt2"])
def test_high_precision_equals_transformers(name: str, zoo_dir: Callable[[str], Path]) -> None:
    loaded = load(zoo_dir(name))
    assert torch.equal(logits(loaded.model), transformers_logits(zoo_dir(name)))
    assert not any(p.is_meta or p.requires_grad for p in loaded.model.parameters())
    assert loaded.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(zoo_dir(name)).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype: torch.dtype, zoo_dir: Callable[[str], Path]) -> None:
    loaded = load(zoo_dir("qwen2"), dtype=dtype)
    assert torch.equal(logits(loaded.model), transformers_logits(zoo_dir("qwen2"), dtype))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXTURES])
def test_quantized_equals_a_model_with_rounded_weights(name: str, zoo_dir: Callable[[str], Path]) -> None:
    """The loader's model computes what transformers' model computes with W replaced by dequantize(rtn(W))."""
    scheme = get_scheme("W4A16-G32")
    assert scheme.weights is not None
    loaded = load(zoo_dir(name), scheme.name, kernel="unfused")
    expected = AutoModelForCausalLM.from_pretrained(zoo_dir(name), dtype=torch.bfloat16).eval()
    unfuse_experts(expected)
    for path, module in loaded.model.named_modules():
        if isinstance(module, QuantLinear):
            linear = expected.get_submodule(path)
            linear.weight.data = dequantize(rtn(linear.weight.data, scheme.weights), torch.bfloat16)
    torch.testing.assert_close(logits(loaded.model), logits(expected), rtol=0.05, atol=0.05)
    assert not torch.equal(logits(loaded.model), transformers_logits(zoo_dir(name)))


def test_memory_numbers(zoo_dir: Callable[[str], Path]) -> None:
    loaded = load(zoo_dir("qwen2"), "W8A16", kernel="unfused")
    per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    outputs = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert loaded.quantizable_parameters == 2 * per_layer
    assert loaded.quantized_linear_bf16_bytes == 4 * per_layer
    assert loaded.quantized_linear_bytes == 2 * per_layer + 2 * outputs
    assert loaded.effective_bits_per_weight == pytest.approx(8 + 16 * outputs / (2 * per_layer))
    others = loaded.parameters - 2 * per_layer
    assert loaded.effective_bits_per_parameter == pytest.approx((8 * loaded.quantized_linear_bytes + 16 * others) / loaded.parameters)
    assert loaded.resident_weight_bytes == pytest.approx(loaded.quantized_linear_bytes + 2 * others, abs=256)
    assert sum(use.linears for use in loaded.kernel_uses) == 14
    baseline = load(zoo_dir("qwen2"))
    assert baseline.effective_bits_per_weight is None
    assert baseline.effective_bits_per_parameter == 16
    assert baseline.resident_weight_bytes == pytest.approx(2 * baseline.parameters, abs=256)


def test_tied_weights_stay_tied(tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir, "W4A16-G32").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_can_be_quantized(tiny_llama_dir: Path) -> None:
    loaded = load(tiny_llama_dir, "W8A16", ignore=())
    assert isinstance(loaded.model.lm_head, QuantLinear)
    assert loaded.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert loaded.parameters == load(tiny_llama_dir).parameters
    assert not torch.equal(logits(loaded.model), logits(load(tiny_llama_dir, "W8A16").model))


def test_the_tied_name_in_the_file_may_be_either(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    renamed = edit_weights(tiny_llama_dir, tmp_path / "renamed", rename)
    assert torch.equal(logits(load(renamed).model), transformers_logits(tiny_llama_dir))


def test_a_head_that_differs_is_not_tied(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()

    untied = edit_weights(tiny_llama_dir, tmp_path / "untied", untie)
    loaded = load(untied)
    assert torch.equal(logits(loaded.model).flip(-1), transformers_logits(tiny_llama_dir))
    assert loaded.parameters == load(tiny_llama_dir).parameters + 512 * 128


def test_ignore_patterns_leave_linears_alone(zoo_dir: Callable[[str], Path]) -> None:
    model = load(zoo_dir("llama"), "W8A16", ignore=("lm_head", "model.layers.0.*", "*down_proj")).model
    swapped = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert swapped == {f"model.layers.1.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")} | {
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_shards_give_the_same_model(zoo_dir: Callable[[str], Path], write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = DirectorySource(zoo_dir("llama")).config
    sharded = write_tiny(config, tmp_path / "sharded", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(sharded).model), transformers_logits(zoo_dir("llama")))


def test_experts_are_quantized_and_routers_are_not(zoo_dir: Callable[[str], Path]) -> None:
    loaded = load(zoo_dir("qwen2_moe"), "W4A16-G32")
    assert loaded.load_note == ""
    swapped = {name for name, module in loaded.model.named_modules() if isinstance(module, QuantLinear)}
    assert len(swapped) == 2 * (4 + 3 * 4 + 3)  # attention, experts, the shared expert
    assert isinstance(loaded.model.model.layers[0].mlp.shared_expert_gate, torch.nn.Linear)
    assert "model.layers.1.mlp.experts.3.down_proj" in swapped


def test_merged_checkpoints_are_loaded_by_transformers_and_said_so(zoo_dir: Callable[[str], Path]) -> None:
    assert load(zoo_dir("llama")).load_note == ""
    assert load(zoo_dir("gpt_neox")).load_note == ""
    loaded = load(zoo_dir("merged"))
    assert "by transformers first" in loaded.load_note
    assert torch.equal(logits(loaded.model), transformers_logits(zoo_dir("merged")))


def test_one_linear_at_a_time_is_in_high_precision(zoo_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """When a linear is read, every linear read before it is packed already."""
    source = DirectorySource(zoo_dir("llama"))
    get = source.get
    handed_out: list[weakref.ref[torch.Tensor]] = []

    def recording(name: str) -> torch.Tensor:
        gc.collect()
        assert all(reference() is None for reference in handed_out)
        tensor = get(name)
        if name.endswith("proj.weight"):
            handed_out.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(source, "get", recording)
    gc.freeze()  # what was there before is not walked through again at every tensor: a tenth of a second each time
    try:
        load_model(source, QuantizationConfig(get_scheme("W8A16")))
    finally:
        gc.unfreeze()
    assert len(handed_out) == 14


def test_random_weights_in_real_shapes() -> None:
    config = shapes_config("qwen2.5-0.5b")
    config.vocab_size = 512
    source = RandomSource(config, seed=1, num_layers=2)
    loaded = load_model(source, QuantizationConfig(get_scheme("W4A16")))
    assert len(loaded.model.model.layers) == 2
    assert torch.isfinite(logits(loaded.model)).all()
    assert torch.equal(source.get("model.layers.0.mlp.up_proj.weight"), RandomSource(config, 1, 2).get("model.layers.0.mlp.up_proj.weight"))


def test_missing_tensor(zoo_dir: Callable[[str], Path], tmp_path: Path) -> None:
    broken = edit_weights(zoo_dir("llama"), tmp_path / "m", lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load(broken)


def test_unknown_tensor(zoo_dir: Callable[[str], Path], tmp_path: Path) -> None:
    broken = edit_weights(zoo_dir("llama"), tmp_path / "m", lambda tensors: tensors.update({"model.layers.9.extra": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.extra"):
        load(broken)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("scheme", ["BF16", "W4A16-G32"])
def test_nan_and_infinity(bad: float, name: str, scheme: str, zoo_dir: Callable[[str], Path], tmp_path: Path) -> None:
    broken = edit_weights(zoo_dir("llama"), tmp_path / "m", lambda tensors: tensors[name].view(-1)[5:6].fill_(bad))
    with pytest.raises(CheckpointError, match=rf"{name} has 1 NaN or infinite values .* flat index 5"):
        load(broken, scheme)


def test_wrong_shape(zoo_dir: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    broken = edit_weights(
        zoo_dir("llama"), tmp_path / "m", lambda tensors: tensors.update({name: torch.ones(31, 64, dtype=torch.bfloat16)})
    )
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[31, 64\], the configuration says \[32, 64\]"):
        load(broken)


def test_group_size_that_does_not_divide_names_the_layer(zoo_dir: Callable[[str], Path]) -> None:
    with pytest.raises(FormatError, match=r"model\.layers\.0\.\S+: group size 128 does not divide the 64"):
        load(zoo_dir("llama"), "W4A16")


def test_conv1d_models_are_refused_in_words(zoo_dir: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="Conv1D"):
        load(zoo_dir("gpt2"), "W8A16")


def test_a_configuration_that_contradicts_itself(zoo_dir: Callable[[str], Path], tmp_path: Path) -> None:
    target = tmp_path / "m"
    shutil.copytree(zoo_dir("llama"), target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "hidden_act": "no-such-activation"}))
    with pytest.raises(UnsupportedModelError, match="no-such-activation"):
        load(target)


def test_construction_leaves_torch_as_it_was() -> None:
    register = torch.nn.Module.register_parameter
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    load_model(RandomSource(config, 0), QuantizationConfig(get_scheme("BF16")))
    assert torch.nn.Module.register_parameter is register
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_an_already_quantized_checkpoint_is_not_rounded_twice(zoo_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that stores some linears in W8A16: as stored, dequantized, or refused in another format."""
    scheme = get_scheme("W8A16")
    assert scheme.weights is not None
    source = DirectorySource(zoo_dir("llama"))
    stored = {"model.layers.0.mlp.up_proj": rtn(source.get("model.layers.0.mlp.up_proj.weight"), scheme.weights)}
    monkeypatch.setattr(DirectorySource, "scheme", property(lambda self: scheme))
    monkeypatch.setattr(source, "quantized_linears", frozenset(stored))
    monkeypatch.setattr(source, "get_quantized", stored.get)
    as_stored = load_model(source, QuantizationConfig(scheme))
    assert [name for name, module in as_stored.model.named_modules() if isinstance(module, QuantLinear)] == list(stored)
    with pytest.raises(UsageError, match="rounded twice"):
        load_model(source, QuantizationConfig(get_scheme("NF4")))


def test_opaque_packed_weights_count_their_elements(zoo_dir: Callable[[str], Path]) -> None:
    loaded = load(zoo_dir("qwen2"), "W8A8")
    linears = [module for module in loaded.model.modules() if isinstance(module, QuantLinear)]
    channels = sum(layer.out_features for layer in linears)
    per_channel = loaded.quantized_linear_bytes - loaded.quantized_linear_bf16_bytes // 2
    assert 4 * channels <= per_channel <= 8 * channels  # a scale, and for oneDNN a zero point


def test_a_size_that_no_memory_holds_is_refused(zoo_dir: Callable[[str], Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(zoo_dir("qwen2"), tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 10**13}))
    with pytest.raises(UnsupportedModelError, match="cannot be built"):
        load(directory)


def test_integers_without_a_layout_are_refused(zoo_dir: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    directory = edit_weights(zoo_dir("llama"), tmp_path / "m", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    for scheme in ("BF16", "W8A16"):
        with pytest.raises(CheckpointError, match=rf"{name} holds torch.int8"):
            load(directory, scheme)


def test_transformers_draws_no_progress_bar(zoo_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    directory = edit_weights(zoo_dir("llama"), tmp_path / "m", lambda tensors: tensors.__delitem__(name))
    capsys.readouterr()
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        load(directory)
    assert capsys.readouterr().err == ""


def test_the_heaps_free_pages_go_back_while_and_after_weights_are_packed(monkeypatch):
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    source = RandomSource(config, seed=0)
    calls = []
    monkeypatch.setattr("fewbit.runtime.load.trim_heap", lambda: calls.append(1))
    load_model(source, QuantizationConfig(get_scheme("W4A16-G32")))
    assert not calls  # a small one leaves little
    monkeypatch.setattr("fewbit.runtime.load._SMALL", 1000)
    load_model(source, QuantizationConfig(get_scheme("W4A16-G32")))
    assert len(calls) == 1
    monkeypatch.setattr("fewbit.runtime.load._TRIM_BYTES", 64 * 128 * 2)
    load_model(source, QuantizationConfig(get_scheme("W4A16-G32")))
    assert len(calls) > 3
