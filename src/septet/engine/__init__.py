"""The native decode engine: models of the Llama family in C++ kernels, without torch and transformers.

`Engine.load(directory)` reads a septet directory; what it does not know raises UnsupportedModelError, and callers then go
through transformers. Tokens come from the `tokenizers` library, chat templates from jinja2; both are imported when needed.
"""

from septet.engine.engine import Engine
from septet.engine.sampling import Sampling
from septet.engine.tokenizer import Tokenizer

__all__ = ["Engine", "Sampling", "Tokenizer"]
