"""W8A8 on a model with activation outliers: what SmoothQuant is for.

    python benchmarks/outliers.py                       # the bundled model, outliers put in (walk/outliers.py)
    python benchmarks/outliers.py --out results/outliers --windows 32 --tokens 16384

The model with outliers computes what it did before; in BF16 and with quantized weights alone nothing happens to it. With INT8 activations
its perplexity rises far beyond the threshold of 5 %, and SmoothQuant brings it back. Everything goes through the public workflow: the
checkpoint that `fewbit quantize --method smoothquant` writes is read again and run on the kernel that serves W8A8.

The sweep quantizes the model once for each migration strength from 0 (columns of the weights equally large) to 1 (channels of the
activations equally large) and draws the increase of perplexity, beside the strength searched for each group of linears, into `sweep.svg`.
Outliers that are put in by hand have their exact inverse in the weights, so that flattening either side removes them: the curve is
flatter than a large model's, where outliers were learned.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from _bars import Bar, NotMeasuredError, add_arguments, run_bars

CHANNELS, FACTOR = (7, 100), 128.0
STRENGTHS = tuple(i / 10 for i in range(11))
THRESHOLD = 5.0


@dataclass(frozen=True)
class Point:
    """Increase of perplexity over BF16 in percent, with its 95 % interval; `strength` None: searched for each group."""

    strength: float | None
    percent: float
    low: float
    high: float


class Outliers:
    """The model with outliers and what W8A8 makes of it; every figure is measured once, when it is first asked for.

    Args:
        out: where the model, the checkpoints (removed after use), `sweep.json` and `sweep.svg` go.
        windows: calibration windows of 512 tokens.
        tokens: that perplexity is measured on.
    """

    def __init__(self, out: Path, windows: int, tokens: int) -> None:
        self.out, self.windows, self.tokens = out, windows, tokens
        self._model: Path | None = None
        self._known: dict[str, Point] = {}

    def model(self) -> Path:
        """The directory of the model with outliers."""
        from fewbit.models.reference import reference_model_dir
        from fewbit.walk.outliers import write_outlier_model

        if self._model is None:
            path = self.out / "model"
            shutil.rmtree(path, ignore_errors=True)
            self.out.mkdir(parents=True, exist_ok=True)
            write_outlier_model(reference_model_dir(), path, channels=CHANNELS, factor=FACTOR)
            self._model = path
        return self._model

    def _quality(self, model: Path, scheme: str | None, strength: float | None) -> Point:
        from fewbit.workflows.evaluate import evaluate

        quality = evaluate(model, scheme=scheme, against=self.model(), max_tokens=self.tokens, threshold=THRESHOLD).quality
        if quality is None:
            raise NotMeasuredError("the evaluation has no comparison with BF16")
        delta = quality.perplexity_delta_percent
        return Point(strength, delta.value, delta.low, delta.high)

    def naive(self) -> Point:
        """W8A8, rounded to nearest."""
        return self._measured("naive", lambda: self._quality(self.model(), "W8A8", None))

    def plain(self) -> Point:
        """W8A8 of the model without outliers, for comparison."""
        from fewbit.models.reference import reference_model_dir

        return self._measured("plain", lambda: self._quality(reference_model_dir(), "W8A8", None))

    def weights_alone(self) -> Point:
        """INT8 weights, activations in BF16."""
        return self._measured("weights", lambda: self._quality(self.model(), "W8A16", None))

    def smoothed(self, strength: float | None = None) -> Point:
        """SmoothQuant with one strength for the whole model, or with the searched ones."""
        return self._measured(f"smoothquant-{strength}", lambda: self._quality(self._checkpoint(strength), None, strength))

    def _checkpoint(self, strength: float | None) -> Path:
        from fewbit.walk.settings import CalibrationChoice, GateChoice, WalkSettings
        from fewbit.workflows.quantize import quantize_model

        settings = WalkSettings(
            method="smoothquant",
            migration_strength=strength,
            calibration=CalibrationChoice(samples=self.windows),
            gate=GateChoice(enabled=False),
        )
        path = self.out / "smoothquant"
        quantize_model(self.model(), scheme="W8A8", out=path, settings=settings, overwrite=True)
        return path

    def _measured(self, name: str, measure: object) -> Point:
        from fewbit.errors import FewbitError

        if name not in self._known:
            try:
                self._known[name] = measure()  # type: ignore[operator]
            except FewbitError as error:
                raise NotMeasuredError(str(error)) from error
        return self._known[name]

    def sweep(self) -> list[Point]:
        """One point for each strength; written to `sweep.json` and drawn to `sweep.svg`."""
        points = [self.smoothed(strength) for strength in STRENGTHS]
        document = {
            "channels": CHANNELS,
            "factor": FACTOR,
            "calibration_windows": self.windows,
            "tokens": self.tokens,
            "naive": asdict(self.naive()),
            "weights_alone": asdict(self.weights_alone()),
            "searched": asdict(self.smoothed()),
            "points": [asdict(point) for point in points],
        }
        (self.out / "sweep.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (self.out / "sweep.svg").write_text(draw(points, self.naive(), self.smoothed()), encoding="utf-8")
        shutil.rmtree(self.out / "smoothquant", ignore_errors=True)
        return points


def draw(points: list[Point], naive: Point, searched: Point) -> str:
    """The sweep as an SVG document: increase of perplexity over migration strength, on a scale that is linear up to 1 % and logarithmic
    above."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from fewbit.report.svg_style import BAD, FUSED, MUTED, UNFUSED, drawing, finish_svg

    with drawing():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        strengths = [point.strength for point in points if point.strength is not None]
        axes.set_yscale("symlog", linthresh=1.0)
        axes.fill_between(strengths, [p.low for p in points], [p.high for p in points], color=UNFUSED, alpha=0.2, linewidth=0)
        axes.plot(strengths, [p.percent for p in points], color=UNFUSED, linewidth=1.4, marker="o", markersize=3.5)
        for label, point, colour, offset in (("naive W8A8", naive, BAD, 3), ("searched for each group", searched, FUSED, -12)):
            axes.axhline(point.percent, color=colour, linewidth=1.2)
            text = f"{label}: {point.percent:.2g} %"
            axes.annotate(text, (1.0, point.percent), (0, offset), textcoords="offset points", color=colour, ha="right", fontsize=8.5)
        axes.axhline(THRESHOLD, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate("threshold: 5 %", (0.0, THRESHOLD), (0, 3), textcoords="offset points", color=MUTED, fontsize=8.5)
        top = max(naive.percent, *(point.percent for point in points))
        axes.set_ylim(min(-0.5, *(point.percent for point in points)) - 0.1, top * 2)
        axes.yaxis.set_major_locator(FixedLocator([y for y in (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if y <= top * 2]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
        axes.xaxis.set_major_locator(FixedLocator(list(STRENGTHS)))
        axes.set_xlabel("migration strength")
        axes.set_ylabel("perplexity over BF16")
        axes.grid(axis="y")
        described = ", ".join(f"{point.strength:g}: {point.percent:.2f} %" for point in points)
        title = "SmoothQuant on a model with activation outliers"
        return finish_svg(figure, "outliers-sweep", title, f"Increase of perplexity by migration strength. {described}.")


def bars(outliers: Outliers) -> list[Bar]:
    def best_fixed() -> float:
        return min(point.percent for point in outliers.sweep())

    return [
        Bar("plain-w8a8-percent", lambda: outliers.plain().percent, "<=", 1.0, "perplexity over BF16, the model without outliers"),
        Bar("outliers-w8a16-percent", lambda: outliers.weights_alone().percent, "<=", 1.0, "weights alone do not suffer from outliers"),
        Bar("outliers-naive-w8a8-percent", lambda: outliers.naive().percent, ">", THRESHOLD, "naive W8A8 fails the threshold"),
        Bar("outliers-smoothquant-percent", lambda: outliers.smoothed().percent, "<=", 1.0, "searched migration strength"),
        Bar("outliers-sweep-best-percent", best_fixed, "<=", THRESHOLD, "the best single strength; the sweep is drawn to sweep.svg"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/outliers"), metavar="DIR", help="where everything goes")
    parser.add_argument("--windows", type=int, default=32, metavar="N", help="calibration windows of 512 tokens")
    parser.add_argument("--tokens", type=int, default=16_384, metavar="N", help="tokens that perplexity is measured on")
    add_arguments(parser)
    arguments = parser.parse_args()
    outliers = Outliers(arguments.out, arguments.windows, arguments.tokens)
    return run_bars(bars(outliers), list_only=arguments.list, json_file=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
