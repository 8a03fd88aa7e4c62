"""What benchmarks/exl3.py does without exllamav3: widened models compute the same, and bits are counted with and without padding."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from small_models import load, save

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import exl3


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_a_widened_model_computes_the_same(family: str, tmp_path: Path) -> None:
    narrow = save(family, tmp_path / "narrow")
    wide = exl3.widened(narrow, tmp_path / "wide")
    tokens = torch.randint(0, 260, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (load(family, place)(tokens).logits for place in (narrow, wide))
    assert load(family, wide).config.hidden_size == 128
    # Sums of 128 numbers instead of 64 are added in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_wide_enough_stays_where_it_is(tmp_path: Path) -> None:
    wide = exl3.widened(save("llama", tmp_path / "narrow"), tmp_path / "wide")
    assert exl3.widened(wide, tmp_path / "wider") == wide
    assert not (tmp_path / "wider").exists()


def test_bits_of_exl3_are_counted_with_and_without_padding(tmp_path: Path) -> None:
    # A layer of 192 x 576 at 3.5 bits, padded to 256 x 640: 56 words of 16 bits for each tile of 16 x 16.
    layer = {
        "trellis": torch.zeros((40, 16, 56), dtype=torch.int16),
        "suh": torch.zeros(640, dtype=torch.float16),
        "svh": torch.zeros(256, dtype=torch.float16),
    }
    tensors = {f"block.k_proj.{part}": tensor for part, tensor in layer.items()} | {"norm.weight": torch.ones(576)}
    save_file(tensors, tmp_path / "a.safetensors")
    needed, stored = exl3.exl3_bits(tmp_path, {"block.k_proj": (192, 576)})
    assert needed == pytest.approx(3.5 + 16 * (192 + 576) / (192 * 576))
    assert stored == pytest.approx((3.5 * 256 * 640 + 16 * (256 + 640)) / (192 * 576))
