"""Every error septet raises on purpose, in one tree.

    SeptetError                      base class; has .requirement, .got and .hint
    ├── ShapeError                   (ValueError) an array has the wrong shape or dtype
    ├── CodeRangeError               (ValueError) a number does not fit its field or code
    ├── SpecVersionError             a checkpoint follows a version of SPEC.md this septet cannot read
    ├── CheckpointError              (ValueError) a checkpoint is damaged, incomplete or inconsistent
    ├── UnsupportedModelError        a model has no layers, or layers of a kind, that septet can handle
    ├── BackendUnavailableError      (RuntimeError) a kernel backend or instruction set cannot be used here
    └── OptionError                  (ValueError) an argument, option or environment variable has an unknown value

A message has three parts: what must hold, what came, what to do.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "CodeRangeError",
    "OptionError",
    "SeptetError",
    "ShapeError",
    "SpecVersionError",
    "UnsupportedModelError",
]


class SeptetError(Exception):
    """Base of all errors of septet.

    Args:
        requirement: what must hold, a clause without a full stop.
        got: what came instead; anything with a readable str().
        hint: what the reader can do about it.
    """

    def __init__(self, requirement: str, got: object, hint: str) -> None:
        super().__init__(requirement, got, hint)
        self.requirement = requirement
        self.got = got
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.requirement}, got {self.got}; {self.hint}"


class ShapeError(SeptetError, ValueError):
    """An array has the wrong shape or dtype."""


class CodeRangeError(SeptetError, ValueError):
    """A number does not fit its field or code."""


class SpecVersionError(SeptetError):
    """A checkpoint follows a version of SPEC.md that this septet cannot read."""


class CheckpointError(SeptetError, ValueError):
    """A checkpoint is damaged, incomplete or contradicts itself."""


class UnsupportedModelError(SeptetError):
    """A model has no layers, or layers of a kind, that septet can handle."""


class BackendUnavailableError(SeptetError, RuntimeError):
    """A kernel backend or an instruction set cannot be used on this machine."""


class OptionError(SeptetError, ValueError):
    """An argument, option or environment variable has an unknown value."""
