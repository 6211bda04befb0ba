from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import pytest

from fewbit.report.figures import FIGURES, render_figures
from fewbit.results import CompareResults, Interval

SVG = "{http://www.w3.org/2000/svg}"


def _texts(svg: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_well_formed_without_scripts_references_or_fixed_colours(any_results: CompareResults) -> None:
    figures = render_figures(any_results)
    assert [figure.name for figure in figures] == list(FIGURES)
    for figure in figures:
        root = ElementTree.fromstring(figure.svg)
        assert root.tag == f"{SVG}svg" and root.get("role") == "img"
        assert not list(root.iter(f"{SVG}script"))
        for node in root.iter():
            for name, value in node.attrib.items():
                assert not name.endswith("href") or value.startswith("#")
                assert not re.search(r"url\((?!#)", value)
                assert not re.search(r"(fill|stroke): #", value), "a colour that does not follow light and dark"
        assert "prefers-color-scheme:dark" in figure.svg
        assert not re.search(r"#0102|DOCTYPE|<metadata", figure.svg)


def test_deterministic(example: CompareResults) -> None:
    assert render_figures(example) == render_figures(example)


def test_identifiers_are_unique_across_the_figures(example: CompareResults) -> None:
    identifiers = [match for figure in render_figures(example) for match in re.findall(r'\bid="([^"]+)"', figure.svg)]
    assert len(identifiers) == len(set(identifiers))


def test_equal_bits_stand_side_by_side_with_the_kernel(example: CompareResults) -> None:
    texts = " ".join(_texts(render_figures(example)[0].svg))
    for expected in ("INT4 g128 (W4A16)", "INT4 g128, unfused", "NF4 g64, unfused", "2.79\u00d7", "0.19\u00d7", "torch-int4pack, fused"):
        assert expected in texts
    assert "INT8" not in texts


def test_speed_comes_from_the_model_without_shapes(example: CompareResults) -> None:
    figure = render_figures(dataclasses.replace(example, shapes=None))[0]
    assert "1.14\u00d7" in " ".join(_texts(figure.svg)) and example.model.source in figure.caption


def test_every_weight_variant_is_labelled_once(example: CompareResults) -> None:
    texts = _texts(render_figures(example)[1].svg)
    for row in example.variants:
        assert texts.count(row.variant.label) == (0 if row.variant.name.startswith("kv-") else 1)


def test_a_broken_variant_does_not_squash_the_others(example: CompareResults) -> None:
    row = example.variants[2]
    assert row.quality is not None
    quality = dataclasses.replace(row.quality, perplexity_delta_percent=Interval(90_000.0, 80_000.0, 99_000.0))
    results = dataclasses.replace(example, variants=[example.variants[0], example.variants[1], dataclasses.replace(row, quality=quality)])
    assert any("threshold" in text for text in _texts(render_figures(results)[2].svg))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_not_measured_is_said(minimal: CompareResults, index: int) -> None:
    assert any("not measured" in text for text in _texts(render_figures(minimal)[index].svg))
