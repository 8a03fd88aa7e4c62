"""What calibration keeps on disk for an interrupted run: it comes back as it was, and damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from septet.calibration import Sensitivity
from septet.calibration.kept import load_array, save_array
from septet.errors import CheckpointError


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "kept.npy"
    save_array(file, np.arange(1000))
    content = file.read_bytes()
    assert np.array_equal(load_array(file), np.arange(1000))
    bracket, digits, minus = content.replace(b"}", b"("), content.replace(b"1000", b"0999"), content.replace(b"(1000,)", b"-" * 7)
    larger = content.replace(b"(1000,)", b"(1<<9,)"), content.replace(b"1000,", b"10**9"), content.replace(b"1000,", b"-100,")
    for damaged in (b"", content[:70], content[:-1], bracket, digits, minus, *larger):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="kept.npy must hold an array, got .*; delete .* and run the same command with --resume"):
            load_array(file)


@pytest.mark.parametrize("size", [1, 7, 512, 1200])
def test_a_symmetric_matrix_comes_back_from_disk_as_it_was(size: int, tmp_path: Path) -> None:
    half = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    matrix = half + half.T
    kept = Sensitivity(tmp_path)
    kept.put({"g": matrix}, {"l": half[None]})
    kept.settle()
    assert np.array_equal(kept.inputs("g"), matrix)
    assert np.array_equal(Sensitivity(tmp_path).inputs("g"), matrix) and np.array_equal(Sensitivity(tmp_path).outputs("l"), half[None])
    for file in tmp_path.glob("*.npy"):
        save_array(file, load_array(file).reshape(-1)[:-1])
    with pytest.raises(CheckpointError, match="must hold a symmetric matrix, got .*; delete .* and run the same command with --resume"):
        Sensitivity(tmp_path).inputs("g")


@pytest.mark.parametrize("beside", [False, True])
def test_the_mark_comes_after_everything_and_a_failure_is_told(tmp_path: Path, beside: bool) -> None:
    kept, mark = Sensitivity(tmp_path, beside), tmp_path / "complete.npy"
    kept.put({"g": np.eye(3, dtype=np.float32)}, {})
    kept.seal(mark)
    kept.settle()
    assert mark.is_file() and np.array_equal(kept.inputs("g"), np.eye(3))
    kept = Sensitivity(tmp_path / "nowhere", beside)
    with pytest.raises(FileNotFoundError):
        kept.put({"g": np.eye(3, dtype=np.float32)}, {})
        kept.settle()


@pytest.mark.parametrize("beside", [False, True])
def test_what_is_read_ahead_is_what_is_there(tmp_path: Path, beside: bool) -> None:
    kept = Sensitivity(tmp_path, beside)
    kept.put({"g": np.eye(3, dtype=np.float32)}, {"l": np.ones((1, 2, 2), np.float32)})
    kept.settle()
    kept.read_ahead("g", ["l", "another"])
    assert np.array_equal(kept.inputs("g"), np.eye(3)) and np.array_equal(kept.outputs("l"), np.ones((1, 2, 2)))
    assert kept.outputs("another") is None
