"""`fewbit serve`: start the best installed server for a checkpoint, with the flags that it needs, on loopback.

    plan = serve_plan("quantized/w4a16")         which server, its command line, and why not the others
    run_server(plan, on_ready=print)             until it ends or Ctrl-C

fewbit has no server of its own. The matrix of runtimes (`checkpoints.runtimes`) says who loads the checkpoint; of those that are installed,
in the environments of `make runtimes` or on the path, the first of this order is taken: vLLM, which batches best, llama.cpp's server, and
`transformers serve`. All three speak OpenAI's protocol.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewbit.checkpoints.runtimes import Runtime, get_runtime, kind_of
from fewbit.errors import MeasurementError, ModelNotFoundError, UsageError
from fewbit.workflows.foreign.environments import interpreter

__all__ = ["ServePlan", "run_server", "serve_plan"]

_ORDER = ("vllm", "llama.cpp", "transformers")
_POLL_S = 0.5
_GRACE_S = 10.0


@dataclass(frozen=True)
class ServePlan:
    """A server that is about to be started.

    Attributes:
        runtime: vllm, llama.cpp or transformers.
        kind: of the checkpoint.
        command: the command line.
        environment: variables that it needs besides those of this process.
        host, port: where it listens.
        model: the name under which it serves the checkpoint.
        passed_over: server to the reason why it was not taken.
    """

    runtime: str
    kind: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    host: str
    port: int
    model: str
    passed_over: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The root of the protocol."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def curl(self) -> str:
        """A line that asks it for a completion."""
        body = json.dumps({"model": self.model, "prompt": "import ", "max_tokens": 32})
        return f"curl {self.url}/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"

    @property
    def shell(self) -> str:
        """The command as a person would type it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


def serve_plan(
    checkpoint: str | Path, *, runtime: str | None = None, host: str = "127.0.0.1", port: int = 8000, context: int | None = None
) -> ServePlan:
    """Choose the server and its flags.

    Args:
        checkpoint: a Hugging Face directory or a GGUF file.
        runtime: vllm, llama.cpp or transformers; the first that loads the checkpoint and is installed when None.
        host, port: where it listens; loopback unless you say otherwise.
        context: tokens of a sequence; the model's own when None.

    Raises:
        UsageError: an unknown server, or a port that is taken.
        ModelNotFoundError, CheckpointError, UnsupportedModelError: as `kind_of`.
        MeasurementError: no installed server loads the checkpoint; the message says why each does not.
    """
    path = Path(checkpoint)
    kind, wish = kind_of(path), _Wish(path, _config(path), host, port, context)
    if runtime is not None and runtime not in _ORDER:
        raise UsageError(f"'{runtime}' is no server", f"choose one of {', '.join(_ORDER)}")
    passed_over: dict[str, str] = {}
    for name in (runtime,) if runtime else _ORDER:
        found = get_runtime(name)
        command = kind.reason_against(name) or _STARTS[name](found, wish)
        if isinstance(command, str):
            passed_over[name] = command
            continue
        _check_port(host, port)
        served = str(path.resolve()) if name == "transformers" else wish.name
        return ServePlan(name, kind.title, command, _ENVIRONMENTS.get(name, {}), host, port, served, passed_over)
    reasons = "; ".join(f"{get_runtime(name).title}: {reason}" for name, reason in passed_over.items())
    raise MeasurementError(f"no server for '{checkpoint}' ({kind.title}): {reasons}", "make runtimes, or fewbit convert")


def run_server(plan: ServePlan, on_ready: Callable[[ServePlan], None] | None = None, *, timeout_s: float = 900.0) -> int:
    """Start the server and wait for its end; Ctrl-C ends it.

    Args:
        on_ready: called once it answers.
        timeout_s: in which it must answer for the first time.

    Returns:
        Its exit code; 0 after Ctrl-C.

    Raises:
        MeasurementError: it ended or did not answer in time.
    """
    process = subprocess.Popen(plan.command, env={**os.environ, **plan.environment}, start_new_session=os.name == "posix")
    try:
        _wait_until_ready(plan, process, timeout_s)
        if on_ready is not None:
            on_ready(plan)
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _end(process)


