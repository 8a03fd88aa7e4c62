"""Calibration text from a file of any size: its hash in pieces, and so much of it as can be tokenized in memory."""

from __future__ import annotations

import codecs
import hashlib
from pathlib import Path

from septet.cli.eval import read_text
from septet.errors import OptionError

__all__ = ["hash_of_text", "read_spread"]

_READ_BYTES = 1 << 22
#: Tokenizers need 150 times the memory of their text.
_WHOLE_BYTES = 1 << 23
#: A token seldom has more bytes than this.
_BYTES_PER_TOKEN = 16
_STRETCH_BYTES = 1 << 16


def hash_of_text(path: Path) -> str:
    """The SHA-256 of a text file, as hexadecimal digits.

    Raises:
        OptionError: it is not there, or not UTF-8.
    """
    digest, decoder, done = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                start = done - len(decoder.getstate()[0])
                decoder.decode(block)
                digest.update(block)
                done += len(block)
            start = done - len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except OSError as error:
        raise OptionError("the text must be a readable file", f"{error.strerror}: {path}", "check the path") from error
    except UnicodeDecodeError as error:
        raise OptionError("the text must be UTF-8", f"{error.reason} at byte {start + error.start} of {path}", "convert it") from error
    return digest.hexdigest()


def read_spread(path: Path, tokens: int) -> str:
    """A text file, or of a large one stretches evenly spread over it, one after the other.

    Args:
        path: a file that `hash_of_text` has read.
        tokens: how many are wanted of it; what is returned has a lot more, unless the file has not.

    Raises:
        OptionError: it is not there, or not UTF-8.
    """
    most = max(_WHOLE_BYTES, _BYTES_PER_TOKEN * tokens)
    if not path.is_file() or path.stat().st_size <= most:
        return read_text(path)
    size, count, stretches = path.stat().st_size, most // _STRETCH_BYTES, []
    with path.open("rb") as file:
        for number in range(count):
            file.seek(number * (size - _STRETCH_BYTES) // (count - 1))
            stretches.append(_whole_characters(file.read(_STRETCH_BYTES)))
    return "".join(stretches)


def _whole_characters(stretch: bytes) -> str:
    """The text in some bytes of UTF-8, without the parts of characters at both ends."""
    first = next((at for at, byte in enumerate(stretch) if byte & 0xC0 != 0x80), len(stretch))
    return codecs.getincrementaldecoder("utf-8")().decode(stretch[first:])
