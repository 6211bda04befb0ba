"""The text that every Python user already has: the source of the standard library.

The reference model is trained on it and evaluated on the part it has never seen, so that fewbit measures quality offline
without shipping or downloading a data set. Nothing of the text is redistributed: it is read from the running interpreter.

The split is by *unit*, the top-level name of a module or package (`json`, `asyncio`, `logging`), so that no file of a
held-out package is trained on; tests count with what they test (`test/test_json` belongs to `json`). A unit is held out
when the first 32 bits of the SHA-256 of its name, as a fraction, are below `HELD_OUT_FRACTION`. The split therefore needs
no list and is the same on every machine and for every Python version; what the files say differs between versions, which
is why every result carries the text's hash and the interpreter's version.

Two kinds of units are treated apart:

- `ALWAYS_TRAIN`: packages that distributions ship separately or not at all (`test`, `idlelib`, `tkinter`, ...). If they could be
  held out, the held-out text would depend on the distribution.
- `EXCLUDED`: generated tables (`encodings`, `pydoc_data`) that are not program text, and installed third-party packages.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path, PurePosixPath
from typing import Literal

from fewbit.errors import CorpusError

__all__ = ["ALWAYS_TRAIN", "EXCLUDED", "HELD_OUT_FRACTION", "Split", "is_held_out", "stdlib_documents", "stdlib_files", "unit_of"]

Split = Literal["train", "held-out"]

HELD_OUT_FRACTION = 0.10
ALWAYS_TRAIN = frozenset({"test", "tests", "idlelib", "tkinter", "turtle", "turtledemo", "lib2to3", "distutils", "ensurepip", "venv"})
EXCLUDED = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"})
_MIN_HELD_OUT_BYTES = 200_000


def unit_of(path: PurePosixPath) -> str:
    """The unit that a file belongs to.

    Args:
        path: the file's path relative to the standard library, for example `json/decoder.py` or `test/test_json/__init__.py`.
    """
    parts = path.with_suffix("").parts
    if parts[0] in ("test", "tests") and len(parts) > 1:
        return parts[1].removeprefix("test_") if parts[1].startswith("test_") else parts[0]
    return parts[0]


def is_held_out(unit: str) -> bool:
    """Whether a unit's non-test files are held out from training."""
    if unit in ALWAYS_TRAIN:
        return False
    fraction = int.from_bytes(hashlib.sha256(unit.encode()).digest()[:4], "big") / 2**32
    return fraction < HELD_OUT_FRACTION


def stdlib_files(split: Split, root: Path | None = None) -> list[Path]:
    """The files of one split, sorted by their relative path.

    Tests of a held-out unit are in neither split: training on them would leak, and many installations lack them.

    Args:
        split: `train` or `held-out`.
        root: the standard library's folder; the running interpreter's when None.

    Raises:
        CorpusError: the interpreter has no library sources (some embedded and frozen builds ship only byte code).
    """
    base = root if root is not None else Path(sysconfig.get_paths()["stdlib"])
    chosen: list[tuple[str, Path]] = []
    for path in base.rglob("*.py"):
        relative = PurePosixPath(path.relative_to(base).as_posix())
        if EXCLUDED.intersection(relative.parts):
            continue
        held_out = is_held_out(unit_of(relative))
        is_test = relative.parts[0] in ("test", "tests")
        if (split == "held-out" and held_out and not is_test) or (split == "train" and not held_out):
            chosen.append((str(relative), path))
    files = [path for _, path in sorted(chosen)]
    if sum(path.stat().st_size for path in files) < _MIN_HELD_OUT_BYTES:
        raise CorpusError(
            f"the Python standard library at {base} has no source text to read ({len(files)} files)",
            "pass your own text with --text FILE, or use an interpreter that ships its sources",
        )
    return files


def stdlib_documents(split: Split, root: Path | None = None) -> list[tuple[str, str]]:
    """(relative path, text) of each file of one split, in the order of `stdlib_files`.

    Files that are not valid UTF-8 (a few tests of other encodings) are left out.
    """
    base = root if root is not None else Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in stdlib_files(split, base):
        try:
            documents.append((path.relative_to(base).as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return documents