def _wait_until_ready(plan: ServePlan, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    title, deadline = get_runtime(plan.runtime).title, time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None:
            raise MeasurementError(f"{title}'s server ended with exit code {code} before it answered", "its own words stand above")
        try:
            with urllib.request.urlopen(f"{plan.url}/models", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_S)
    raise MeasurementError(f"{title}'s server did not answer within {timeout_s:.0f} s", "start it by hand to see why: " + plan.shell)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The server and what it started."""
    if process.poll() is not None:
        return
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(_GRACE_S)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def _config(path: Path) -> Mapping[str, Any]:
    """config.json; empty for a GGUF file, which `kind_of` has looked at."""
    if path.is_file():
        return {}
    try:
        fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"'{path / 'config.json'}' cannot be read: {error}") from error
    return fields if isinstance(fields, dict) else {}


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"{host}:{port} cannot be used: {error.strerror or error}", "choose another --port") from error


# ------------------------------------------------------------------------------------------------- what starts each of the servers


@dataclass(frozen=True)
class _Wish:
    """What is to be served, and where."""

    path: Path
    config: Mapping[str, Any]
    host: str
    port: int
    context: int | None

    @property
    def name(self) -> str:
        return self.path.stem if self.path.is_file() else self.path.resolve().name

    @property
    def address(self) -> tuple[str, ...]:
        return ("--host", self.host, "--port", str(self.port))


def _python_with(runtime: Runtime, *modules: str) -> Path | str:
    """A Python in which the modules are found, the runtime's environment first; else the reason."""
    python = interpreter(runtime)
    if python is None:
        return Path(sys.executable) if all(find_spec(module) for module in modules) else "not installed"
    program = f"import importlib.util as u, sys; sys.exit(next((m for m in {modules!r} if u.find_spec(m) is None), 0))"
    done = subprocess.run([str(python), "-c", program], capture_output=True, text=True)
    return python if done.returncode == 0 else f"its environment lacks {' '.join(done.stderr.split())[-80:] or modules[0]}"


def _vllm(runtime: Runtime, wish: _Wish) -> tuple[str, ...] | str:
    """On a CPU compilation takes minutes and gains little at once: `--enforce-eager`; scales of an FP8 cache are used when asked for."""
    python = _python_with(runtime, "vllm", "uvicorn")
    if isinstance(python, str):
        return python
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(wish.path), "--served-model-name", wish.name]
    command += [*wish.address, *(() if wish.context is None else ("--max-model-len", str(wish.context)))]
    quantization = wish.config.get("quantization_config")
    if isinstance(quantization, dict) and (quantization.get("kv_cache_scheme") or quantization.get("kv_cache_quant_algo") == "FP8"):
        command += ["--kv-cache-dtype", "fp8"]
    return (*command, *(() if any(Path("/dev").glob("nvidia[0-9]*")) else ("--enforce-eager",)))


def _llamacpp(runtime: Runtime, wish: _Wish) -> tuple[str, ...] | str:
    """llama.cpp's own server, else that of its Python bindings; a context of 0 is the model's own."""
    python, context = interpreter(runtime), str(wish.context or 0)
    program = (shutil.which("llama-server", path=str(python.parent)) if python is not None else None) or shutil.which("llama-server")
    if program is not None:
        return (program, "-m", str(wish.path), "--alias", wish.name, *wish.address, "-c", context)
    with_server = _python_with(runtime, "llama_cpp", "uvicorn", "fastapi", "sse_starlette", "pydantic_settings")
    if isinstance(with_server, str):
        return with_server
    names = ("--model", str(wish.path), "--model_alias", wish.name)
    return (str(with_server), "-m", "llama_cpp.server", *names, *wish.address, "--n_ctx", context)


def _transformers(runtime: Runtime, wish: _Wish) -> tuple[str, ...] | str:
    if wish.path.is_file():
        return "serves directories, not GGUF files"
    python = _python_with(runtime, "transformers", "fastapi", "uvicorn", "openai")
    if isinstance(python, str):
        return python
    return (str(python), "-m", "transformers.cli.transformers", "serve", str(wish.path.resolve()), *wish.address)


_STARTS: Mapping[str, Callable[[Runtime, _Wish], tuple[str, ...] | str]] = {
    "vllm": _vllm,
    "llama.cpp": _llamacpp,
    "transformers": _transformers,
}
_ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    "vllm": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
}
