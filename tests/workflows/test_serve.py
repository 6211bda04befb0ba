"""`fewbit serve`: who is chosen and why not the others, the flags, and a server that is started, answers, and is ended."""

from __future__ import annotations

import json
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from fewbit.errors import MeasurementError, ModelNotFoundError, UsageError
from fewbit.workflows.serve import ServePlan, run_server, serve_plan

W4 = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}
# Stands for the Python of an environment: finds every module, and as a server answers /v1/models and ends at GET /end.
PYTHON = f"""#!{sys.executable}
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if sys.argv[1] == "-c":
    sys.exit(0)
if "--crash" in sys.argv:
    sys.exit(3)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{{}}")
        if self.path == "/end":
            self.wfile.flush()
            import os; os._exit(7)
    def log_message(self, *arguments):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "environments"
    monkeypatch.setenv("FEWBIT_ENVS", str(folder))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for name in ("vllm", "transformers"):
        (folder / name / "bin").mkdir(parents=True)
        (folder / name / "bin" / "python").write_text(PYTHON, encoding="utf-8")
        (folder / name / "bin" / "python").chmod(0o755)
    return folder


def checkpoint(folder: Path, quantization: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}), encoding="utf-8")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_vllm_is_first_where_it_loads_the_checkpoint(environments: Path, tmp_path: Path) -> None:
    plan = serve_plan(checkpoint(tmp_path / "w4", W4), port=free_port(), context=512)
    assert plan.runtime == "vllm" and plan.command[1:3] == ("-m", "vllm.entrypoints.openai.api_server")
    assert plan.command[plan.command.index("--served-model-name") + 1] == "w4" == plan.model
    assert plan.command[plan.command.index("--max-model-len") + 1] == "512"
    assert plan.curl.startswith(f"curl {plan.url}/completions") and plan.host == "127.0.0.1"


def test_another_server_is_taken_where_vllm_refuses_and_the_reasons_are_told(environments: Path, tmp_path: Path) -> None:
    plan = serve_plan(checkpoint(tmp_path / "w3", {**W4, "bits": 3}), port=free_port())
    assert plan.runtime == "transformers"
    assert "3-bit" in plan.passed_over["vllm"] and "layout" in plan.passed_over["llama.cpp"]


def test_an_fp8_cache_is_asked_for_when_the_checkpoint_has_its_scales(environments: Path, tmp_path: Path) -> None:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    fields = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}},
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    }
    command = serve_plan(checkpoint(tmp_path / "kv", fields), port=free_port(), runtime="vllm").command
    assert command[command.index("--kv-cache-dtype") + 1] == "fp8"


def test_without_an_installed_server_each_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_ENVS", str(tmp_path))
    monkeypatch.setattr("fewbit.workflows.serve.find_spec", lambda module: None)
    with pytest.raises(MeasurementError, match=r"vLLM.*not installed.*llama\.cpp.*transformers.*not installed"):
        serve_plan(checkpoint(tmp_path / "w4", W4))


def test_wrong_names_ports_and_directories_are_refused(environments: Path, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "w4", W4)
    with pytest.raises(UsageError, match="openvino"):
        serve_plan(good, runtime="openvino")
    with pytest.raises(ModelNotFoundError):
        serve_plan(tmp_path / "missing")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="--port"):
            serve_plan(good, port=taken.getsockname()[1])


def test_a_server_is_started_answers_and_its_exit_code_is_returned(environments: Path, tmp_path: Path) -> None:
    plan = serve_plan(checkpoint(tmp_path / "w4", W4), port=free_port())
    asked: list[str] = []

    def ready(plan: ServePlan) -> None:
        asked.append(plan.url)
        with urllib.request.urlopen(plan.url.replace("/v1", "/end")) as answer:
            assert answer.status == 200

    assert run_server(plan, ready, timeout_s=30) == 7 and asked == [plan.url]


def test_ctrl_c_ends_the_server(environments: Path, tmp_path: Path) -> None:
    plan = serve_plan(checkpoint(tmp_path / "w4", W4), port=free_port())

    def ready(plan: ServePlan) -> None:
        raise KeyboardInterrupt

    assert run_server(plan, ready, timeout_s=30) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{plan.url}/models", timeout=1)


def test_a_server_that_ends_at_once_is_an_error(environments: Path, tmp_path: Path) -> None:
    plan = serve_plan(checkpoint(tmp_path / "w4", W4), port=free_port())
    crashing = ServePlan(**{**vars(plan), "command": (*plan.command, "--crash")})
    with pytest.raises(MeasurementError, match="exit code 3"):
        run_server(crashing, timeout_s=30)
