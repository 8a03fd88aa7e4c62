"""`septet bench`: rows with the promised figures, contenders that take turns, and errors that say who failed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from command import assert_error, quantized, septet, septet_json  # noqa: F401
from septet.bench.kernels import KernelCase, measure_kernels
from septet.bench.models import Contender, worker_environment
from septet.kernels import select_backend
from variants import variants

# ruff: noqa: F811 (fixtures are imported names)

KERNEL_ROW = {"name", "code", "backend", "k", "n", "tokens", "threads", "gweight_per_s", "gb_per_s", "bandwidth_fraction"}
MODEL_ROW = {"model", "engine", "type", "threads", "prefill_tok_per_s", "decode_tok_per_s", "peak_rss_mb"}


def test_kernel_rows() -> None:
    options = ["--sizes", "130x70,64x128", "--codes", "trellis,split,int8", "--tokens", "1,3", "--threads", "1", "--rounds", 2]
    rows = septet_json("bench", "kernels", *options)["rows"]
    assert len(rows) == 2 * 2 * (3 + 1 + 2)
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
        (build, name) for build in builds for name in ("product", "layer", "arranged") if name != "arranged" or "native" in build
    ]
    for row in rows:
        assert KERNEL_ROW <= row.keys() and row["of_first"] > 0 and row["threads"] == 1
        assert row["of_first"] == 1 or row["backend"] != builds[0]
    assert select_backend("native").instruction_set() == before


def _padding(row: dict) -> float:
    return -(-row["k"] // 4) * 4 * -(-row["n"] // 64) * 64 / (row["k"] * row["n"])


def test_model_rows(quantized: dict[str, Path]) -> None:
    options = ["--prefill", 20, "--decode", 3, "--rounds", 2, "--threads", "1"]
    rows = septet_json("bench", "model", quantized["trellis"], *options)["rows"]
    assert [row["engine"] for row in rows] == ["native", "transformers"]
    for row in rows:
        assert MODEL_ROW <= row.keys() and row["type"].startswith("trellis 3.5") and row["threads"] == 1
        assert row["prefill_tok_per_s"] > 0 and row["decode_tok_per_s"] > 0 and row["peak_rss_mb"] > 20
    assert rows[0]["peak_rss_mb"] < rows[1]["peak_rss_mb"] / 2


def test_llama_cpp_gets_files_of_the_same_sizes(quantized: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without running it, which is a matter of the library that happens to be installed."""
    asked: list[list[tuple[str, str, int]]] = []

    def measure(contenders: list, *others: object) -> list[dict]:
        assert all(contender.model.exists() for contender in contenders)
        asked.append([(contender.engine, contender.model.name, contender.threads) for contender in contenders])
        return [dict.fromkeys(MODEL_ROW | {"prefill_spread", "decode_spread", "load_seconds"}, 1.0)]

    monkeypatch.setattr("septet.bench.models.measure_models", measure)
    own = tmp_path / "own.gguf"
    own.touch()
    options = ["--engines", "native", "--against", "llama.cpp", "--against", own, "--types", "Q4_0,Q8_0", "--threads", "1,2"]
    folder, name = tmp_path / "kept" / "files", quantized["trellis"].name
    septet_json("bench", "model", quantized["trellis"], *options, "--gguf-folder", folder)
    made = [f"{name}-Q4_0-mix.gguf", f"{name}-Q8_0-mix.gguf"]
    files = [("llama.cpp", file, 1) for file in [*made, "own.gguf"]]
    assert asked[0][:4] == [("native", name, 1), *files] and [threads for *_, threads in asked[0]] == [1] * 4 + [2] * 4
    assert sorted(path.name for path in folder.iterdir()) == made
    septet_json("bench", "model", quantized["trellis"], *options)
    assert asked[1] == asked[0]
    assert_error(septet("bench", "model", quantized["trellis"], *options, "--types", "Q9"), "a type must be one of")


@pytest.mark.parametrize(("engine", "waits"), [("llama.cpp", None), ("native", None), ("transformers", "PASSIVE")])
def test_openmp_waits_as_each_engine_is_fastest(engine: str, waits: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command septet sets the variable for torch; llama.cpp with threads that sleep at once is no contender."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("OTHER", "stays")
    variables = worker_environment(Contender(Path("model"), engine, 2))
    assert variables.get("OMP_WAIT_POLICY") == waits
    assert variables["OMP_NUM_THREADS"] == "2" and variables["OTHER"] == "stays"


def test_rows_go_to_a_csv_file_with_their_origin(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    options = ["--sizes", "64x64", "--codes", "int8", "--threads", "1", "--rounds", 1, "--csv", path]
    rows = [row for _ in range(2) for row in septet_json("bench", "kernels", *options)["rows"]]
    with path.open(newline="") as file:
        stored = list(csv.DictReader(file))
    assert len(stored) == len(rows) == 4
    for row, kept in zip(rows, stored):
        assert kept.keys() == row.keys() | {"machine", "instruction_set", "versions", "commit", "command"}
        assert kept["name"] == row["name"] and float(kept["gweight_per_s"]) == pytest.approx(row["gweight_per_s"], rel=1e-4)
        assert kept["command"].split()[0] == "septet" and "septet " in kept["versions"] and kept["machine"]
    path.write_text("other,columns\n")
    assert_error(septet("bench", "kernels", *options), "must have the columns")
    assert_error(septet("bench", "kernels", *options[:-1], tmp_path), "must be writable")


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
