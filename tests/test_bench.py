"""`septet bench`: rows with the promised figures, contenders that take turns, and errors that say who failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import assert_error, quantized, septet, septet_json  # noqa: F401
from septet.kernels import select_backend
from variants import variants

pytest.importorskip("septet.kernels.native", reason="needs the native extension; make test builds it and SEPTET_EXPECT_BACKENDS demands it")
from septet.bench.kernels import KernelCase, measure_kernels

# ruff: noqa: F811 (fixtures are imported names)

KERNEL_ROW = {"name", "code", "backend", "k", "n", "tokens", "threads", "gweight_per_s", "gb_per_s", "bandwidth_fraction"}
MODEL_ROW = {"model", "engine", "type", "threads", "prefill_tok_per_s", "decode_tok_per_s", "peak_rss_mb"}


def test_kernel_rows() -> None:
    options = ["--sizes", "130x70,64x128", "--codes", "trellis,split,int8", "--tokens", "1,3", "--threads", "1", "--rounds", 2]
    rows = septet_json("bench", "kernels", *options)["rows"]
    assert len(rows) == 2 * 2 * (2 + 1 + 2)
    assert {row["code"] for row in rows} == {"trellis", "split", "int8"} and {row["tokens"] for row in rows} == {1, 3}
    for row in rows:
        assert KERNEL_ROW <= row.keys() and row["gweight_per_s"] > 0 and row["bandwidth_fraction"] > 0
        bits = 8 * row["gb_per_s"] / row["gweight_per_s"]
        # Both rates come from the same times, so what remains is the stored size: 3.5 or 8 bits, and padding to whole tiles.
        assert bits == pytest.approx(8 if row["code"] == "int8" else 3.5 * _padding(row))
    assert "gweight/s" in septet("bench", "kernels", *options).stdout


def test_builds_take_turns() -> None:
    """The same rows for every build that works here, and the choice of a build does not outlast the measurement."""
    builds = [f"{backend}-{variant}" for backend in ("native", "fortran") for variant in variants(backend)]
    before = select_backend("native").instruction_set()
    rows = measure_kernels([KernelCase("split", 64, 65), KernelCase("trellis", 66, 64, tokens=2)], rounds=3, builds=builds)
    assert [row["backend"] for row in rows if row["code"] == "split"] == builds
    assert [(row["backend"], row["name"]) for row in rows if row["code"] == "trellis"] == [
        (build, name) for build in builds for name in ("product", "layer")
    ]
    for row in rows:
        assert KERNEL_ROW <= row.keys() and row["of_first"] > 0 and row["threads"] == 1
        assert row["of_first"] == 1 or row["backend"] != builds[0]
    assert select_backend("native").instruction_set() == before


def _padding(row: dict) -> float:
    return -(-row["k"] // 4) * 4 * -(-row["n"] // 64) * 64 / (row["k"] * row["n"])


def test_model_rows(quantized: dict[str, Path]) -> None:
    pytest.importorskip("transformers", reason="needs the extra septet[hf]; make test installs it")
    options = ["--prefill", 20, "--decode", 3, "--rounds", 2, "--threads", "1"]
    rows = septet_json("bench", "model", quantized["trellis"], *options)["rows"]
    assert [row["engine"] for row in rows] == ["native", "transformers"]
    for row in rows:
        assert MODEL_ROW <= row.keys() and row["type"].startswith("trellis 3.5") and row["threads"] == 1
        assert row["prefill_tok_per_s"] > 0 and row["decode_tok_per_s"] > 0 and row["peak_rss_mb"] > 20
    assert rows[0]["peak_rss_mb"] < rows[1]["peak_rss_mb"] / 2


def test_what_bench_refuses(tmp_path: Path) -> None:
    assert_error(septet("bench", "kernels", "--sizes", "8192"), "inputs x outputs")
    assert_error(septet("bench", "kernels", "--codes", "morse"), "a code must be one of")
    assert_error(septet("bench", "kernels", "--sizes", "64x64", "--rounds", 0), "rounds")
    assert_error(septet("bench", "kernels", "--sizes", "64x64", "--backends", "cobol"), "a backend must be one of")
    assert_error(septet("bench", "kernels", "--sizes", "64x64", "--backends", "native-mmx"), "native-mmx (unknown name)")
    assert_error(septet("bench", "kernels", "--threads", "many"), "numbers separated by commas")
    assert_error(septet("bench", "model", tmp_path, "--engines", "steam"), "an engine must be one of")
    assert_error(septet("bench", "model", tmp_path, "--engines", "native", "--decode", 0), "decode")
    assert_error(septet("bench", "model", tmp_path / "none", "--engines", "native"), "native must be able to run", "none")
