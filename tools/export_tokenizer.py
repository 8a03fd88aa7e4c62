"""Write the small tokenizer file that `septet-fortran` reads, from a model's tokenizer.json.

    python tools/export_tokenizer.py MODEL [FILE]      # FILE is MODEL/tokenizer.septok unless given

Byte-level BPE only, as GPT-2, LLaMA 3, SmolLM2 and many others have it. The file holds, as little-endian int32 after the eight
bytes "septtok1": the number of tokens, the number of merges, whether each digit stands alone, the token of each byte (-1: none); four
numbers per merge (left, right, result, rank; ascending by left, then right); the length of each token; and at the end all tokens' bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

MAGIC = b"septtok1"


def byte_characters() -> list[str]:
    """The character that stands for each byte: printable ones for themselves, the others for 256, 257, ... in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def pre_tokenizers(tokenizer: dict) -> list[dict]:
    """The steps that cut a text into words."""
    step = tokenizer["pre_tokenizer"] or {}
    return step["pretokenizers"] if step.get("type") == "Sequence" else [step]


def tokenizer_file(tokenizer: dict) -> bytes:
    """The bytes of the file.

    Args:
        tokenizer: the content of a tokenizer.json.

    Returns:
        What the module's docstring describes.

    Raises:
        SystemExit: the tokenizer is of another kind.
    """
    steps = {step.get("type"): step for step in pre_tokenizers(tokenizer)}
    if tokenizer["model"]["type"] != "BPE" or "ByteLevel" not in steps or set(steps) > {"ByteLevel", "Digits"}:
        sys.exit(f"error: a tokenizer must be byte-level BPE, got {tokenizer['model']['type']} with {', '.join(map(str, steps))}")
    characters = byte_characters()
    byte_of = {character: byte for byte, character in enumerate(characters)}
    vocabulary = tokenizer["model"]["vocab"]
    added = {entry["id"]: entry["content"].encode() for entry in tokenizer["added_tokens"]}
    count = max([*vocabulary.values(), *added]) + 1
    pieces = [b""] * count
    for text, token in vocabulary.items():
        pieces[token] = bytes(byte_of[character] for character in text) if token not in added else added[token]
    merges = []
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((vocabulary[left], vocabulary[right], vocabulary[left + right], rank))
    digits = int(steps.get("Digits", {}).get("individual_digits", False))
    numbers = [count, len(merges), digits, *(vocabulary.get(character, -1) for character in characters)]
    numbers += [number for merge in sorted(merges) for number in merge]
    numbers += [len(piece) for piece in pieces]
    return MAGIC + np.array(numbers, "<i4").tobytes() + b"".join(pieces)


def main() -> int:
    parser = argparse.ArgumentParser(description="write the tokenizer file of septet-fortran")
    parser.add_argument("model", type=Path, help="directory with a tokenizer.json")
    parser.add_argument("file", type=Path, nargs="?", help="MODEL/tokenizer.septok unless given")
    arguments = parser.parse_args()
    target = arguments.file or arguments.model / "tokenizer.septok"
    target.write_bytes(tokenizer_file(json.loads((arguments.model / "tokenizer.json").read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
