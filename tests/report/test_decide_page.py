"""The page of a decision: self-contained, honest about its numbers, and its script decides as the package does."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from fewbit.decide.candidates import Situation, situation_of
from fewbit.decide.choose import decide_cell
from fewbit.decide.decision import Cell, DecideResults
from fewbit.decide.scene import scene_of
from fewbit.decide.workload import Workload, get_workload
from fewbit.errors import OutputError
from fewbit.models.inventory_sources import read_inventory
from fewbit.predict.hardware import Hardware, get_hardware, measured_hardware
from fewbit.report.decide_page import render_decide_page, write_decide
from fewbit.results import AttentionRate, EngineRates, KernelRate, MachineResult

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
MEASURED = "a measured machine"
CASES = (
    ("llama-3-8b", "h100-sxm"),
    (str(CONFIGS / "gemma-3-27b.json"), "rtx-4090"),
    ("mixtral-8x7b", "m2-ultra"),
    ("qwen2.5-1.5b", MEASURED),
)


def _measured() -> Hardware:
    """With rates of kernels at two widths of a matrix, as `fewbit bench --machine` has them, and of attention over two head dimensions."""
    tokens = [1, 8, 64]

    def kernel(scheme: str, bits: float, memory_ps: float, row_ps: float) -> list[KernelRate]:
        widths = ((1152, 1.1), (4608, 1.0))
        return [KernelRate(scheme, "exact", scheme, bits, k, tokens, [f * max(memory_ps, row_ps * m) for m in tokens]) for k, f in widths]

    rates = EngineRates(
        read_bandwidth_gb_s=20.0,
        threads=2,
        kernels=[*kernel("BF16", 16.0, 110.0, 20.0), *kernel("W8A16", 8.0, 55.0, 13.0), *kernel("W4A16", 4.125, 30.0, 15.0)],
        attention=[
            AttentionRate(phase, cache, dim, group, ns * dim * group**0.5)
            for phase, cache, ns in (("decode", "BF16", 0.6), ("decode", "KV-INT8", 0.9), ("prefill", "BF16", 0.4))
            for dim in (64, 128)
            for group in ((1, 8) if cache == "BF16" else (1,))
        ],
        operator_us=1.5,
        ns_per_activation=0.5,
    )
    return measured_hardware(MachineResult(20.0, "test", 60.0, "bfloat16", 1.0, rates), 24 << 30)


def _hardware(name: str, bandwidth: float | None = None) -> Hardware:
    if name != MEASURED:
        return get_hardware(name, bandwidth_gb_s=bandwidth)
    return replace(_measured(), bandwidth_gb_s=bandwidth or _measured().bandwidth_gb_s)


def _situation(model: str, hardware: str, workload: Workload, bandwidth: float | None = None) -> Situation:
    return situation_of(read_inventory(model), model, _hardware(hardware, bandwidth), workload)


@pytest.fixture(scope="module")
def decided() -> tuple[DecideResults, list[dict[str, Any]]]:
    workload = get_workload("chat")
    situations = [_situation(model, hardware, workload) for model, hardware in CASES]
    results = DecideResults(workload, [decide_cell(one) for one in situations], ["only a test"], "fewbit decide")
    return results, [scene_of(one) for one in situations]


@pytest.fixture(scope="module")
def page(decided: tuple[DecideResults, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decide(*decided, tmp_path_factory.mktemp("decide"))


def _embedded(text: str, identifier: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{identifier}">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_the_results_and_its_one_script_by_hash(page: Path, decided: tuple[DecideResults, list[dict[str, Any]]]) -> None:
    text = page.read_text(encoding="utf-8")
    assert TypeAdapter(DecideResults).validate_python(_embedded(text, "results")) == decided[0]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text
    assert not re.search(r"https?://(?!www\.w3\.org)", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    for cell in decided[0].cells:
        assert cell.label in text and all(one.name in text for one in cell.candidates)


def test_files_of_a_decision(page: Path) -> None:
    names = {path.name for path in page.parent.iterdir()}
    assert {"decide.html", "decide.json", "decide.csv", "memory-context-llama-3-8b-h100-sxm.svg"} <= names
    assert sum(name.endswith(".svg") for name in names) >= len(CASES)
    with pytest.raises(OutputError):
        write_decide(DecideResults(get_workload("chat"), []), [], page)


def test_hostile_names_stay_text(decided: tuple[DecideResults, list[dict[str, Any]]]) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    results, scenes = decided
    cells = [dataclasses.replace(results.cells[0], model=evil, reason=evil)]
    text = render_decide_page(dataclasses.replace(results, cells=cells, command=evil), [{**scenes[0], "model": evil}])
    assert "<img" not in text and _embedded(text, "scene")["scenes"][0]["model"] == evil


@pytest.mark.browser
class TestInChromium:
    """The page as a browser sees it."""

    def test_renders_without_a_request_or_a_complaint(self, browser: Any, page: Path) -> None:
        browser.open(page)
        assert browser.requested_urls() == [page.resolve().as_uri()]
        assert browser.complaints() == []

    @pytest.mark.parametrize("width", [390, 1280])
    def test_nothing_is_wider_than_the_screen(self, browser: Any, page: Path, width: int) -> None:
        browser.open(page, width=width)
        browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width

    def test_first_view_is_the_decision_of_the_workload(
        self, browser: Any, page: Path, decided: tuple[DecideResults, list[dict[str, Any]]]
    ) -> None:
        browser.open(page)
        for index, cell in enumerate(decided[0].cells):
            browser.evaluate(_move("cell", index))
            shown = browser.evaluate("document.getElementById('verdict').textContent")
            assert shown == (f"{cell.verdict}: {cell.choice}" if cell.choice else "not feasible")

    def test_controls_decide_as_the_package_does(self, browser: Any, page: Path) -> None:
        browser.open(page)
        for index, batch, prompt, answer, factor, goal in _positions():
            names = ("cell", "batch", "prompt", "answer", "bandwidth", "goal")
            moves = tuple(zip(names, (index, batch, prompt, answer, factor, goal), strict=True))
            for name, value in moves:
                browser.evaluate(_move(name, value))
            model, hardware = CASES[index]
            workload = Workload("moved", 2**batch, 2**prompt, 2**answer, goal)
            cell = decide_cell(_situation(model, hardware, workload, _hardware(hardware).bandwidth_gb_s * 2**factor))
            _compare(browser.evaluate(_READ), cell, str(moves))

    def test_the_choice_follows_the_controls(self, browser: Any, page: Path) -> None:
        browser.open(page)

        def verdict(*moves: tuple[str, object]) -> str:
            for name, value in moves:
                browser.evaluate(_move(name, value))
            return str(browser.evaluate("document.getElementById('verdict').textContent"))

        assert "W4A16" in verdict(("cell", 0), ("batch", 0), ("goal", "latency"))
        assert "FP8" in verdict(("batch", 6), ("goal", "throughput"))
        assert "KV-" not in verdict(("cache", 16))
        assert verdict(("cache", 0), ("batch", 9), ("prompt", 17)) == "not feasible"
        assert "beyond the model's" in browser.evaluate("document.getElementById('verdict-facts').textContent")
        browser.evaluate("document.getElementById('reset').click()")
        assert browser.evaluate("document.getElementById('value-batch').textContent") == "16"


_READ = """(() => { const { scene, at } = state(), a = decide(scene, at);
    return { verdict: a.verdict, choice: a.chosen && a.chosen.name, between: a.undecided.map(row => row.name),
             rows: Object.fromEntries(a.rows.map(row => [row.name, {
                 memory: row.memory.total, fits: row.memory.fits, acceptable: row.acceptable,
                 step: row.step && interval(row.step.ms, row.step.sd), first: row.first && row.first.ms, rate: row.tokensPerSecond,
                 ratio: row.path && a.rows[0].path ? ratioOf(a.cell, a.rows[0].objective, row.objective) : null }])) } })()"""


def _move(name: str, value: object) -> str:
    return (
        f"(() => {{ const c = document.getElementById('control-{name}'); c.value = '{value}';"
        " c.dispatchEvent(new Event('input', { bubbles: true })); return c.value })()"
    )


def _positions() -> Iterator[tuple[int, int, int, int, float, Any]]:
    yield 0, 0, 9, 8, 0.0, "latency"
    yield 0, 7, 10, 8, -1.5, "throughput"
    yield 1, 0, 12, 7, 0.0, "throughput"
    yield 2, 4, 10, 8, 1.0, "throughput"
    yield 2, 1, 7, 5, -2.0, "latency"
    yield 3, 0, 9, 7, 0.0, "latency"
    yield 3, 4, 6, 5, -1.0, "throughput"


def _compare(shown: dict[str, Any], cell: Cell, where: str) -> None:
    assert (shown["verdict"], shown["choice"]) == (cell.verdict, cell.choice), where
    assert shown["between"] == cell.between[1:], where
    for one in cell.candidates:
        row = shown["rows"][one.name]
        assert row["memory"] == pytest.approx(one.memory.total_bytes, rel=1e-9), (where, one.name)
        assert (row["fits"], row["acceptable"]) == (one.memory.fits, one.acceptable), (where, one.name)
        if one.time is None:
            continue
        for end in ("value", "low", "high"):
            assert row["step"][end] == pytest.approx(getattr(one.time.ms_per_token, end), rel=1e-6), (where, one.name, end)
            assert row["ratio"][end] == pytest.approx(getattr(one.time.speedup_over_bf16, end), rel=1e-6), (where, one.name, end)
        assert row["first"] == pytest.approx(one.time.ttft_ms.value, rel=1e-9), (where, one.name)
        assert row["rate"] == pytest.approx(one.time.tokens_per_s.value, rel=1e-9), (where, one.name)
