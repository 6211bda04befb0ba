"""The command line: parsing of arguments and nothing else.

Each command calls one function of `fewbit.workflows` and prints what it returns, as tables or with `--json` as the result's own JSON.
One module per group of commands, as `fewbit --help` shows them: `measure`, `make`, `check`, `choose`, `run`, `show`. Beside them
`options` (what several commands take), `output` (tables, JSON, progress) and `root` (the application, and how errors end).
Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from fewbit.cli.root import app, main

__all__ = ["app", "main"]
