"""The matrix of runtimes.toml, cell by cell: fewbit writes a checkpoint of the bundled model, a real runtime loads it and computes it too.

    make test-runtimes                                       # all cells whose runtime is installed; results in docs/runtimes.json
    FEWBIT_HEAVY=1 pytest tests/runtimes -k 'vllm and gptq'  # some of them; FEWBIT_MADE=DIR keeps and takes what fewbit writes

A cell that says yes must pass `fewbit verify`'s check: log-probabilities within two noise floors of the runtime, each linear's answers
equal, and a damaged copy that fails. A cell that says no must be refused by the runtime in words of its own, or, where the matrix says so,
be loaded and compute something else; where it computes the same after all, the matrix is out of date and the test fails as well.

The selected cells of one runtime are checked by few processes of it: each pays for importing it once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from fewbit.checkpoints.runtimes import Kind, Made, Runtime, get_runtime, kind_of, kinds, runtimes
from fewbit.checkpoints.sources import open_source
from fewbit.errors import FewbitError
from fewbit.models.reference import reference_model_dir
from fewbit.results import RuntimeCheck
from fewbit.walk.settings import CalibrationChoice, GateChoice, walk_settings
from fewbit.workflows.convert import convert_checkpoint
from fewbit.workflows.foreign.environments import interpreter
from fewbit.workflows.quantize import quantize_model
from fewbit.workflows.verify import token_windows
from fewbit.workflows.verify_runtimes import Subject, check_refusals, check_runtime
from fewbit.workflows.verify_tensors import check_tensors

pytestmark = pytest.mark.heavy

PROVEN = Path(__file__).parents[2] / "docs" / "runtimes.json"
CELLS = [
    pytest.param(runtime, kind, made, id=f"{runtime.name}-{kind.name}-{made}")
    for runtime in runtimes()
    for kind in kinds().values()
    for made in kind.made
    if runtime.name in kind.cells
]
COMPUTES_OTHERWISE = "loads it and computes something else"  # how a reason of the matrix begins then
Checks = dict[str, RuntimeCheck]
_PATIENCE_S = 6 * 3600.0  # a busy machine
_PORTION = 9  # checkpoints that one process of a runtime reads


class Matrix:
    """Checkpoints that were written and checks that were made, each once per session."""

    def __init__(self, folder: Path, wanted: dict[str, list[tuple[Kind, Made]]]) -> None:
        self._folder, self._wanted = folder, wanted
        self._subjects: dict[Made, Subject] = {}
        self._checks: dict[str, Checks] = {}

    def subject(self, kind: Kind, made: Made) -> Subject:
        """The checkpoint of one row."""
        if made not in self._subjects:
            path = self._folder / str(made)
            if not path.exists() and made.scheme is None:
                convert_checkpoint(reference_model_dir(), layout=made.format, out=path)
            elif not path.exists():
                assert made.scheme is not None
                calibration = CalibrationChoice(samples=8, sequence_length=128)
                settings = walk_settings(method=made.method, gate=GateChoice(enabled=False), calibration=calibration)
                quantize_model(None, scheme=made.scheme, group_size=made.group_size, layout=made.format, out=path, settings=settings)
            path = next(path.glob("*.gguf"), path)
            assert kind_of(path).name == kind.name
            self._subjects[made] = Subject(path, kind, open_source(path))
            found = check_tensors(self._subjects[made].source, path)
            assert not found.problems
        return self._subjects[made]

    def checks(self, runtime: Runtime) -> Checks:
        """Those of one runtime, in portions: what a portion found is recorded before the next one begins."""
        if runtime.name not in self._checks:
            done = self._checks[runtime.name] = {}
            rows = self._wanted[runtime.name]
            for check, of_kind in ((check_runtime, True), (check_refusals, False)):
                portion = [row for row in rows if (row[0].cells[runtime.name] is None) == of_kind]
                for first in range(0, len(portion), _PORTION):
                    done |= self._some(runtime, check, portion[first : first + _PORTION])
        return self._checks[runtime.name]

    def _some(self, runtime: Runtime, check: Callable[..., list[RuntimeCheck]], rows: list[tuple[Kind, Made]]) -> Checks:
        """One portion; a checkpoint that cannot be written fails its own cell only."""
        found, subjects = {}, {}
        for kind, made in rows:
            try:
                subjects[str(made)] = self.subject(kind, made)
            except FewbitError as error:
                found[str(made)] = RuntimeCheck(runtime.name, "failed", f"fewbit does not write it: {error}")
        if subjects:
            ids = token_windows(next(iter(subjects.values())).source)
            found |= dict(zip(subjects, check(runtime, list(subjects.values()), ids, timeout_s=_PATIENCE_S), strict=True))
        record(found)
        return found


def record(checks: Checks) -> None:
    """Put the results where `make docs` reads them; only where make test-runtimes asks for it."""
    if os.environ.get("FEWBIT_RECORD") != "1":
        return
    fields: dict[str, Any] = json.loads(PROVEN.read_text(encoding="utf-8")) if PROVEN.is_file() else {}
    for name, check in checks.items():
        if check.reason is not None and "no answer within" in check.reason:
            continue  # of the machine, not of the runtime
        # Where the runtime's makers or this machine keep their files is not part of the reason.
        reason = None if check.reason is None else re.sub(r"(?<![\w.~])/(?:[^\s/:]+/)+", "", check.reason)
        fields.setdefault(name, {})[check.runtime] = {"date": date.today().isoformat(), **asdict(check), "reason": reason}
    PROVEN.write_text(json.dumps({name: fields[name] for name in sorted(fields)}, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    wanted: dict[str, list[tuple[Kind, Made]]] = {}
    for item in request.session.items:
        callspec = getattr(item, "callspec", None)
        if item.path == Path(__file__) and callspec is not None and "made" in callspec.params:
            params = callspec.params
            wanted.setdefault(params["runtime"].name, []).append((params["kind"], params["made"]))
    kept = os.environ.get("FEWBIT_MADE")
    yield Matrix(Path(kept) / "matrix" if kept else tmp_path_factory.mktemp("matrix"), wanted)


@pytest.mark.parametrize(("runtime", "kind", "made"), CELLS)
def test_cell(matrix: Matrix, runtime: Runtime, kind: Kind, made: Made) -> None:
    if interpreter(get_runtime(runtime.name)) is None:
        pytest.skip(f"{runtime.title} is not installed: make runtimes")
    check = matrix.checks(runtime)[str(made)]
    reason = kind.cells[runtime.name]
    if reason is not None:
        assert check.status != "passed", f"{runtime.title} loads it and computes the same: the matrix is out of date"
        otherwise = reason.startswith(COMPUTES_OTHERWISE)
        assert check.status == ("failed" if otherwise else "refused"), f"{runtime.title} loads it: {check.reason}"
        return
    assert check.status == "passed", check.reason
    assert check.difference_rms_nats is not None and check.floor_rms_nats is not None
    assert check.control_rms_nats is None or check.control_layers or check.control_rms_nats > 2 * check.floor_rms_nats
