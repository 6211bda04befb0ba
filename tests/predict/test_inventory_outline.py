"""An outline from an inventory is the one from transformers' model: the same matrices, bytes and cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbit.formats.spec import get_scheme
from fewbit.models.inventory_sources import read_inventory
from fewbit.models.shapes import shapes_config
from fewbit.predict.hardware import get_hardware
from fewbit.predict.inventory_outline import outline_of_inventory
from fewbit.predict.outline import outline_of_config
from fewbit.predict.prediction import StepPoint
from fewbit.predict.step import choose_path, step_work

CONFIGS = Path(__file__).parents[1] / "models" / "configs"


@pytest.mark.parametrize("name", ["qwen2.5-0.5b"])
@pytest.mark.parametrize(
    "point",
    [StepPoint("decode", "W4A16", batch=4, context=512), StepPoint("prefill", "FP8", batch=2, context=256), StepPoint(kv="KV-INT8")],
)
def test_same_work_as_transformers_model(name: str, point: StepPoint) -> None:
    path = choose_path(get_scheme(point.scheme), get_hardware("h100-sxm"))
    ours = step_work(outline_of_inventory(read_inventory(name)), point, path)
    theirs = step_work(outline_of_config(shapes_config(name)), point, path)
    for field in ("weight_bytes", "activation_bytes", "cache_bytes", "copy_bytes", "operations", "unpacked", "operators"):
        assert sum(getattr(w, field) for w in ours) == pytest.approx(sum(getattr(w, field) for w in theirs)), field


@pytest.mark.parametrize(("name", "context"), [("gemma-3-27b", 16384), ("deepseek-v3", 4096), ("mixtral-8x7b", 4096)])
def test_bytes_of_the_cache_are_the_inventorys(name: str, context: int) -> None:
    inventory = read_inventory(CONFIGS / f"{name}.json")
    outline = outline_of_inventory(inventory, context)
    assert 2 * outline.kv_values_per_token * context == pytest.approx(inventory.kv_bytes(context), rel=0.04)


def test_experts_of_a_token_are_read_once() -> None:
    inventory = read_inventory("mixtral-8x7b")
    outline = outline_of_inventory(inventory)
    one = sum(group.weights * group.expected_copies_read(1) for group in outline.groups)
    many = sum(group.weights * group.expected_copies_read(1000) for group in outline.groups)
    matrices = sum(c.parameters for c in inventory.tensors if c.linear)
    assert one == pytest.approx(sum(c.parameters * c.share for c in inventory.tensors if c.linear))
    assert many == pytest.approx(matrices, rel=1e-6)
    assert {group.per_token for group in outline.groups} == {1, 2}


def test_a_bare_count_has_the_cache_that_was_given() -> None:
    outline = outline_of_inventory(read_inventory("7e9", layers=28, kv_heads=4, head_dim=128))
    assert outline.bare and outline.kv_values_per_token == 2 * 28 * 4 * 128
