"""The application: options that stand before every command, and how a run ends.

Errors that fewbit raises on purpose end in one line on stderr and exit code 2, as do those of the operating system (a full disk, a
directory that cannot be written); `--debug` shows the traceback. Ctrl-C is one line and exit code 130.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from fewbit.cli import check, choose, make, measure, run, show
from fewbit.errors import FewbitError

__all__ = ["app", "main"]

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

app = typer.Typer(
    name="fewbit",
    help="Which quantization to deploy: measures memory, latency and quality of the same weights together, makes the checkpoint, says why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _group in (measure, make, check, choose, run, show):  # the order of the help
    app.add_typer(_group.app)


def _version(value: bool) -> None:
    if value:
        from fewbit.workflows.environment import environment, environment_lines

        typer.echo("\n".join(environment_lines(environment())))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and the environment, for bug reports, and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; torch's own choice when left out.", min=1)] = None,
) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors raised on purpose become one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    # `--debug` may stand anywhere, also behind the command's own options.
    arguments = ["--debug"] * debug + [a for a in arguments if a != "--debug"]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings are for programmers; an error of ours is one line
    try:
        code = app(args=arguments or ["--help"], prog_name="fewbit", standalone_mode=False)
    except typer.TyperException as error:  # a command, option or value that does not parse
        _fail(f"{error.format_message().rstrip('.')}; see fewbit {_named_command(arguments)}--help", 2, debug)
    except FewbitError as error:
        _fail(str(error), 2, debug)
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 2, debug)
    if code == _INTERRUPTED:  # what typer makes of Ctrl-C, without a word
        sys.stderr.write("fewbit: error: interrupted\n")
    raise SystemExit(code)


def _named_command(arguments: list[str]) -> str:
    """The command that was meant, with a space behind it; empty when there is none of that name."""
    group: Any = typer.main.get_command(app)
    command = next((a for a in arguments if not a.startswith("-")), "")
    return f"{command} " if command in group.commands else ""


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        raise
    sys.stderr.write(f"fewbit: error: {' '.join(message.split())}\n")
    raise SystemExit(code) from None
