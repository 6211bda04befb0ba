import pytest

from fewbit.errors import UsageError
from fewbit.formats.spec import SCHEMES
from fewbit.workflows.sizes import parse_bytes
from fewbit.workflows.variants import DEFAULT_VARIANTS, parse_variants


def test_default_rows_start_with_the_baseline_and_have_unique_names() -> None:
    names = [variant.name for variant in parse_variants(None)]
    assert names[0] == "bf16"
    assert len(set(names)) == len(names) == 10


def test_fused_and_unfused_int4_hold_the_same_scheme() -> None:
    rows = {variant.name: variant for variant in DEFAULT_VARIANTS}
    assert rows["int4-w4a16"].scheme == rows["int4-w4a16-unfused"].scheme
    assert rows["int4-w4a16"].kernel is None
    assert rows["int4-w4a16-unfused"].kernel == "unfused"


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_each_scheme_is_a_variant(scheme: str) -> None:
    (baseline, *rest) = parse_variants(scheme)
    assert baseline.name == "bf16"
    assert [row.scheme.name for row in rest] == ([] if scheme == "BF16" else [scheme])


def test_baseline_is_added_once_and_duplicates_collapse() -> None:
    assert [v.name for v in parse_variants(" int8-w8a16 ,bf16,int8-w8a16")] == ["bf16", "int8-w8a16"]


@pytest.mark.parametrize("names", ["", " , ", "int5", "bf16,nope", "kv-int8-unfused"])
def test_unknown_or_empty_names_are_refused(names: str) -> None:
    with pytest.raises(UsageError, match=r"variant"):
        parse_variants(names)


def test_info_names_the_three_targets_apart() -> None:
    info = {v.name: v.info() for v in DEFAULT_VARIANTS}
    assert info["w8a8"].input_activations.startswith("INT8 per token")
    assert info["int4-w4a16"].input_activations == "BF16"
    assert info["kv-int4"].weights == "BF16"
    assert "newest 32 in BF16" in info["kv-int4"].kv_cache


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 << 30), ("500 MB", 500_000_000), ("1024", 1024), ("1.5kib", 1536)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "8 potatoes", "0", "9" * 400])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)
