"""Work that survives whatever happens to the process: `DIR.partial/`, until it becomes `DIR`.

    DIR.partial/lock                  held by the process that works on it; the system frees it when the process dies
    DIR.partial/command.json          what the work depends on: settings, hashes of weights and text, versions, threads, processor
    DIR.partial/steps/NAME.safetensors, NAME.json     a finished step: its tensors, then its record with their hash
    DIR.partial/scratch/              of no use to anyone else; emptied at every start
    DIR.partial/checkpoint/           the checkpoint while it is put together

A step counts as finished when its record is there and the hash in it fits the tensors. Each file appears by a rename, which a file
system does at once or not at all; so does `DIR`. An error, Ctrl-C, a full disk or `kill -9` therefore costs the step at which it happens,
and the same command goes on behind the last finished one. Another command is refused: what is half done by one rule must not be finished
by another.

Between the rename that makes `DIR` and the removal of `DIR.partial` a process can be killed, too. The last step, `result`, names a file of
the checkpoint and its hash: when `DIR` holds that very file, the work is done and only the clearing away is left.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoints.directory import check_target, put_in_place, translated
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.checkpoints.shards import write_atomically, write_tensors
from fewbit.errors import FewbitError, OutputError

try:
    import fcntl
except ImportError:  # no such module on Windows: two processes on one directory are then not noticed
    fcntl = None  # type: ignore[assignment]

__all__ = ["Unfinished", "resumable_directory"]

_COMMAND, _STEPS, _SCRATCH, _CHECKPOINT = "command.json", "steps", "scratch", "checkpoint"
_RESULT = "result"
_OURS = frozenset({"lock", _COMMAND, f"{_COMMAND}.unfinished", _STEPS, _SCRATCH, _CHECKPOINT})


class Unfinished:
    """The steps of one piece of work.

    Args:
        directory: `DIR.partial`, with its folders.
        done: see the attribute.

    Attributes:
        resumed: names of the steps that were finished when the work was taken up.
        done: an earlier run has put the checkpoint in its place; `result` is all that is left to ask for.
    """

    def __init__(self, directory: Path, done: bool = False) -> None:
        self._directory, self.done = directory, done
        self.resumed = frozenset(path.stem for path in (directory / _STEPS).glob("*.json"))

    @property
    def scratch(self) -> Path:
        """A folder for what need not survive."""
        return self._directory / _SCRATCH

    @property
    def checkpoint(self) -> Path:
        """The folder that becomes `DIR`; empty at first."""
        return self._directory / _CHECKPOINT

    def record(self, step: str) -> dict[str, Any] | None:
        """What was saved with a finished step; None when it is not finished, or its files are damaged."""
        path = self._directory / _STEPS / f"{step}.json"
        if not path.is_file():
            return None
        try:
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None
        tensors = path.with_suffix(".safetensors")
        if not tensors.is_file() or saved.get("sha256") != _sha256(tensors):
            return None
        record: dict[str, Any] = saved["record"]
        return record

    def tensors(self, step: str) -> SafetensorsFiles:
        """The tensors of a finished step.

        Raises:
            CheckpointError: the file is damaged.
        """
        return SafetensorsFiles(self._directory / _STEPS / f"{step}.safetensors")

    def save(self, step: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Finish a step.

        Raises:
            OSError: the system refuses a write.
        """
        path = self._directory / _STEPS / f"{step}.safetensors"
        write_tensors(path, tensors)
        write_atomically(path.with_suffix(".json"), json.dumps({"sha256": _sha256(path), "record": dict(record)}, indent=1))

    def finish(self, proof: str, result: Mapping[str, Any]) -> None:
        """The last step, when `checkpoint` is whole.

        Args:
            proof: the name of a file in it that tells this checkpoint from every other one.
            result: what to answer.

        Raises:
            OSError: the system refuses a write.
        """
        self.save(_RESULT, {}, {"proof": proof, "proof_sha256": _sha256(self.checkpoint / proof), "result": dict(result)})

    @property
    def result(self) -> dict[str, Any]:
        """What `finish` was given."""
        record = self.record(_RESULT)
        assert record is not None
        answer: dict[str, Any] = record["result"]
        return answer


