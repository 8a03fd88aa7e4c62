"""docs/quality.md and its plot are what their result files say; results of different texts never stand side by side."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import draw_quality  # noqa: E402
import quality_plot  # noqa: E402


def result(name: str, bits: float = 3.5, loss: float = 0.1, order: float = 0, family: str = "split", **others: object) -> dict:
    """A result file's content."""
    protocol = {"model": "small", "text": {"file": "a.txt", "bytes": [0, 9], "sha256": ""}, "context": 8, "score": "half"}
    described = {"schema": 1, "name": name, "title": f"title of {name}", "family": family, "tables": ["comparison"], "order": order}
    measured = {"protocol": protocol, "activations": "float", "effective_bits": bits, "tokens": 1234, "windows": 3}
    divergence = {"kld_mean": loss, "kld_stderr": loss / 20, "kld_p99": 5 * loss, "top1_agreement": 0.875}
    perplexity = {"perplexity": 21.5, "perplexity_stderr": 0.5, "reference_perplexity": 20.0}
    return described | measured | divergence | perplexity | {"seconds": {"quantize": None, "evaluate": 1.0}} | others


def test_documents_are_what_the_results_say() -> None:
    outcome = subprocess.run([sys.executable, ROOT / "tools" / "draw_quality.py", "--check"], check=False)
    assert outcome.returncode == 0, "run: python tools/draw_quality.py"


def test_a_row_has_the_figures_of_its_file() -> None:
    drawn = draw_quality.redraw("a\n<!-- results: comparison -->\nold\n<!-- end of results -->\nb\n", [result("x", 3.59375, 0.123)])
    assert drawn.startswith("a\n<!-- results: comparison -->\n| recipe |") and drawn.endswith("<!-- end of results -->\nb\n")
    assert "| title of x | 3.594 | 0.1230 ± 0.0062 | 0.61 | 87.5 | 21.50 ± 0.50 | float |  |" in drawn and "old" not in drawn
    assert "small; a.txt, bytes 0 to 9: 3 windows of 8 tokens, 1,234 tokens scored; perplexity of the reference 20.00." in drawn
    assert "No results yet." in draw_quality.redraw("<!-- results: ladder -->\n<!-- end of results -->", [result("x")])


def test_rows_have_their_order() -> None:
    results = [result("a", 4.0, 0.2, 1), result("b", 4.001, 0.1, 3), result("c", 3.0, 0.3, 2)]
    assert [one["name"] for one in draw_quality.rows_of(results, "comparison")] == ["c", "b", "a"]
    ladder = [one | {"tables": ["ladder"]} for one in results]
    assert [one["name"] for one in draw_quality.rows_of(ladder, "ladder")] == ["a", "c", "b"]
    assert draw_quality.rows_of(results, "ladder") == []


def test_results_of_different_texts_are_refused(tmp_path: Path) -> None:
    other = result("b") | {"protocol": {"model": "small", "text": {}, "context": 16, "score": "half"}}
    with pytest.raises(ValueError, match="one protocol, got 2 in a, b"):
        draw_quality.rows_of([result("a"), other], "comparison")
    lacking = result("c")
    del lacking["kld_p99"]
    (tmp_path / "c.json").write_text(json.dumps(lacking))
    with pytest.raises(ValueError, match="c.json .* kld_p99"):
        draw_quality.load_results(tmp_path)


def test_plot_is_valid_and_shows_every_result() -> None:
    results = [result(f"r{i}", 3 + i / 4, 0.5 / (i + 1), family=family) for i, family in enumerate(quality_plot.FAMILIES)]
    drawn = quality_plot.draw_plot([*results, result("wide", 8.0)])
    tree = xml.etree.ElementTree.fromstring(drawn)
    titles = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert [title.split(":")[0] for title in titles] == [one["title"] for one in results if one["effective_bits"] <= 5]
    places = [float(element.get("cx")) for element in tree.iter("{http://www.w3.org/2000/svg}circle") if float(element.get("cx")) < 560]
    assert places == sorted(places) and all(70 < place < 580 for place in places)
    assert drawn == quality_plot.draw_plot([*results, result("wide", 8.0)])
    assert xml.etree.ElementTree.fromstring(quality_plot.draw_plot([])) is not None


def benchmark(monkeypatch: pytest.MonkeyPatch, model: Path, out: Path, *words: object) -> int:
    """Run benchmarks/quality.py on a small model, in this process; returns its exit status."""
    import quality

    sizes = [
        "--context",
        "32",
        "--calibration-tokens",
        "128",
        "--calibration-bytes",
        "0:4000",
        "--text-bytes",
        "254100:256000",
        "--out",
        out,
    ]
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, [model, *sizes, *words])])
    return quality.main()


def test_benchmark_judges_recipes_and_stored_models(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    names = ("int8", "gptq-4", "awq-4", "split-feedback")
    assert benchmark(monkeypatch, tiny_model_dir, tmp_path, *[word for name in names for word in ("--recipe", name)]) == 0
    results = {one["name"]: one for one in draw_quality.load_results(tmp_path)}
    assert results.keys() == set(names) and draw_quality.rows_of(list(results.values()), "comparison")
    assert 0 < results["int8"]["kld_mean"] < 0.1 * min(one["kld_mean"] for name, one in results.items() if name != "int8")
    assert 4.2 < results["gptq-4"]["effective_bits"] < 4.4 and results["split-feedback"]["calibration"]["tokens"] == 128
    before = (tmp_path / "int8.json").read_bytes()
    assert str(tmp_path).encode() not in before
    assert benchmark(monkeypatch, tiny_model_dir, tmp_path, "--recipe", "int8") == 0
    assert "already there" in capsys.readouterr().out and (tmp_path / "int8.json").read_bytes() == before
    assert benchmark(monkeypatch, tiny_model_dir, tmp_path, "--recipe", "int8", "--text-bytes", "254100:255500") == 1
    assert "one protocol" in capsys.readouterr().err
    stored = ["--judge", tiny_model_dir, "--name", "itself", "--table", "ladder", "--suffix=-again"]
    assert benchmark(monkeypatch, tiny_model_dir, tmp_path, *stored) == 0
    found = json.loads((tmp_path / "itself-again.json").read_text())
    assert found["kld_mean"] == 0 and found["tables"] == ["ladder"] and found["top1_agreement"] == 1


def test_remembered_reference_gives_the_same_logits(tiny_model_dir: Path) -> None:
    import torch
    from quality_judge import RememberedReference

    from septet.loading import load_model

    model = load_model(tiny_model_dir, torch.float32)
    remembered = RememberedReference(model)
    with torch.inference_mode():
        for seed in (0, 1, 0):
            tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(seed))
            expected = model(input_ids=tokens, use_cache=False, logits_to_keep=21).logits
            assert torch.equal(remembered(input_ids=tokens, use_cache=False, logits_to_keep=21).logits, expected)
    assert len(remembered._kept) == 2
