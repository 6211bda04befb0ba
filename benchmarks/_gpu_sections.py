"""Sections of `gpu.py` in processes of their own, so that one which crashes, hangs or runs out of memory takes nothing else with it.

The parent imports everything once and never touches the device; each section is a fork of it. A section that ends with an error of the
device is started again without the attempt that broke it; one that outlasts its limit is killed; what it had measured is in its journal.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _gpu_common import BROKEN_DEVICE, Settings

__all__ = ["merge", "run_section"]

_STARTS = 6  # of one section


def run_section(name: str, work: Callable[[Settings], None], settings: Settings, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Run a section to its end, or to the end of its time.

    Args:
        work: gets settings with a journal. seconds: after which it is killed.
        folder: where its journal goes, `NAME.jsonl`.

    Returns:
        The journal's lines; a failure of the section as a whole is among them.
    """
    journal = folder / f"{name}.jsonl"
    journal.touch()
    end, entries = time.monotonic() + seconds, []
    for _ in range(_STARTS):
        process = multiprocessing.get_context("fork").Process(target=_section, args=(work, settings, journal))
        process.start()
        process.join(max(end - time.monotonic(), 1.0))
        reason = None
        if process.is_alive():
            process.kill()
            process.join(10)
            reason = f"stopped after {seconds:.0f} s"
        elif process.exitcode:
            reason = f"its process ended with {process.exitcode}" + (", the device in error" if process.exitcode == BROKEN_DEVICE else "")
        entries = _read(journal)
        begun = [entry["begin"] for entry in entries if "begin" in entry]
        if reason is not None:
            last = f" in '{begun[-1]}'" if begun else ""
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"failed": f"section {name}{last}", "why": reason}) + "\n")
        crashed = reason is not None and not reason.startswith("stopped") and process.exitcode != 1
        if not crashed or end - time.monotonic() < 5.0:
            break
        done = {entry.get("done") or entry.get("failed") for entry in entries}
        settings = dataclasses.replace(settings, leave_out=frozenset(name for name in (*done, *begun[-1:]) if name))
    return _read(journal)


def _section(work: Callable[[Settings], None], settings: Settings, journal: Path) -> None:
    try:
        work(dataclasses.replace(settings, journal=journal))
    except Exception as error:
        traceback.print_exc()
        text = (str(error).strip().splitlines() or [""])[0][:300]
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"failed": "the section itself", "why": f"{type(error).__name__}: {text}"}) + "\n")
        sys.exit(1)


def _read(journal: Path) -> list[dict[str, Any]]:
    entries = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # a line cut off by a kill
    return entries


def merge(report: dict[str, Any], name: str, entries: list[dict[str, Any]]) -> None:
    """A section's journal into the report: rows by table, facts, failures and what was skipped."""
    for entry in entries:
        if "row" in entry:
            report.setdefault(entry["row"], []).append(entry["of"])
        elif "fact" in entry:
            report[entry["fact"]] = entry["is"]
        elif "failed" in entry:
            report["failures"][entry["failed"]] = entry["why"]
        elif "skipped" in entry:
            report["skipped"].setdefault(name, []).append(entry["skipped"])
