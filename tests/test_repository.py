"""What keeps the repository whole: exported names, documents that are current, README snippets that run, one version, no network."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fewbit

REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted((REPOSITORY / "src" / "fewbit").rglob("*.py"))
PACKAGES = sorted({path.parent for path in SOURCES})
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def _run(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, in the repository, with this interpreter's scripts first on the path."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY / "src"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    return subprocess.run(
        arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False
    )


def _relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY / "src"))


# ------------------------------------------------------------------------------------------------------------- the package


@pytest.mark.parametrize("name", fewbit.__all__)
def test_every_exported_name_exists_and_is_documented(name: str) -> None:
    value = getattr(fewbit, name)
    assert value is not None
    if callable(value):
        assert value.__doc__, f"fewbit.{name} has no docstring"


def test_exported_names_are_the_ones_that_type_checkers_see() -> None:
    tree = ast.parse((REPOSITORY / "src" / "fewbit" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == fewbit._HOMES
    assert set(fewbit.__all__) == {*seen, "__version__"}
    assert set(fewbit.__all__) <= set(dir(fewbit))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'no_such_name'"):
        _ = fewbit.no_such_name


def test_importing_fewbit_and_asking_for_help_do_not_import_torch() -> None:
    program = (
        "import sys, fewbit\nfrom fewbit.cli import main\n"
        "try:\n    main(['compare', '--help'])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    process = _run(sys.executable, "-c", program)
    assert process.returncode == 0, process.stderr
    assert "--variants" in process.stdout


def test_importing_every_module_opens_no_connection() -> None:
    names = [".".join(Path(_relative(path)).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
    modules = [name for name in names if not name.endswith(".__main__")]  # importing that one runs the command line
    program = (
        "import importlib, sys\n"
        "def refuse(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n        raise SystemExit(f'{event} {arguments}')\n"
        f"sys.addaudithook(refuse)\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
    )
    process = _run(sys.executable, "-c", program)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_every_module_has_a_docstring_and_names_its_exports(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{_relative(path)} has no docstring"
    assigned = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)}
    is_bare_package = path.name == "__init__.py" and not any(isinstance(node, ast.ImportFrom) and node.level == 0 for node in tree.body[2:])
    assert "__all__" in assigned or is_bare_package or path.name == "__main__.py", f"{_relative(path)} has no __all__"


@pytest.mark.parametrize("package", PACKAGES, ids=_relative)
def test_every_folder_with_modules_is_a_package(package: Path) -> None:
    # import-linter does not look into a folder without __init__.py
    assert (package / "__init__.py").exists()


def test_no_module_unpickles_or_trusts_remote_code() -> None:
    pattern = re.compile(r"torch\.load\(|pickle\.loads?\(|trust_remote_code\s*=\s*True|weights_only\s*=\s*False")
    assert not [_relative(path) for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))]


# ------------------------------------------------------------------------------------------------------------- one version


def test_the_version_has_one_source() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["scikit-build"]["metadata"]["version"]["input"] == "src/fewbit/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", fewbit.__version__)
    assert f"\nversion: {fewbit.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")


def test_version_prints_the_environment() -> None:
    process = _run(sys.executable, "-c", "from fewbit.cli import main; main()", "--version")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == f"fewbit {fewbit.__version__}"
    started = {line.partition(":")[0] for line in lines[1:]}
    assert {"Python", "platform", "CPU", "native extension", "torch", "transformers"} <= started


# --------------------------------------------------------------------------------------------------------------- documents


def test_generated_documents_are_current() -> None:
    spec = importlib.util.spec_from_file_location("generate_docs", REPOSITORY / "scripts" / "generate_docs.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    stale = [name for name, page in script.PAGES.items() if (REPOSITORY / "docs" / name).read_text(encoding="utf-8") != page()]
    assert not stale, f"not current: {', '.join(stale)}; run `make docs`"


def test_every_command_stands_in_the_readme() -> None:
    import typer

    from fewbit.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert not [name for name in commands if f"`fewbit {name}" not in README]


def test_every_workflow_of_the_python_api_stands_in_the_readme() -> None:
    workflows = [name for name, home in fewbit._HOMES.items() if home.startswith("fewbit.workflows.") and name[0].islower()]
    assert len(workflows) > 10
    assert not [name for name in workflows if not re.search(rf"`?(fewbit\.)?{name}[`(]", README)]


def test_every_layer_stands_in_the_readme_and_in_the_import_contract() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    contract = " ".join(project["tool"]["importlinter"]["contracts"][0]["layers"])
    for package in PACKAGES[1:]:
        name = _relative(package).removeprefix("fewbit/").partition("/")[0]
        assert f"\n  {name}/ " in README, f"{name}/ is not in the README's tree"
        assert re.search(rf"\b{name}\b", contract), f"{name} is not in the import contract"


@pytest.mark.parametrize("document", sorted(REPOSITORY.glob("*.md")) + sorted((REPOSITORY / "docs").rglob("*.md")), ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_no_document_or_source_names_a_path_of_somebodys_machine() -> None:
    files = [path for path in _run("git", "ls-files").stdout.splitlines() if not path.endswith((".safetensors", "tokenizer.json"))]
    assert len(files) > 20
    pattern = re.compile(r"(?<![\w.~])/(?:home|root|opt|work|Users)/\w")
    named = {path for path in files if pattern.search((REPOSITORY / path).read_text(encoding="utf-8", errors="replace"))}
    assert not named - {"tests/test_repository.py"}


# --------------------------------------------------------------------------------------------- README snippets that must run

SNIPPETS = re.findall(r"<!-- run -->\n```(bash|python)\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_has_snippets() -> None:
    assert {language for language, _ in SNIPPETS} == {"bash", "python"}


@pytest.mark.parametrize(("language", "code"), SNIPPETS, ids=[f"{language}-{number}" for number, (language, _) in enumerate(SNIPPETS)])
def test_readme_snippet_runs(language: str, code: str) -> None:
    if language == "bash":
        # The console script itself; `python -c` where the package is on the path but not installed.
        shim = f"fewbit() {{ {sys.executable} -c 'from fewbit.cli import main; main()' \"$@\"; }}\n"
        process = _run("bash", "-e", "-c", shim + code)
    else:
        process = _run(sys.executable, "-c", code)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.strip()


# ----------------------------------------------------------------------------------------------------- the native extension


@pytest.mark.skipif(importlib.util.find_spec("fewbit._native") is None, reason="fewbit was installed without its native extension")
class TestNative:
    def test_bandwidth_is_a_plausible_rate(self) -> None:
        native = importlib.import_module("fewbit._native")
        assert native.instruction_set() in ("avx512", "avx2", "portable")
        assert 0.01 < native.read_bandwidth(64 << 20, 2, 0.0) < 10_000

    @pytest.mark.parametrize(("size", "threads", "seconds"), [(1 << 20, 1, 0.0), (1 << 30, 0, 0.0), (4 << 20, 1, -1.0), (4 << 20, 3, 0.0)])
    def test_sizes_that_make_no_sense_are_refused(self, size: int, threads: int, seconds: float) -> None:
        native = importlib.import_module("fewbit._native")
        with pytest.raises(ValueError, match=r"bytes|threads|seconds"):
            native.read_bandwidth(size, threads, seconds)
