"""Writing a report's files so that a reader never sees half of one: a temporary name in the same directory, then a rename."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fewbit.errors import OutputError

__all__ = ["ensure_writable", "write_text"]

_REMEDY = "choose a place that you can write to"


def ensure_writable(directory: Path) -> None:
    """Find out before a long measurement that its results can be written; makes nothing.

    Raises:
        OutputError: `directory`, or the nearest folder above it that exists, is a file or cannot be written to.
    """
    nearest = directory.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {directory}: {error.strerror or error}", f"{_REMEDY} with --out") from error


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 `text` to `path`, creating its directory; an older file is replaced in one step, also behind a symbolic link.

    What is no file (/dev/stdout, a named pipe) is written to as it is: a rename would put a file in its place.

    Raises:
        OutputError: the directory or the file cannot be written; no temporary file is left behind.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory", _REMEDY)
    if path.exists() and (not path.is_file() or path.is_relative_to("/dev") or path.is_relative_to("/proc")):
        return _write_through(path, text)
    if path.is_symlink():
        path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}", _REMEDY) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}", _REMEDY) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _write_through(path: Path, text: str) -> Path:
    try:
        with path.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}", _REMEDY) from error
    return path


def _umask() -> int:
    """The process's umask; mkstemp makes files that only their owner reads, a report is to be shared."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
