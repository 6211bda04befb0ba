"""Published shapes give published numbers."""

from __future__ import annotations

import pytest

from fewbit.errors import UsageError
from fewbit.formats.spec import QuantSpec, get_scheme
from fewbit.models.accounting import kv_bytes_per_token, kv_scheme_bytes_per_token, parameter_count
from fewbit.models.inventory_sources import read_inventory
from fewbit.models.shapes import SHAPES, shapes_config

PUBLISHED_PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "phi-3-mini": 3_821_079_552,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,
    "gemma-3-27b": 27_432_406_640,
}
BUILT = [name for name in PUBLISHED_PARAMETERS if name != "deepseek-v3"]  # 44,544 linears of experts take transformers half a minute


def test_every_shape_has_a_published_number() -> None:
    assert set(PUBLISHED_PARAMETERS) == set(SHAPES)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_inventories(name: str) -> None:
    assert read_inventory(name).parameters == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", BUILT)
def test_parameters(name: str) -> None:
    assert parameter_count(shapes_config(name)) == PUBLISHED_PARAMETERS[name]


def test_kv_bytes_per_token() -> None:
    qwen = shapes_config("qwen2.5-7b")
    assert kv_bytes_per_token(qwen, None) == 57_344  # 56 KiB
    assert kv_bytes_per_token(shapes_config("llama-2-7b"), None) == 512 * 1024
    assert kv_bytes_per_token(qwen, None, dtype_bytes=4) == 2 * 57_344
    int8 = QuantSpec(num_bits=8, strategy="token", dynamic=True)
    assert kv_bytes_per_token(qwen, int8) == 57_344 * (128 + 2) / 256
    assert kv_scheme_bytes_per_token(qwen, get_scheme("KV-INT4")) == 57_344 * 4.75 / 16
    assert kv_scheme_bytes_per_token(qwen, get_scheme("W4A16")) == 57_344


def test_names_are_found_in_any_case_and_unknown_ones_are_named() -> None:
    assert shapes_config("Qwen2.5-7B").name_or_path == "qwen2.5-7b"
    with pytest.raises(UsageError, match="no-such-shape") as caught:
        shapes_config("no-such-shape")
    assert "llama-3-8b" in caught.value.remedy
