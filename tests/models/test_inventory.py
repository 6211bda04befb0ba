"""Inventories are exact to the tensor: against published numbers, and against the model that transformers builds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from fewbit.errors import CheckpointError, FewbitError, ModelNotFoundError, UnsupportedModelError, UsageError
from fewbit.formats.spec import get_scheme
from fewbit.models.architectures import architecture_names, inventory_of_fields
from fewbit.models.expressions import evaluate
from fewbit.models.inventory_sources import parse_count, read_inventory
from fewbit.models.structure import build_empty_model

CONFIGS = Path(__file__).with_name("configs")

# Hugging Face's counts of the published weights; DeepSeek-V3's main model as in its README, its next-token block apart.
PUBLISHED = {
    "llama-3-70b": (70_553_706_496, 0),
    "qwen2.5-7b": (7_615_616_512, 0),
    "mixtral-8x7b": (46_702_792_704, 0),
    "deepseek-v3": (671_026_419_200, 13_463_426_304),
    "gemma-3-27b": (27_432_406_640, 0),
}
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "head_dim": 16},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False},
    },
    "deepseek_v3": {"num_hidden_layers": 5, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "deepseek_v2": {"n_routed_experts": 8, "q_lora_rank": None, "kv_lora_rank": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    "qwen2_moe": {"num_experts": 6, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2},
}
_SIZES = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


@pytest.mark.parametrize("name", architecture_names())
def test_every_row_of_the_table_is_what_transformers_builds(name: str) -> None:
    fields = {"model_type": name, **({} if name == "gemma3" else _SIZES), **SMALL.get(name, {})}
    config = CONFIG_MAPPING[name].from_dict(dict(fields))
    model = build_empty_model(config)
    expected: Counter[tuple[int, ...]] = Counter()
    for tensor, parameter in model.named_parameters():
        if tensor not in model.all_tied_weights_keys:
            stacked = parameter.ndim == 3 and ".experts." in tensor  # counted as matrices [out, in]
            expected[(parameter.shape[2], parameter.shape[1]) if stacked else tuple(parameter.shape)] += (
                parameter.shape[0] if stacked else 1
            )
    # A bias that only shifts the router's choice is a buffer in transformers and a tensor in the checkpoint.
    expected.update(tuple(buffer.shape) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    inventory = inventory_of_fields(fields)
    assert inventory is not None
    found: Counter[tuple[int, ...]] = Counter()
    for one in inventory.tensors:
        found[one.shape] += one.count
    assert found == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_configurations_give_published_counts(name: str) -> None:
    started = time.perf_counter()
    inventory = read_inventory(CONFIGS / f"{name}.json")
    assert time.perf_counter() - started < 2
    assert (inventory.parameters, inventory.extra_parameters) == PUBLISHED[name]
    assert read_inventory(name).parameters == inventory.parameters  # the published shapes say the same


def test_an_inventory_needs_no_torch() -> None:
    code = (
        "import sys; from fewbit.models.inventory_sources import read_inventory as r; r('deepseek-v3'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bytes_of_real_models() -> None:
    llama, qwen = read_inventory("llama-3-70b"), read_inventory("qwen2.5-7b")
    assert round(llama.bytes_in(None) / 1e9, 1) == 141.1
    assert round(llama.bytes_in(get_scheme("W4A16").weights) / 1e9, 1) == 39.5
    assert qwen.kv_bytes_per_token() == 56 * 1024
    assert qwen.kv_bytes(1000, get_scheme("KV-INT8")) == 1000 * 28 * 4 * 2 * (128 + 2)


def test_windows_stop_growing_and_a_latent_cache_is_one_vector() -> None:
    gemma, deepseek = read_inventory("gemma-3-27b"), read_inventory("deepseek-v3")
    per_layer = 2 * 16 * 128 * 2
    assert gemma.kv_bytes(32_768) == per_layer * (10 * 32_768 + 52 * 1024)
    assert gemma.kv_bytes(512) == per_layer * 62 * 512
    assert deepseek.kv_bytes_per_token() == 61 * (512 + 64) * 2


def test_active_parameters_count_experts_by_their_share() -> None:
    mixtral = read_inventory("mixtral-8x7b")
    assert round(mixtral.active_parameters / 1e9, 1) == 12.7
    assert round(read_inventory("deepseek-v3").active_parameters / 1e9, 1) == 36.6


@pytest.mark.parametrize(("text", "value"), [("7e9", 7e9), ("70B", 7e10), ("0.5b", 5e8), ("7000000000", 7e9), ("qwen", None), ("7x", None)])
def test_counts(text: str, value: float | None) -> None:
    assert parse_count(text) == value


def test_a_bare_count_gives_bytes_and_says_what_it_does_not_know() -> None:
    bare = read_inventory("70e9")
    assert [bare.bytes_in(None, bits / 8) / 1e9 for bits in (32, 16, 8, 4, 2)] == [280, 140, 70, 35, 17.5]
    assert not bare.kv and any("KV cache is unknown" in note for note in bare.notes)
    assert read_inventory("7e9", layers=28, kv_heads=4, head_dim=128).kv_bytes_per_token() == 57_344


def test_the_files_are_compared_with_the_configuration(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    fields = {"model_type": "llama", **_SIZES}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    inventory = read_inventory(tmp_path)
    tensors = {
        one.name.replace("*", str(i)): torch.zeros(one.shape, dtype=torch.bfloat16)
        for one in inventory.tensors
        for i in range(3 if "*" in one.name else 1)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    read = read_inventory(tmp_path)
    assert read.stored_dtypes == {"BF16": inventory.parameters} and read.stored_bytes == 2 * inventory.parameters and not read.notes
    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, tmp_path / "model.safetensors")
    assert "the weight files hold" in read_inventory(tmp_path).notes[0]
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_inventory(tmp_path)


def test_an_architecture_outside_the_table_comes_from_transformers() -> None:
    inventory = read_inventory_of({"model_type": "olmo2", **_SIZES})
    model = build_empty_model(CONFIG_MAPPING["olmo2"].from_dict({"model_type": "olmo2", **_SIZES}))
    assert inventory.parameters == sum(p.numel() for p in model.parameters())
    assert inventory.kv_bytes_per_token() == 2 * 3 * 2 * 16 * 2
    assert {c.role for c in inventory.tensors} == {"embedding", "attention", "mlp", "norm", "head"}


def read_inventory_of(fields: dict[str, Any]) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.json"
        file.write_text(json.dumps(fields))
        return read_inventory(file)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"model_type": "no_such_model"}, UnsupportedModelError, "no_such_model"),
        ({}, UnsupportedModelError, "model_type"),
        ({"model_type": "llama", "num_hidden_layers": -3}, UnsupportedModelError, "num_hidden_layers"),
        ({"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 5}, UnsupportedModelError, "5 heads"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, UnsupportedModelError, "9 of 8"),
        ({"model_type": "llama", "hidden_size": 1.5}, UnsupportedModelError, "hidden_size"),
    ],
)
def test_bad_configurations(fields: dict[str, Any], error: type[FewbitError], says: str) -> None:
    with pytest.raises(error, match=says):
        read_inventory_of(fields)


def test_bad_names() -> None:
    with pytest.raises(ModelNotFoundError, match=r"qwen2\.5-7b"):
        read_inventory("qwen2.5-7")
    with pytest.raises(UsageError, match="7e30"):
        read_inventory("7e30")
    with pytest.raises(UsageError, match="go together"):
        read_inventory("7e9", layers=3)
    with pytest.raises(UsageError, match="follow from"):
        read_inventory("qwen2.5-7b", layers=3)


def test_formulas_do_arithmetic_and_nothing_else() -> None:
    assert evaluate("2 * a.b + c % 3", {"a": {"b": 4}, "c": 5}) == 10
    assert evaluate("i >= 2 and i not in skipped", {"i": 3, "skipped": [4]}) is True
    for text in ("__import__('os')", "[1][0]", "a if 1 else b", "lambda: 1"):
        with pytest.raises(UnsupportedModelError):
            evaluate(text, {"a": 1, "b": 2})