@contextmanager
def resumable_directory(path: str | Path, command: Mapping[str, str], *, overwrite: bool = False) -> Iterator[Unfinished]:
    """Work that becomes the directory `path` when the block ends without an error, and waits in `path.partial` when it does not.

    What has no finished step yet when an error occurs is removed.

    Args:
        path: the directory to make.
        command: what the result depends on, name to value; work that was begun with other values is refused.
        overwrite: replace an existing checkpoint, and begin anew where another command left work; the same command's is taken up.

    Raises:
        OutputError: `path` must not be replaced, another process or another command works on it, or the system refuses a write.
    """
    target = Path(path).absolute()
    if not target.name:
        raise OutputError(f"'{target}' cannot be replaced", "name a directory")
    partial = target.with_name(f"{target.name}.partial")
    with translated(target):
        done = _is_done(partial, target, command)
        if not done:
            check_target(target, overwrite)
        partial.mkdir(parents=True, exist_ok=True)
        stranger = next((entry.name for entry in partial.iterdir() if entry.name not in _OURS), None)
        if stranger is not None:
            raise OutputError(f"'{partial}' holds something else than unfinished work ({stranger})", "remove it, or name another directory")
        lock = _lock(partial)
    try:
        with translated(target):
            _take_up(partial, command, overwrite)
            work = Unfinished(partial, done)
            yield work
            if not done:
                put_in_place(work.checkpoint, target)
        shutil.rmtree(partial, ignore_errors=True)
    except BaseException:
        if _any_finished(partial):
            for folder in (_SCRATCH, _CHECKPOINT):
                shutil.rmtree(partial / folder, ignore_errors=True)
        else:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _any_finished(partial: Path) -> bool:
    """Whether there is something that is worth keeping."""
    return any((partial / _STEPS).glob("*.json"))


def _is_done(partial: Path, target: Path, command: Mapping[str, str]) -> bool:
    """Whether `target` is what this command's finished work in `partial` has become."""
    try:
        begun = json.loads((partial / _COMMAND).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    record = Unfinished(partial).record(_RESULT) if begun == dict(command) else None
    if record is None:
        return False
    proof = target / str(record["proof"])
    return proof.is_file() and _sha256(proof) == record["proof_sha256"]


def _lock(partial: Path) -> int:
    """A file descriptor that must stay open; the lock is gone when the process is."""
    descriptor = os.open(partial / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise OutputError(f"another process works on '{partial}'", "wait for it, or name another directory") from error
    return descriptor


def _take_up(partial: Path, command: Mapping[str, str], overwrite: bool) -> None:
    """Compare with what began the work, and clear away what is of no use."""
    file = partial / _COMMAND
    try:
        begun = json.loads(file.read_text(encoding="utf-8")) if _any_finished(partial) else None
    except (OSError, ValueError):
        begun = None
    if isinstance(begun, dict) and begun != dict(command):
        if not overwrite:
            raise _other_command(partial, begun, command)
        begun = None
    for name in _OURS - {"lock"} - ({_STEPS, _COMMAND} if begun is not None else set()):
        entry = partial / name
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
    for folder in (_STEPS, _SCRATCH, _CHECKPOINT):
        (partial / folder).mkdir(exist_ok=True)
    for leftover in (partial / _STEPS).glob("*.unfinished"):
        leftover.unlink()
    if begun is None:
        write_atomically(file, json.dumps(dict(command), indent=1))


def _other_command(partial: Path, begun: Mapping[str, Any], command: Mapping[str, str]) -> FewbitError:
    names = [name for name in {**begun, **command} if begun.get(name) != command.get(name)]
    what = ", ".join(f"{name} ({_short(begun.get(name))}, now {_short(command.get(name))})" for name in names[:4])
    return OutputError(
        f"'{partial}' holds unfinished work that was begun otherwise: {what}",
        "run the command that began it, name another directory, or allow to overwrite it and start over",
    )


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
