"""septet: language model weights in 3.5 bits.

Importing this package is cheap: it loads neither NumPy nor torch. Import the modules you need; ARCHITECTURE.md says what is where.
"""

from septet import _import_hook

__all__ = ["__version__"]

__version__ = "0.1.0.dev0"

_import_hook.install()
