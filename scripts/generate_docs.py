"""Write the pages of docs/ that would drift if they were written by hand: docs/cli.md and docs/reference.md.

    make docs            # writes them
    python scripts/generate_docs.py --check     # exit code 1 when a page is not current; the test suite runs it

cli.md comes from the commands themselves, reference.md from the registries: schemes, rows of the comparison, kernels, protocols, shapes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from fewbit.evaluate.protocols import Protocol

DOCS = Path(__file__).parents[1] / "docs"
PROVEN = DOCS / "runtimes.json"  # written by tests/runtimes
NOTICE = "<!-- Written by `make docs`; do not edit. -->"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table; pipes in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def cli_page() -> str:
    """docs/cli.md: every command with its help, example and options."""
    from fewbit.cli import app

    root: Any = typer.main.get_command(app)
    parts = [
        "# The command line",
        NOTICE,
        root.help,
        "Errors end in one line on stderr and exit code 2. These options stand before the command:",
        _parameters(root),
    ]
    for name in sorted(root.commands):
        command = root.commands[name]
        example = (command.epilog or "").replace("Example: ", "").replace("[bold]", "").replace("[/bold]", "")
        parts += [f"## fewbit {name}", command.help, f"```\n{example}\n```" if example else "", _parameters(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parameters(command: Any) -> str:
    rows = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            name = parameter.metavar or parameter.name.upper()
        else:
            name = ", ".join([*parameter.opts, *parameter.secondary_opts])
            if not parameter.is_flag:
                name += f" {parameter.metavar or parameter.name.rpartition('_')[2].upper()}"
        default = (
            "required"
            if parameter.required
            else ""
            if parameter.default is None or parameter.default is False
            else f"`{parameter.default}`"
        )
        rows.append((f"`{name}`", parameter.help or "", default))
    return table(("argument", "meaning", "default"), rows) if rows else ""


def reference_page() -> str:
    """docs/reference.md: every registered name."""
    from fewbit.checkpoints.served import SERVED
    from fewbit.evaluate.protocols import PROTOCOLS
    from fewbit.formats.grids import GRIDS
    from fewbit.formats.spec import SCHEMES
    from fewbit.kernels.dispatch import KERNELS
    from fewbit.models.shapes import SHAPES
    from fewbit.workflows.variants import DEFAULT_VARIANTS

    def described(value: object) -> str:
        return "BF16" if value is None else str(value)

    schemes = [
        (f"`{s.name}`", *(described(target) for target in (s.weights, s.input_activations, s.kv_keys, s.kv_values)))
        for s in (*SCHEMES.values(), *SERVED.values())
    ]
    variants = [(f"`{v.name}`", v.label, f"`{v.scheme.name}`", v.kernel or "the fastest") for v in DEFAULT_VARIANTS]
    kernels = [(f"`{k.name}`", k.description, "yes" if k.fused else "no") for k in KERNELS]
    protocols = [(f"`{name}`", _protocol(protocol)) for name, protocol in PROTOCOLS.items()]
    sections = [
        "# Registered names",
        NOTICE,
        "## Schemes",
        "What `--scheme` takes. Each is also a row of `fewbit compare`; with the suffix `-unfused` it dequantizes before the GEMM. "
        f"{' and '.join(f'`{name}`' for name in SERVED)}, with scales that calibration fixes, are for `fewbit quantize` alone.",
        table(("scheme", "weights", "input activations", "KV keys", "KV values"), schemes),
        "## Rows of the comparison",
        table(("row", "label", "scheme", "kernel"), variants),
        "## Kernels",
        "`fewbit kernels` says which of them this machine runs, and why not the others.",
        table(("kernel", "what it does", "fused"), kernels),
        "## Protocols of the quality measurement",
        table(("protocol", "what is scored"), protocols),
        "## Number formats",
        ", ".join(f"`{name}`" for name in GRIDS) + ". `fewbit formats` shows each of them.",
        "## Shapes",
        "What `--shapes` takes: " + ", ".join(f"`{name}`" for name in SHAPES) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def _protocol(protocol: Protocol) -> str:
    few = f"the first {protocol.max_texts} texts of more than {protocol.longer_than_characters} characters; " if protocol.max_texts else ""
    cut = "the joined texts cut into windows of" if protocol.joined else "each text cut off at"
    start = ", each after the beginning-of-sequence token" if protocol.bos_per_window else ""
    return f"{few}{cut} {protocol.context_length} tokens (the model's own length when that is smaller){start}"


def runtimes_page() -> str:
    """docs/runtimes.md: which checkpoints which runtimes load, and what `make test-runtimes` measured last."""
    from fewbit.checkpoints.runtimes import kinds, runtimes

    proven: dict[str, Any] = json.loads(PROVEN.read_text(encoding="utf-8")) if PROVEN.is_file() else {}
    rows = [
        (kind.title, *(_cell(kind.reason_against(r.name), [proven.get(str(m), {}).get(r.name) for m in kind.made]) for r in runtimes()))
        for kind in kinds().values()
    ]
    runs = [
        (f"`{made}`", runtime.title, *_run(check))
        for kind in kinds().values()
        for made in map(str, kind.made)
        for runtime in runtimes()
        if (check := proven.get(made, {}).get(runtime.name)) is not None
    ]
    parts = [
        "# Checkpoints and runtimes",
        NOTICE,
        "Which checkpoints these programs load on a machine without a GPU. `fewbit verify DIR` lets the installed ones load a checkpoint "
        "and compares what they compute; `make runtimes` installs them; `make test-runtimes` goes through this table.",
        table(("runtime", "versions"), ((r.title, r.versions) for r in runtimes())),
        "**yes**: `make test-runtimes` has seen it with checkpoints that fewbit wrote; yes in plain type: known to load, not in that test. "
        "**no**: the runtime refused it in that test, or computed something else where the cell says so.",
        table(("checkpoint", *(r.title for r in runtimes())), rows),
        "## What was measured",
        "Root mean square difference in nats of the log-probabilities of given tokens from those of fewbit's own runtime, beside the same "
        "for the dequantized model (the runtime's noise floor) and for a copy with one damaged linear; and how many linears answer probes "
        "of +1 and -1 as the dequantized weights do. A cell passes within two floors, with all linears equal, and when the copy fails.",
        table(("checkpoint", "runtime", "result", "difference", "floor", "damaged copy", "linears equal", "date"), runs)
        if runs
        else "Nothing yet.",
    ]
    return "\n\n".join(parts) + "\n"


def _cell(reason: str | None, checks: Sequence[dict[str, Any] | None]) -> str:
    """One cell: bold where every checkpoint of the row was tried and did what the matrix says."""
    expected = "passed" if reason is None else "failed" if reason.startswith("loads it and computes something else") else "refused"
    seen = bool(checks) and all(check is not None and check["status"] == expected for check in checks)
    word = "yes" if reason is None else "no"
    return (f"**{word}**" if seen else word) + ("" if reason is None else f": {reason}")


def _run(check: dict[str, Any]) -> tuple[str, ...]:
    result = "passed" if check["status"] == "passed" else f"{check['status']}: {' '.join(check['reason'].split())[:160]}"
    if check["difference_rms_nats"] is None:
        return (result, "-", "-", "-", "-", check["date"])
    control = check["control_rms_nats"]
    equal = check["layers_compared"] - len(check["layers_differing"])
    return (
        result,
        f"{check['difference_rms_nats']:.2g}",
        f"{check['floor_rms_nats']:.2g}",
        "does not load" if control is None else f"{control:.2g}, {check['control_layers']} linears",
        f"{equal} of {check['layers_compared']}" if check["layers_compared"] else "-",
        check["date"],
    )


PAGES: dict[str, Callable[[], str]] = {"cli.md": cli_page, "reference.md": reference_page, "runtimes.md": runtimes_page}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a page is not current")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"not current: {', '.join(stale)}; run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
