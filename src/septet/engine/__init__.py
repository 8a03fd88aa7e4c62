"""The native decode engine: models of the Llama family in C++ kernels, without torch and transformers.

`Engine.load(directory)` reads a septet directory; what it does not know raises UnsupportedModelError, and callers then go
through transformers. Tokens come from the `tokenizers` library, chat templates from jinja2; both are imported when needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from septet.engine.sampling import Sampling
from septet.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from septet.engine.engine import Engine

__all__ = ["Engine", "Sampling", "Tokenizer"]


def __getattr__(name: str) -> Any:
    # Without the native extension there is no Engine, but the sampler and the tokenizer serve transformers too.
    if name != "Engine":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from septet.engine.engine import Engine

    return Engine
