"""Tell transformers about fewbit's layout when both are imported, in whatever order, without importing either for the other's sake.

transformers has no entry points for quantizers, it has a registry in `transformers.quantizers.auto`. `import fewbit` must not wait for
transformers (seconds), so a finder at the front of `sys.meta_path` waits for that one module and registers the quantizer behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["install"]

_MODULE = "transformers.quantizers.auto"


def install() -> None:
    """Register now where transformers' registry is imported already, else when it is. Calling it again changes nothing."""
    if _MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from fewbit.runtime.transformers_quantizer import register

    register()


class _Finder(MetaPathFinder):
    """Finds the one module through the other finders, and gives it a loader that registers afterwards."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Another loader, and the registration behind it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
