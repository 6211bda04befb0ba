"""vLLM's own OpenAI server on this machine serves fewbit's checkpoints, and lm-eval against it agrees with `fewbit evaluate`.

    python benchmarks/serving.py                                  # AWQ, GPTQ, W8A8 and FP8-KV; lm-eval against the first
    python benchmarks/serving.py --only awq --json serving.json

Needs `make runtimes` (vLLM; and lm-eval, scripts/runtimes/lmeval.txt). Each checkpoint is made of the bundled model, started through
`fewbit serve`'s own plan, asked for a completion with the body of the curl line that it prints, and ended.

**The task.** Documents of the held-out standard library, cut at 1,200 characters. lm-eval gets each as a context of its first token and
the rest as the continuation, and asks the server for the continuation's log-likelihood; `fewbit evaluate --protocol lab-512` scores all
tokens but the first of each document. So both score the same tokens given the same tokens. lm-eval's samples are summed into the mean loss
per token, whose perplexity must lie in the 95 % interval that `fewbit evaluate` gives for its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _bars import Bar, NotMeasuredError, add_arguments, run_bars

DOCUMENTS, CHARACTERS = 40, 1200
# name: scheme, format, method
CHECKPOINTS = {
    "awq": ("W4A16-ASYM", "awq", "rtn"),
    "gptq": ("W4A16", "gptq", "gptq"),
    "w8a8": ("W8A8", "compressed-tensors", "rtn"),
    "fp8-kv": ("FP8-KV", "compressed-tensors", "rtn"),
}
TASK = {
    "task": "fewbit_documents",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{target}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],  # its perplexity would be that of a document
}


@dataclass
class Serving:
    """Checkpoints and what their servers said; each is made and asked once."""

    folder: Path
    evaluated: str
    answers: dict[str, str] = field(default_factory=dict)
    losses: tuple[float, int] | None = None
    missing: str = "lm-eval was not run"
    own: Any = None

    def checkpoint(self, name: str) -> Path:
        """Quantize the bundled model."""
        from fewbit.errors import FewbitError
        from fewbit.walk.settings import CalibrationChoice, GateChoice, walk_settings
        from fewbit.workflows.quantize import quantize_model

        scheme, layout, method = CHECKPOINTS[name]
        out = self.folder / name
        if not out.exists():
            calibration = CalibrationChoice(samples=16, sequence_length=256)
            settings = walk_settings(method=method, gate=GateChoice(enabled=False), calibration=calibration)
            try:
                quantize_model(None, scheme=scheme, layout=layout, out=out, settings=settings)
            except FewbitError as error:
                raise NotMeasuredError(str(error)) from error
        return out

    def answer(self, name: str) -> float:
        """Characters of the completion that vLLM's server gives; the evaluation is done while the server is up."""
        from fewbit.errors import FewbitError
        from fewbit.workflows.serve import ServePlan, run_server, serve_plan

        if name in self.answers:
            return float(len(self.answers[name]))
        done = threading.Event()

        def ready(plan: ServePlan) -> None:
            body = shlex.split(plan.curl)[-1]
            request = urllib.request.Request(f"{plan.url}/completions", body.encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=300) as reply:
                self.answers[name] = json.load(reply)["choices"][0]["text"]
            print(f"{name}: 'import ' -> {self.answers[name]!r}", file=sys.stderr)
            if name == self.evaluated:
                try:
                    self.losses = self.lm_eval(plan.url, plan.model)
                except NotMeasuredError as error:  # the server's answer stands
                    self.missing = str(error)
            done.set()
            raise KeyboardInterrupt

        try:
            run_server(serve_plan(self.checkpoint(name), runtime="vllm", port=_free_port(), context=1024), ready)
        except FewbitError as error:
            raise NotMeasuredError(str(error)) from error
        if not done.is_set():
            raise NotMeasuredError("the server ended before it was asked")
        return float(len(self.answers[name]))

    def documents(self) -> list[tuple[str, str]]:
        """Context (the first token) and continuation of each document whose first token does not change when it stands alone."""
        from fewbit.checkpoints.sources import open_source
        from fewbit.corpora.text import load_corpus

        tokenizer, found = open_source(None).tokenizer(), []
        for text in load_corpus(None).texts:
            text = text[:CHARACTERS].strip()
            ids = tokenizer(text)["input_ids"]
            first = str(tokenizer.decode(ids[:1]))
            if (
                len(text) > 400
                and len(ids) <= 500
                and text.startswith(first)
                and first.strip() == first
                and tokenizer(first)["input_ids"] == ids[:1]
            ):
                found.append((first, text[len(first) :]))
        return found[:DOCUMENTS]

    def lm_eval(self, url: str, model: str) -> tuple[float, int]:
        """Sum of the losses of all documents in nats, and how many tokens were scored."""
        from fewbit.checkpoints.sources import open_source
        from fewbit.workflows.foreign.environments import environments_directory

        program = environments_directory() / "lmeval" / "bin" / "python"
        if not program.is_file():
            raise NotMeasuredError(f"lm-eval is not installed in {program.parents[1]}")
        place, tokenizer = self.folder / "lm-eval", open_source(None).tokenizer()
        place.mkdir(exist_ok=True)
        documents = self.documents()
        rows = "".join(json.dumps({"context": context, "target": target}) + "\n" for context, target in documents)
        (place / "documents.jsonl").write_text(rows, encoding="utf-8")
        task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(place / "documents.jsonl")}}}
        (place / "task.yaml").write_text(json.dumps(task), encoding="utf-8")
        arguments = f"model={model},base_url={url}/completions,tokenizer={self.checkpoint(self.evaluated)},num_concurrent=1,max_length=1000"
        command = [
            str(program),
            "-m",
            "lm_eval",
            "--model",
            "local-completions",
            "--model_args",
            arguments,
            "--tasks",
            str(place / "task.yaml"),
        ]
        command += ["--include_path", str(place), "--log_samples", "--output_path", str(place / "out"), "--batch_size", "1"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(place / "cache"), "OPENAI_API_KEY": "none"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        samples = sorted((place / "out").rglob("samples_*.jsonl"))
        if done.returncode or not samples:
            raise NotMeasuredError(f"lm-eval failed: {' '.join(done.stdout.split())[-300:]}")
        entries = [json.loads(line) for line in samples[-1].read_text(encoding="utf-8").splitlines()]
        loss = -sum(float(entry["filtered_resps"][0][0]) for entry in entries)
        tokens = sum(len(tokenizer(context + target)["input_ids"]) - 1 for context, target in documents)
        if len(entries) != len(documents):
            raise NotMeasuredError(f"lm-eval scored {len(entries)} of {len(documents)} documents")
        return loss, tokens

    def agreement(self) -> float:
        """How far lm-eval's mean loss is from ours, in half widths of our 95 % interval."""
        from fewbit.workflows.evaluate import evaluate

        self.answer(self.evaluated)
        if self.losses is None:
            raise NotMeasuredError(self.missing)
        files = []
        for index, (context, target) in enumerate(self.documents()):
            files.append(self.folder / f"document-{index:03d}.txt")
            files[-1].write_text(context + target, encoding="utf-8")
        self.own = evaluate(self.checkpoint(self.evaluated), texts=files, protocol="lab-512", max_tokens=None)
        loss, tokens = self.losses
        perplexity, interval = math.exp(loss / tokens), self.own.perplexity
        print(
            f"perplexity by lm-eval {perplexity:.4f} over {tokens} tokens, by fewbit evaluate {interval.value:.4f} "
            f"({interval.low:.4f} to {interval.high:.4f}) over {self.own.protocol.scored_tokens}",
            file=sys.stderr,
        )
        if self.own.protocol.scored_tokens != tokens:
            raise NotMeasuredError(f"lm-eval scored {tokens} tokens, fewbit {self.own.protocol.scored_tokens}")
        half = (math.log(interval.high) - math.log(interval.low)) / 2
        return abs(loss / tokens - math.log(interval.value)) / half


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(CHECKPOINTS), help="this checkpoint alone")
    parser.add_argument("--without-lm-eval", action="store_true", help="only ask each server for a completion")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the checkpoints and lm-eval's samples here")
    add_arguments(parser)
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(CHECKPOINTS)
    with tempfile.TemporaryDirectory(prefix="fewbit-serving-") as folder:
        serving = Serving(arguments.keep or Path(folder), "" if arguments.without_lm_eval else names[0])
        serving.folder.mkdir(parents=True, exist_ok=True)
        bars = [
            Bar(f"serving-{name}-answers", lambda name=name: serving.answer(name), ">", 0, "characters of vLLM's completion")  # type: ignore[misc]
            for name in names
        ]
        if not arguments.without_lm_eval:
            bars.append(Bar("serving-lm-eval-agrees", serving.agreement, "<=", 1, "distance in half widths of the 95 % interval"))
        return run_bars(bars, list_only=arguments.list, json_file=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
