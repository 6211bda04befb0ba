"""Where the other runtimes are installed: folders of virtual environments that clones share.

    FEWBIT_ENVS/transformers/bin/python        with compressed-tensors, gptqmodel, bitsandbytes, TorchAO, gguf
    FEWBIT_ENVS/vllm/bin/python
    FEWBIT_ENVS/llamacpp/bin/python

Their requirements contradict each other and ours, so that none can live beside fewbit. `make runtimes` makes them; without FEWBIT_ENVS they
are in `~/.cache/fewbit/envs`.
"""

from __future__ import annotations

import os
from pathlib import Path

from fewbit.checkpoints.runtimes import Runtime

__all__ = ["environments_directory", "interpreter"]


def environments_directory() -> Path:
    """FEWBIT_ENVS, or the user's cache."""
    given = os.environ.get("FEWBIT_ENVS")
    return Path(given) if given else Path.home() / ".cache" / "fewbit" / "envs"


def interpreter(runtime: Runtime) -> Path | None:
    """The Python that has the runtime; None when it is not installed."""
    python = environments_directory() / runtime.environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return python if python.is_file() else None
