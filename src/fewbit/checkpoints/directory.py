"""Writing a checkpoint so that its directory either is whole or does not exist.

All work happens in `DIR.partial/`; a rename, which a file system does at once or not at all, makes it `DIR`. A run that is killed leaves
`DIR.partial/` behind and nothing else, and the next run starts over. (Work that is too long to start over: `checkpoints.unfinished`.)
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewbit.errors import OutputError

__all__ = ["check_target", "output_directory", "output_file", "put_in_place", "translated"]

_REMEDIES = {
    errno.ENOSPC: "free some space, or name a directory on another disk",
    errno.EDQUOT: "free some of your quota, or name a directory on another disk",
    errno.EROFS: "the file system is read-only: name a directory elsewhere",
    errno.EACCES: "name a directory that you may write to",
    errno.EPERM: "name a directory that you may write to",
    errno.ENOTDIR: "a part of the path is a file: name another directory",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def output_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into that becomes `path` when the block ends without an error, and disappears when it does not.

    Args:
        path: the directory to make.
        overwrite: replace an existing checkpoint; it stays in place until the new one is whole.

    Yields:
        `path` with `.partial` appended, empty.

    Raises:
        OutputError: `path` is a file, or a directory with something in it that may not be replaced; or the system refuses a write.
    """
    target = Path(path).absolute()
    if not target.name:
        raise OutputError(f"'{target}' cannot be replaced", "name a directory")
    partial = target.with_name(f"{target.name}.partial")
    with translated(target):
        check_target(target, overwrite)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    try:
        with translated(target):
            yield partial
            put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def output_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A file to write that becomes `path` when the block ends without an error, and disappears when it does not.

    Args:
        path: the file to make; its directory is made when it is missing.
        overwrite: replace an existing file; it stays in place until the new one is whole.

    Yields:
        `path` with `.partial` appended.

    Raises:
        OutputError: `path` is a directory, or exists and may not be replaced; or the system refuses a write.
    """
    target = Path(path).absolute()
    partial = target.with_name(f"{target.name}.partial")
    if target.is_dir():
        raise OutputError(f"'{target}' is a directory", "name a file")
    if target.exists() and not overwrite:
        raise OutputError(f"'{target}' exists", "name another file, or allow to overwrite it")
    try:
        with translated(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Whether the directory may be made, or replaced.

    Raises:
        OutputError: it is a file, holds something else than a checkpoint, or may not be replaced.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"'{target}' is a file", "name a directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"'{target}' exists and is not empty", "name another directory, or allow to overwrite it")
    if not (target / "config.json").is_file() and not any(target.glob("*.gguf")):
        raise OutputError(f"'{target}' holds something else than a checkpoint (no config.json)", "name another directory")


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a finished directory to its final name; what it replaces is removed afterwards.

    Raises:
        OSError: the system refuses; the old directory is still there.
    """
    replaced = target.with_name(f"{target.name}.replaced")
    if not target.exists():
        partial.rename(target)
    else:
        target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            replaced.rename(target)
            raise
    if replaced.exists():  # from this run, or from one that was killed between the two renames
        shutil.rmtree(replaced)


@contextmanager
def translated(target: Path) -> Iterator[None]:
    """Errors of the system become an OutputError that names the directory and says what to do."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the disk and the directory's permissions")
        raise OutputError(f"cannot write '{target}': {error.strerror or error}", remedy) from error
