"""Calibration text: hashed in pieces, and a large file is not read whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from septet.cli import texts
from septet.errors import OptionError

WORDS = "Zwölf Boxkämpfer jagen 鯨 über den großen Sylter Deich.\n"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are large from 1000 bytes on, and are read 7 and 100 bytes at a time."""
    for name, value in (("_READ_BYTES", 7), ("_WHOLE_BYTES", 1000), ("_STRETCH_BYTES", 100)):
        monkeypatch.setattr(texts, name, value)


@pytest.mark.usefixtures("small_pieces")
def test_the_hash_is_that_of_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "text"
    for content in (b"", WORDS.encode() * 9):
        file.write_bytes(content)
        assert texts.hash_of_text(file) == hashlib.sha256(content).hexdigest()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("position", [0, 6, 7, 13, 50, 140])
def test_what_is_no_text_is_refused_by_its_byte(position: int, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a" * position + b"\xff" + b"b" * 20)
    with pytest.raises(OptionError, match=f"at byte {position} of"):
        texts.hash_of_text(tmp_path / "text")
    (tmp_path / "text").write_bytes(b"a" * position + "鯨".encode()[:2])
    with pytest.raises(OptionError, match=f"at byte {position} of"):
        texts.hash_of_text(tmp_path / "text")


@pytest.mark.usefixtures("small_pieces")
def test_a_file_is_whole_up_to_a_size(tmp_path: Path) -> None:
    whole, large = WORDS * 16, "".join(f"{number:05} {WORDS}" for number in range(500))
    (tmp_path / "whole").write_text(whole, encoding="utf-8")
    (tmp_path / "large").write_text(large, encoding="utf-8")
    assert texts.read_spread(tmp_path / "whole", 1) == whole
    assert texts.read_spread(tmp_path / "large", len(large.encode()) // 16 + 1) == large
    found = texts.read_spread(tmp_path / "large", 1)
    assert 900 < len(found.encode()) <= 1000
    assert found[:80] == large[:80] and found[-80:] == large[-80:]
    numbers = [int(word) for word in found.split() if word.isdecimal() and len(word) == 5]
    assert numbers == sorted(numbers) and len(numbers) >= 9
    assert max(after - before for before, after in zip(numbers, numbers[1:])) < 120


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    for read in (texts.hash_of_text, lambda path: texts.read_spread(path, 1)):
        with pytest.raises(OptionError, match="the text must be a readable file, got No such file"):
            read(tmp_path / "none")


def test_calibration_reads_a_part_of_a_large_text(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from septet import loading
    from septet.cli.calibration import _read

    file = tmp_path / "large"
    file.write_text(WORDS * 4000, encoding="utf-8")
    monkeypatch.setattr(texts, "_WHOLE_BYTES", 1 << 17)
    monkeypatch.setattr(texts, "read_text", None)
    windows = _read(str(file), loading.load_model(tiny_model_dir), (4, 64))
    assert windows.shape == (4, 64) and len({tuple(window) for window in windows.tolist()}) == 4
