"""What importing septet registers with other libraries; `install` must stay cheap and must not import them."""

from __future__ import annotations

__all__ = ["install"]


def install() -> None:
    """Register septet's import hooks; there are none without an integration."""
