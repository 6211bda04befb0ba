"""`fewbit verify`: is this checkpoint good? Its files are read and compared, and the installed runtimes load it and compute the same.

    from fewbit.workflows.verify import verify_checkpoint

    result = verify_checkpoint("quantized/w4a16", against="models/mine", runtimes=("vllm", "transformers"))
    assert result.passed, result.problems

The files' half is `workflows.verify_tensors`, the runtimes' half `workflows.verify_runtimes`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fewbit.checkpoints.runtimes import Runtime, get_runtime, kind_of, runtimes
from fewbit.checkpoints.sources import TensorSource, open_source
from fewbit.corpora.text import load_corpus
from fewbit.errors import UsageError
from fewbit.results import RuntimeCheck, VerifyResult
from fewbit.workflows.foreign.environments import interpreter
from fewbit.workflows.verify_runtimes import Subject, check_runtime
from fewbit.workflows.verify_tensors import check_tensors

__all__ = ["token_windows", "verify_checkpoint"]

_WINDOWS, _TOKENS = 4, 128
_CHARACTERS = 4096  # of each document; more is never read in 128 tokens

StepCallback = Callable[[str], None]


def verify_checkpoint(
    checkpoint: str | Path,
    *,
    against: str | Path | None = None,
    runtime_names: Sequence[str] = ("all",),
    texts: Sequence[Path] = (),
    threads: int = 1,
    progress: StepCallback | None = None,
) -> VerifyResult:
    """Check a checkpoint's files, and let other runtimes load it.

    Args:
        checkpoint: a Hugging Face directory or a GGUF file, by whatever tool.
        against: the model in high precision that it was made from.
        runtime_names: of `checkpoints.runtimes`; `all` for those that are installed and load its kind, empty for none.
        texts: what the runtimes read, in place of the bundled corpus.
        threads: of each runtime.
        progress: called with what is being done.

    Raises:
        UsageError: an unknown runtime.
        ModelError, CheckpointError: files that fewbit cannot read at all.
        CorpusError: text that cannot be used.
        MeasurementError: a runtime that was named is not installed.
    """
    started = time.monotonic()
    tell = progress or (lambda what: None)
    path = Path(checkpoint)
    chosen = _chosen(runtime_names)
    source = open_source(path)
    kind = kind_of(path)
    tell("tensors")
    found = check_tensors(source, path, open_source(against) if against is not None else None)
    checks: list[RuntimeCheck] = []
    ids = token_windows(source, texts) if chosen else []
    for runtime, named in chosen:
        tell(runtime.title)
        reason = kind.reason_against(runtime.name)
        if reason is not None:
            checks.append(RuntimeCheck(runtime.name, "skipped", reason))
        elif not named and interpreter(runtime) is None:
            checks.append(RuntimeCheck(runtime.name, "skipped", "not installed"))
        else:
            checks += check_runtime(runtime, [Subject(path, kind, source)], ids, threads=threads)
    return VerifyResult(
        schema_version=1,
        checkpoint=str(checkpoint),
        kind=kind.title,
        scheme=source.scheme.name if source.scheme is not None else "",
        linears=found.linears,
        tensors=found.tensors,
        compared_with=found.compared_with,
        problems=found.problems,
        runtimes=checks,
        passed=not found.problems and all(check.status != "failed" for check in checks),
        duration_s=time.monotonic() - started,
    )


def token_windows(source: TensorSource, texts: Sequence[Path] = ()) -> list[list[int]]:
    """What the runtimes read: the beginnings of four documents, up to 128 tokens each.

    Raises:
        CorpusError: text that cannot be used.
        ModelNotFoundError: the checkpoint has no tokenizer.
    """
    tokenizer = source.tokenizer()
    documents = load_corpus(None, texts).texts
    windows = [tokenizer(text[:_CHARACTERS], add_special_tokens=True)["input_ids"][:_TOKENS] for text in documents if text.strip()]
    longest = sorted(windows, key=len, reverse=True)[:_WINDOWS]
    return [window for window in longest if len(window) > 1]


def _chosen(names: Sequence[str]) -> list[tuple[Runtime, bool]]:
    """The runtimes, and whether each was asked for by name."""
    if "all" in names:
        if len(names) > 1:
            raise UsageError("'all' was named beside other runtimes", "name one or the other")
        return [(runtime, False) for runtime in runtimes()]
    return [(get_runtime(name), True) for name in names]
