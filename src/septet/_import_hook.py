"""Registers septet with transformers, whichever of the two is imported first, without importing transformers or torch itself.

transformers asks only its own tables which quantizers exist, and has no entry points. So `import septet` puts a finder in front of
`sys.meta_path` that waits for the module with these tables, `transformers.quantizers.auto`, and imports our quantizer right after it.
If the tables exist already, the quantizer is imported at once. Without torch nothing happens: transformers loads no models then.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install"]

_AWAITED = "transformers.quantizers.auto"
_REGISTERS = "septet.integrations.huggingface"


def install() -> None:
    """Make sure that transformers knows septet from now on; calling it again changes nothing."""
    if hasattr(sys.modules.get(_AWAITED), "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    if importlib.util.find_spec("torch") is not None:
        importlib.import_module(_REGISTERS)


class _Finder:
    """Finds nothing itself; wraps the loader of the awaited module, whoever finds that."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of the awaited module with our loader in it; None for all other modules."""
        if name != _AWAITED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Loads with another loader, then registers."""

    def __init__(self, original: object) -> None:
        self._original = original

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the original loader does."""
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module and give it its own loader back, so that nobody meets ours later."""
        module.__spec__.loader = module.__loader__ = self._original
        self._original.exec_module(module)
        _register()
