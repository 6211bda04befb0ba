"""What `fewbit verify` tells a person."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fewbit.checkpoints.runtimes import get_runtime
from fewbit.results import RuntimeCheck, VerifyResult

__all__ = ["render_verify", "runtimes_table"]

_STYLES = {"passed": "green", "failed": "red", "skipped": "dim"}
_NAMED = 8


def runtimes_table(checks: list[RuntimeCheck]) -> Table:
    """One row per runtime: the difference from our runtime beside what its arithmetic alone makes."""
    table = Table(title="Log-probabilities in other runtimes, root mean square difference from ours", title_justify="left")
    for name in ("runtime", "result"):
        table.add_column(name)
    for name in ("difference", "its own floor", "damaged copy", "linears equal"):
        table.add_column(name, justify="right")
    table.add_column("why", overflow="fold")
    for check in checks:
        equal = check.layers_compared - len(check.layers_differing)
        table.add_row(
            get_runtime(check.runtime).title,
            f"[{_STYLES[check.status]}]{check.status}[/]",
            _nats(check.difference_rms_nats),
            _nats(check.floor_rms_nats),
            _nats(check.control_rms_nats),
            f"{equal} of {check.layers_compared}" if check.layers_compared else "-",
            check.reason or "",
        )
    return table


def render_verify(result: VerifyResult, console: Console) -> None:
    """Print the table, what is wrong, and the verdict."""
    if result.runtimes:
        console.print(runtimes_table(result.runtimes))
    for problem in result.problems[:_NAMED]:
        console.print(f"[red]Problem:[/] {problem}", highlight=False, soft_wrap=True)
    if len(result.problems) > _NAMED:
        console.print(f"... and {len(result.problems) - _NAMED} more")
    for check in result.runtimes:
        for name in check.layers_differing[:_NAMED]:
            console.print(f"[red]{get_runtime(check.runtime).title}:[/] {name} computes something else", highlight=False, soft_wrap=True)
    compared = f", compared with the {' and the '.join(result.compared_with)}" if result.compared_with else ""
    ran = sum(check.status == "passed" for check in result.runtimes)
    verdict = "[green]good[/]" if result.passed else "[red]not good[/]"
    console.print(
        f"{result.checkpoint} ({result.kind}) is {verdict}: {result.tensors} tensors, {result.linears} quantized linears{compared}; "
        f"{ran} other runtimes compute the same ({result.duration_s:.0f} s)",
        highlight=False,
        soft_wrap=True,
    )


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
