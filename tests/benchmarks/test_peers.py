"""What the benchmarks against the peers compute by themselves: scores, ratios with intervals, and the reading of packed integers."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import quality_vs_peers as quality
import torch
from _bars import NotMeasuredError
from _scoring import Evaluator, Score, ratio_of_means

from fewbit.models.reference import reference_model_dir

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    sys.path.insert(0, str(PEERS))
    return import_module("_runner")


def _score(values: list[float]) -> Score:
    return Score(tuple(values), tuple(values), tuple(values))


def test_a_ratio_of_equal_sides_is_one_without_spread() -> None:
    side = [_score([1.0, 2.0, 3.0]), _score([2.0, 2.0, 4.0])]
    assert ratio_of_means(side, side) == pytest.approx((1, 1, 1))


def test_the_interval_is_paired() -> None:
    """Windows that are difficult for both sides cancel; the same values in another order do not."""
    theirs = [float(i) for i in range(1, 33)]
    ours = [0.9 * value + 0.01 * (i % 2) for i, value in enumerate(theirs)]
    ratio, low, high = ratio_of_means([_score(ours)], [_score(theirs)])
    _, _, unpaired = ratio_of_means([_score(ours[::-1])], [_score(theirs)])
    assert low < ratio < high < 0.95
    assert unpaired > 1


def test_the_interval_covers_the_true_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        difficulty = torch.rand(64, generator=generator) + 0.5
        ours, theirs = (c * difficulty * (1 + 0.2 * torch.randn(64, generator=generator)) for c in (0.9, 1.0))
        _, low, high = ratio_of_means([_score(ours.tolist())], [_score(theirs.tolist())])
        hits += low < 0.9 < high
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_a_stream_of_bits_is_unpacked(runner: ModuleType, num_bits: int) -> None:
    values = torch.randint(0, 2**num_bits, (96, 5), generator=torch.Generator().manual_seed(1))
    words = torch.zeros(96 * num_bits // 32, 5, dtype=torch.int64)
    for index in range(96):
        for bit in range(num_bits):
            at = index * num_bits + bit
            words[at // 32] |= ((values[index] >> bit) & 1) << (at % 32)
    packed = torch.where(words >= 2**31, words - 2**32, words).int()
    assert torch.equal(runner.unpack_stream(packed, num_bits, 96), values)


def test_integers_and_scales_multiply_exactly(runner: ModuleType) -> None:
    values = torch.tensor([[0, 15, 8, 7]])
    scale = torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16)
    assert runner.integer_export(values, scale, 8.0).tolist() == [[-4.0, 3.5, 0.0, -0.25]]
    assert runner.integer_export(values, scale, torch.tensor([[8, 7]])).tolist() == [[-4.0, 3.5, 0.25, 0.0]]
    assert runner.integer_export(values, scale, None, torch.tensor([1, 0, 1, 0])).tolist() == [[0.0, 7.5, 2.0, 3.5]]


def test_the_evaluator_sees_no_change_in_the_source_and_puts_it_back() -> None:
    evaluator = Evaluator(reference_model_dir(), max_tokens=1024)
    source = {name: tensor.clone() for name, tensor in evaluator.model.state_dict().items() if "proj" in name}
    same = evaluator.score(source)
    assert same.mean_kl == pytest.approx(0, abs=1e-9)
    assert same.perplexity == pytest.approx(evaluator.perplexity)
    worse = evaluator.score({name: tensor * 1.05 for name, tensor in source.items()})
    assert worse.mean_kl > 1e-4
    assert evaluator.score(source).kl == same.kl
    with pytest.raises(ValueError, match="not in the export"):
        evaluator.score(dict(list(source.items())[1:]))
    with pytest.raises(ValueError, match="not finite"):
        evaluator.score({**source, next(iter(source)): next(iter(source.values())) * float("nan")})


_SIDES = (*quality.PEERS, "fewbit")


def _figures(side: str, method: str, kl: float, bits: float = 4.125) -> quality.Figures:
    per_window = [kl * factor for factor in (0.9, 1.0, 1.1)]
    return quality.Figures("m", side, method, "w4g128", 0, "k", "e", per_window, per_window, per_window, bits, 1.0, 2.0, 3, 1, {}, [])


class _Bench(quality.Bench):
    """Figures made by hand in place of runs."""

    def __init__(self, kl: dict[tuple[str, str], float], **bits: float) -> None:
        super().__init__({"m": Path()}, (0,), [], 0)
        self._kl, self._bits = kl, bits

    def figures(self, run: quality.Run) -> quality.Figures:
        if (run.side, run.method) not in self._kl:
            raise NotMeasuredError(f"{run.side} does not install")
        return _figures(run.side, run.method, self._kl[run.side, run.method], self._bits.get(run.side, 4.125))


def _values(bench: _Bench) -> dict[str, float | str]:
    values: dict[str, float | str] = {}
    for bar in quality.bars(bench, ["w4g128"]):
        try:
            values[bar.name] = bar.value()
        except NotMeasuredError as error:
            values[bar.name] = str(error)
    return values


def _all_peers() -> dict[tuple[str, str], float]:
    peers = {contender: 0.010 + 0.001 * index for index, contender in enumerate(quality.CONTENDERS)}
    return {**peers, ("fewbit", "gptq"): 0.008, ("fewbit", "awq"): 0.012, ("fewbit", quality.BEST_METHOD): 0.007}


def test_bars_compare_with_the_named_peer_and_with_the_best() -> None:
    kl = _all_peers()
    values = _values(_Bench(kl))
    assert values["m-w4g128-gptq-ratio"] == pytest.approx(0.8)
    assert values["m-w4g128-awq-ratio"] == pytest.approx(0.012 / kl["llmcompressor", "awq"])
    kl["autoround", "autoround"] = 0.005
    assert _values(_Bench(kl))["m-w4g128-best-ratio"] == pytest.approx(1.4)


def test_a_missing_contender_fails_the_bar_it_might_have_decided() -> None:
    kl = _all_peers()
    del kl["hqq", "hqq"]
    values = _values(_Bench(kl))
    assert values["m-w4g128-best-ratio"] == "hqq does not install"
    assert values["m-w4g128-gptq-ratio"] == pytest.approx(0.8)


def test_more_bits_than_the_peer_are_not_compared() -> None:
    values = _values(_Bench(_all_peers(), fewbit=4.25))
    assert "4.250 bits" in str(values["m-w4g128-gptq-ratio"])


def test_runs_without_calibration_are_not_repeated_per_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[quality.Run] = []
    bench = quality.Bench({"m": Path()}, (0, 1, 2), [], 0)
    monkeypatch.setattr(bench, "_measure", lambda run: seen.append(run) or _figures(run.side, run.method, 1.0))
    for run in bench.runs(["w4g128", "w4g32"], _SIDES):
        bench.figures(run)
    assert len([run for run in seen if run.side == "hqq"]) == 1
    assert len([run for run in seen if run.side == "llmcompressor"]) == 2 * 2 * 3
    assert {run.spec for run in seen if run.side == "autoround"} == {"w4g128"}


def test_a_contender_far_behind_at_the_first_seed_runs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kl = {("gptqmodel", "gptq"): 1.1, ("autoround", "autoround"): 1.0}
    bench = quality.Bench({"m": Path()}, (0, 1, 2), [], 0)
    monkeypatch.setattr(bench, "_measure", lambda run: _figures(run.side, run.method, kl.get((run.side, run.method), 1.2)))
    seeds: dict[tuple[str, str], set[int]] = {}
    for run in bench.runs(["w4g128"], _SIDES):
        bench.figures(run)
        seeds.setdefault((run.side, run.method), set()).add(run.seed)
    assert seeds["gptqmodel", "gptq"] == seeds["autoround", "autoround"] == {0, 1, 2}  # within 15 % of the best
    assert seeds["gptqmodel", "gptaq"] == {0}
    assert seeds["llmcompressor", "gptq"] == {0, 1, 2}  # a bar of its own
