"""Triton's interpreter beside any NumPy: imported in processes that run with TRITON_INTERPRET=1, before the first kernel.

Where a kernel loops to a number that it is given, the interpreter of Triton 3.6 and before takes int() of an array with one element.
NumPy 2.4 and later refuse that.
"""

from __future__ import annotations

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_its_index(tensor: type, *scope: object) -> None:
    _patch_tensor(tensor, *scope)
    # the scope has noted what to put back
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_and_its_index
