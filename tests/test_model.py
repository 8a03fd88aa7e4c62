"""The plan: which layers are quantized, which of them together; and swapping modules in any torch model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from septet.checkpoint import QuantizeOptions
from septet.errors import CheckpointError, UnsupportedModelError
from septet.layer import SeptetLinear
from septet.model import Runtime, install, plan, replace_modules, restore_modules, septet_modules
from septet.model.groups import group_key
from septet.quantize import quantize_int8, quantize_trellis


class Expert(nn.Module):
    """A gated expert with Mixtral's old names."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 96)


class Block(nn.Module):
    """Attention, a gated MLP, experts, a router too small to gain, and a subclass that may do more than a linear layer."""

    class Odd(nn.Linear):
        """Not exactly a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(64, 64) for _ in range(4))
        self.experts = nn.ModuleList(Expert() for _ in range(2))
        self.router = nn.Linear(64, 2)
        self.odd = self.Odd(64, 64)


class Toy(nn.Module):
    """A language model without transformers."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(80, 64)
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(64, 80, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        """What transformers calls the head."""
        return self.head


def planned(model: nn.Module, keep: tuple[str, ...] = (), **options) -> dict[str, str]:
    """Name -> group of the plan."""
    return {layer.name: layer.group for layer in plan(model, QuantizeOptions(**options), keep)}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.0.self_attn.q_proj", "a.0.self_attn/qkv"),
        ("a.0.self_attn.v_proj", "a.0.self_attn/qkv"),
        ("a.1.self_attn.k_proj", "a.1.self_attn/qkv"),
        ("bert.layer.0.attention.self.query", "bert.layer.0.attention.self/qkv"),
        ("a.mlp.gate_proj", "a.mlp/gate_up"),
        ("a.mlp.up_proj", "a.mlp/gate_up"),
        ("a.mlp.down_proj", "a.mlp.down_proj"),
        ("a.self_attn.o_proj", "a.self_attn.o_proj"),
        ("a.experts.0.w1", "a.experts/gate_up"),
        ("a.experts.17.w3", "a.experts/gate_up"),
        ("a.experts.17.w2", "a.experts/w2"),
        ("a.experts.17.mlp.up_proj", "a.experts/mlp/gate_up"),
        ("experts.3.down_proj", "experts/down_proj"),
        ("wi_0", "/gate_up"),
        ("lm_head", "lm_head"),
    ],
)
def test_group_keys(name, key) -> None:
    assert group_key(name) == key


def test_plan_of_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Toy()
    found = planned(model)
    assert list(found) == [
        *(f"blocks.0.{name}_proj" for name in "qkvo"),
        *(f"blocks.0.experts.{index}.{name}" for index, name in ((0, "w1"), (0, "w3"), (1, "w1"), (1, "w3"), (0, "w2"), (1, "w2"))),
        "head",
    ]
    assert len(set(found.values())) == 5
    assert found["blocks.0.experts.0.w1"] == found["blocks.0.experts.1.w3"]


def test_plan_of_the_head() -> None:
    for tied in (False, True):
        model = Toy(tied)
        head = {
            name: [layer for layer in plan(model, QuantizeOptions(head=name)) if layer.role == "head"]
            for name in ("int8", "trellis", "keep")
        }
        assert head["keep"] == []
        (trellis,), (int8,) = head["trellis"], head["int8"]
        assert (trellis.name, trellis.code, trellis.bits_per_pair) == ("head", "trellis", 8)
        assert trellis.source == ("embed" if tied else None)
        assert (int8.name, int8.kind, int8.tied_names) == (("embed", "embedding", ("head",)) if tied else ("head", "linear", ()))
        assert (int8.code, int8.shape) == ("int8", (80, 64))


def test_what_stays() -> None:
    names = planned(Toy(), keep=("o_proj", "blocks.0.experts.0"), head="keep").keys()
    assert not [name for name in names if name.endswith("o_proj") or ".experts.0." in name or name == "head"]
    assert "blocks.0.experts.1.w1" in names
    model = Toy()
    model._keep_in_fp32_modules = ["experts"]
    assert not [name for name in planned(model) if "experts" in name]


def test_nothing_to_quantize() -> None:
    with pytest.raises(UnsupportedModelError, match="must have layers that can be quantized, got none in LayerNorm"):
        plan(nn.LayerNorm(8), QuantizeOptions())


def test_install_and_restore() -> None:
    torch.manual_seed(0)
    model, x = Toy(tied=True), torch.randn(3, 64)
    dense, bias = model.blocks[0].q_proj, model.blocks[0].q_proj.bias
    weight = dense.weight.detach().clone()
    for layer in plan(model, QuantizeOptions()):
        matrix = model.get_submodule(layer.source or layer.name).weight.detach().numpy()
        quantized = quantize_int8(matrix, layer.name) if layer.code == "int8" else quantize_trellis([matrix], [layer.name])[0]
        install(model, layer, quantized, Runtime("float", "token", torch.float32))
    packed = model.blocks[0].q_proj
    assert isinstance(packed, SeptetLinear)
    assert packed.bias is bias
    assert model.head.weight is model.embed.weight
    assert len(dict(septet_modules(model))) == 12
    y = packed(x)
    restore_modules(model, torch.float32)
    assert model.blocks[0].q_proj is dense
    assert dense.bias is bias
    assert model.head.weight is model.embed.weight
    assert 0 < (dense.weight - weight).norm() / weight.norm() < 0.12
    assert torch.allclose(dense(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("blocks.0.q_proj", {"in_features": 60}, r"blocks.0.q_proj must have the shape \[64, 64\] that the model asks for"),
        ("blocks.0.nowhere", {}, "layers of config.json must be modules of the model, got 'blocks.0.nowhere'"),
        ("", {}, "layers of config.json must be modules of the model"),
        ("blocks.0.odd", {}, "blocks.0.odd must be a linear layer or an embedding, got Odd"),
        ("blocks", {}, "blocks must be a linear layer or an embedding, got ModuleList"),
        ("blocks.0.q_proj", {"tied": 3}, "tied of blocks.0.q_proj must list module names"),
    ],
)
def test_tables_that_do_not_fit(name, change, match) -> None:
    entry = {"code": "trellis", "bits_per_pair": 7, "in_features": 64, "out_features": 64} | change
    with pytest.raises(CheckpointError, match=match):
        replace_modules(Toy(), {name: entry}, Runtime())
