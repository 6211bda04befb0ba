"""`fewbit report DIR`: figures, CSV and page anew, from the results file alone."""

from __future__ import annotations

from pathlib import Path

from fewbit.report.figures import render_figures, write_figures
from fewbit.report.page import write_page
from fewbit.report.results_file import read_results, write_csv

__all__ = ["build_report"]


def build_report(directory: Path) -> Path:
    """Write results.csv, the three SVG figures and report.html beside the results.json of `directory`; returns the path of the page.

    Raises:
        UsageError: there is no results.json.
        CheckpointError: it is damaged.
        MeasurementError: a newer fewbit wrote it.
        OutputError: the directory cannot be written.
    """
    results = read_results(directory)
    figures = render_figures(results)
    write_csv(results, directory)
    write_figures(figures, directory)
    return write_page(results, directory, figures)
