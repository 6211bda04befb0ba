"""What a command prints: tables or the result's JSON on stdout, a progress bar on stderr.

rich and pydantic are imported where they are used, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_json", "progress_bar", "show", "terminal"]

Result = TypeVar("Result")
_PIPE_COLUMNS = 140


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr as a function of (done, total, what); silent when stderr is no terminal or `quiet`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def terminal() -> Console:
    """A console on stdout: as wide as the terminal or COLUMNS; 140 columns in a pipe or a file, which have no width of their own."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_PIPE_COLUMNS)


def print_json(result: Any) -> None:
    """A result as JSON on stdout, in the order of its fields."""
    from pydantic import TypeAdapter

    sys.stdout.write(TypeAdapter(type(result)).dump_json(result, indent=2).decode() + "\n")


def show(result: Result, render: Callable[[Result, Console], object], *, json: bool) -> None:
    """Print `result`: as JSON, or by `render` on the terminal."""
    print_json(result) if json else render(result, terminal())
