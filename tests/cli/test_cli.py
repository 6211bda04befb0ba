"""The command line as a user calls it: what is printed, exit codes, and that bad input is one line and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.cli import main

COMMANDS = [
    *("compare", "report", "evaluate", "bench", "quantize", "convert", "inspect", "verify", "serve"),
    *("plan", "predict", "decide", "generate", "formats", "kernels"),
]
FEW_TOKENS = ["--max-tokens", "1024"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 200)
    return path


@pytest.fixture
def damaged(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run, expect exit code 2 and one line on stderr without a traceback; returns the line."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("fewbit: error: ")
    assert "Traceback" not in captured.err + captured.out
    return captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"Example: fewbit {command}" in " ".join(capsys.readouterr().out.split())


def test_help_of_quantize_names_every_method_and_layout() -> None:
    import typer

    from fewbit.checkpoints.registry import LAYOUTS
    from fewbit.cli import app
    from fewbit.walk.settings import ROUNDINGS, TRANSFORMS, TUNINGS

    help_of = {option.name: option.help for option in typer.main.get_command(app).commands["quantize"].params}  # type: ignore[attr-defined]
    assert {*ROUNDINGS, *TRANSFORMS, *TUNINGS} <= set(re.findall(r"\w+", help_of["method"]))
    quantized = {name for name in LAYOUTS if not name.startswith("dense")}  # those are for convert
    assert quantized <= set(re.findall(r"[\w-]+", help_of["layout"]))


def test_help_answers_without_importing_torch() -> None:
    code = "import sys; from fewbit.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_version_prints_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    out = capsys.readouterr().out
    assert out.startswith("fewbit ")
    assert f"torch: {torch.__version__}" in out


def test_compare_writes_a_whole_report(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbit.bench import machine
    from fewbit.workflows import compare

    monkeypatch.setattr(machine, "_MAX_BUFFER_BYTES", 64 << 20)
    monkeypatch.setattr(compare, "measure_machine", partial(machine.measure_machine, quick=True))
    out = tmp_path / "results"
    options: list[str | Path] = ["--variants", "w8a16,kv-int8", "--text", text, "--prompt-tokens", "32", "--context", "16", *FEW_TOKENS]
    assert run("compare", tiny_llama_dir, *options, "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "results.json").read_text())
    assert [row["variant"]["name"] for row in printed["variants"]] == ["bf16", "w8a16", "kv-int8"]
    assert printed["conclusions"]
    assert {path.name for path in out.iterdir() if path.suffix != ".svg"} == {"results.json", "results.csv", "report.html"}
    assert len(list(out.glob("*.svg"))) == 3
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert run("report", out) == 0
    assert (out / "report.html").read_bytes() == before


def test_quantize_then_generate_from_the_checkpoint(tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quantized"
    assert run("quantize", tiny_llama_dir, "--scheme", "W4A16", "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["scheme"].startswith("W4A16")
    assert run("generate", out, "--prompt", "import", "--max-new-tokens", "4", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["new_tokens"] == 4
    assert any(use["kernel"] != "dense" for use in made["kernels"])


def test_quantize_leaves_out_what_is_ignored(tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", tiny_llama_dir, "--scheme", "W8A16", "--ignore", "*.down_proj", "--out", tmp_path / "out", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["quantized_linears"] == 12
    assert sum(name.endswith("down_proj") for name in made["ignored_linears"]) == 2
    assert "matches no linear" in fails(
        capsys, "quantize", tiny_llama_dir, "--scheme", "W8A16", "--ignore", "nope", "--out", tmp_path / "b"
    )


def test_generate_streams_the_text_it_returns(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", tiny_llama_dir, "--prompt", "import", "--max-new-tokens", "6", "--json") == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert run("generate", tiny_llama_dir, "--prompt", "import", "--max-new-tokens", "6") == 0
    assert capsys.readouterr().out.startswith("import" + text.rstrip("\ufffd"))


def remove(*names: str) -> Callable[[Path], object]:
    return lambda model: [(model / name).unlink() for name in names]  # type: ignore[func-returns-value]


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def scramble(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 4096)


def change_weight(value: float) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    return change


def unknown_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "never-heard-of"
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove("config.json"), "config.json"),
        (remove("model.safetensors"), "safetensors"),
        (truncate, "model.safetensors"),
        (scramble, "model.safetensors"),
        (change_weight(float("nan")), "model.layers.1.mlp.down_proj"),
        (change_weight(float("inf")), "model.layers.1.mlp.down_proj"),
        (unknown_architecture, "never-heard-of"),
        (remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    ],
    ids=["no config", "no weights", "truncated", "corrupt", "nan", "inf", "architecture", "no tokenizer"],
)
def test_a_damaged_model_is_named(
    damage: Callable[[Path], object], said: str, damaged: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(damaged)
    line = fails(capsys, "compare", damaged, "--variants", "w4a16", "--text", text, *FEW_TOKENS, "--out", tmp_path / "out")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_wrong_names_are_listed_with_the_right_ones(tiny_llama_dir: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "int4-w4a16" in fails(capsys, "compare", tiny_llama_dir, "--variants", "int5")
    assert "W4A16" in fails(capsys, "evaluate", tiny_llama_dir, "--scheme", "W5", "--text", text)
    assert "qwen2.5-1.5b" in fails(capsys, "bench", "--shapes", "gpt-9")
    assert "does not exist" in fails(capsys, "evaluate", "./no/such/model", "--text", text)


def test_an_option_that_says_nothing_is_an_error(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'a100-80gb'" in fails(capsys, "decide", "7e9", "--hardware", "h100-sxm", "--price", "a100-80gb=3")
    assert "--hardware" in fails(capsys, "plan", "7e9", "--hardware-file", "devices.toml")
    assert "'unfused'" in fails(capsys, "generate", tiny_llama_dir, "--kernel", "unfused")


def test_text_that_cannot_be_used(tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("one two")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    for name in ("empty.txt", "short.txt", "latin.txt", "missing.txt"):
        assert name in fails(capsys, "evaluate", tiny_llama_dir, "--text", tmp_path / name)


def test_output_that_cannot_be_written(tiny_llama_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "out"
    assert str(target) in fails(capsys, "compare", tiny_llama_dir, "--text", text, "--out", target)
    assert str(target) in fails(capsys, "quantize", tiny_llama_dir, "--scheme", "W8A16", "--out", target)


def test_group_size_that_does_not_divide(tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "quantize", tiny_llama_dir, "--scheme", "W4A16", "--group-size", "96", "--out", tmp_path / "out")
    assert "96" in line and "128" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["compare", "--nope"], ["nope"], ["quantize", "--out", "x"], ["compare", "--seed", "many"], ["bench", "a", "b"]]
)
def test_a_command_line_that_does_not_parse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--help" in fails(capsys, *arguments)


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert "Usage: fewbit" in capsys.readouterr().out


def test_debug_shows_the_traceback(tiny_llama_dir: Path) -> None:
    from fewbit.errors import UsageError

    with pytest.raises(UsageError):
        main(["compare", str(tiny_llama_dir), "--variants", "int5", "--debug"])


def test_installed_command_exits_with_two_and_one_line() -> None:
    command = [sys.executable, "-m", "fewbit", "plan", "./no/such/model"]  # a command that need not import torch
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fewbit: error: ") and done.stderr.count("\n") == 1


def test_ctrl_c_is_one_line_and_leaves_nothing(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbit.walk import methods

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "rtn", interrupt)
    assert run("quantize", tiny_llama_dir, "--scheme", "W4A16", "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err == "fewbit: error: interrupted\n"
    assert list(tmp_path.iterdir()) == []
