"""Checkpoints on disk: make one from a Hugging Face directory, look into one, and find out whether it is intact.

`septet.checkpoint.stream` quantizes; `verify` and `inspect` need NumPy only.
"""

from septet.checkpoint.inspection import inspect
from septet.checkpoint.integrity import check_crc32, crc32_text
from septet.checkpoint.options import FORMAT_VERSION, QuantizeOptions
from septet.checkpoint.verification import VerifyReport, verify

__all__ = ["FORMAT_VERSION", "QuantizeOptions", "VerifyReport", "check_crc32", "crc32_text", "inspect", "verify"]
