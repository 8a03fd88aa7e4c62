"""llama.cpp's types as recipes: its own library rounds each layer, with or without an importance matrix, and gguf reads it back.

Rows of types with blocks of 256 are padded with zeros to whole blocks, with no importance; bits are those of layers that need no padding.
That is kind to these types: a llama.cpp file of SmolLM2, whose layers have 576 inputs, holds larger types instead in most places.
The importance of an input is its mean square, as in llama.cpp's imatrix, but seen behind the already quantized blocks.

Needs the packages llama-cpp-python (0.3.x, for the shared library in it) and gguf.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

from septet.errors import OptionError

__all__ = ["TYPES", "is_available", "quantize_ggml"]

#: Types, and whether to try them with and without importance.
TYPES = {"Q4_K": (True, False), "IQ4_XS": (True,), "Q4_0": (True, False), "IQ3_S": (True,), "Q3_K": (True, False), "IQ3_XXS": (True,)}


def is_available() -> bool:
    """Whether both packages are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


@cache
def _library() -> ctypes.CDLL:
    """The shared library with ggml's quantizers.

    Raises:
        OptionError: a package is missing, or has no such library.
    """
    hint = "pip install llama-cpp-python gguf"
    if not is_available():
        raise OptionError("recipes of llama.cpp need llama-cpp-python and gguf", "an environment without them", hint)
    folder = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
    found = sorted(folder.glob("libggml-base.so")) + sorted(folder.glob("libggml-base.dylib"))
    if not found:
        raise OptionError("llama-cpp-python must hold libggml-base", f"none in its folder {folder.name}", hint)
    library = ctypes.CDLL(str(found[0]))
    floats = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library


def quantize_ggml(weight: np.ndarray, name: str, importance: np.ndarray | None) -> tuple[np.ndarray, float]:
    """Round a matrix to a type of llama.cpp.

    Args:
        weight: float32 [N, K].
        name: of the type, such as "Q4_K".
        importance: mean square of each input, [K]; None: without.

    Returns:
        (dequantized float32 [N, K], bits per weight of the type).
    """
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    outputs, inputs = weight.shape
    padding = -inputs % block
    source = np.ascontiguousarray(np.pad(weight, ((0, 0), (0, padding))), np.float32)
    packed = np.empty((outputs, source.shape[1] // block * block_bytes), np.uint8)
    weights = None
    if importance is not None:
        # Not quite zero: ggml divides by sums of importance over a block.
        weights = np.full(source.shape[1], 1e-6 * importance.mean(), np.float32)
        weights[:inputs] = np.maximum(importance, weights[0])
    library = _library()
    library.ggml_quantize_init(int(kind))
    address = None if weights is None else weights.ctypes.data
    library.ggml_quantize_chunk(int(kind), source, packed.ctypes.data, 0, outputs, source.shape[1], address)
    return gguf.quants.dequantize(packed, kind)[:, :inputs], 8 * block_bytes / block
