"""SeptetLinear and SeptetEmbedding: the product of the quantized weights, and parameters that survive whatever torch does to a module."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch

from septet.errors import CheckpointError, UnsupportedModelError
from septet.layer import SeptetEmbedding, SeptetLinear
from septet.quantize import dequantize, quantize_int8, quantize_split, quantize_trellis

QUANTIZERS = {
    "trellis": lambda weight: quantize_trellis([weight], ["x"])[0],
    "trellis-8": lambda weight: quantize_trellis([weight], ["x"], bits_per_pair=8)[0],
    "split": quantize_split,
    "split-symmetric-group": lambda weight: quantize_split(weight, symmetric=True, granularity="group", group_size=16),
    "split-tensor": lambda weight: quantize_split(weight, granularity="tensor"),
    "int8": lambda weight: quantize_int8(weight, "x"),
}


@pytest.fixture(params=QUANTIZERS)
def quantized(request: pytest.FixtureRequest, rng: np.random.Generator):
    """A matrix of an awkward size in every code."""
    return QUANTIZERS[request.param](rng.standard_normal((72, 36)).astype(np.float32))


@pytest.fixture
def layer(quantized) -> SeptetLinear:
    """The matrix as a layer with a bias."""
    return SeptetLinear.from_quantized(quantized, torch.nn.Parameter(torch.arange(72.0)))


@pytest.fixture
def x(rng: np.random.Generator) -> torch.Tensor:
    """Two sequences of three tokens."""
    return torch.from_numpy(rng.standard_normal((2, 3, 36)).astype(np.float32))


def test_forward_is_the_product_with_the_dequantized_weights(layer, quantized, x) -> None:
    weight = torch.from_numpy(dequantize(quantized))
    assert torch.allclose(layer.dequantize(), weight, rtol=1e-5, atol=1e-5)
    exact = x @ weight.T + torch.arange(72.0)
    layer.activations = "float"
    assert torch.allclose(layer(x), exact, rtol=1e-4, atol=1e-4)
    layer.activations = "int8"
    assert 0 < (layer(x) - exact).norm() / (exact - torch.arange(72.0)).norm() < 0.02


def test_parameters_are_the_arrays_of_the_checkpoint(layer, quantized) -> None:
    stored = {name: tensor.numpy() for name, tensor in layer.state_dict().items() if name != "bias"}
    assert stored.keys() == quantized.tensors().keys()
    for name, array in quantized.tensors().items():
        assert stored[name].dtype == array.dtype
        assert np.array_equal(stored[name], array)
        assert np.shares_memory(stored[name], array)
    assert not any(parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")


def test_dtype_changes_leave_the_stored_numbers_alone(layer, x) -> None:
    before = layer(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        assert layer.weight_scale.dtype == torch.float16
        assert layer.bias.dtype == dtype
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once_before_the_bias(layer, x, dtype) -> None:
    y = layer.to(dtype)(x.to(dtype))
    layer.bias = None
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.to(dtype).float()).to(dtype) + torch.arange(72.0).to(dtype))


def test_deepcopy_pickle_and_state_dict(layer, quantized, x) -> None:
    before = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    fresh = SeptetLinear(quantized.config(), bias=torch.nn.Parameter(torch.zeros(72)))
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False), fresh):
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(other(x), before)
    empty = SeptetLinear(quantized.config(), device="meta").to_empty(device="cpu")
    empty.load_state_dict({key: tensor for key, tensor in layer.state_dict().items() if key != "bias"})
    assert torch.equal(empty(x) + layer.bias, before)


def test_loading_other_weights_is_seen(layer, x) -> None:
    other = copy.deepcopy(layer)
    other.weight.copy_(other.weight.flip(0))
    other.weight_scale.mul_(2)
    assert not torch.equal(layer(x), other(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_compile_without_graph_break(layer, x) -> None:
    torch.compiler.reset()
    compiled = torch.compile(torch.nn.Sequential(layer, torch.nn.ReLU()), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), torch.relu(layer(x)))


def test_repr_names_the_code(layer) -> None:
    assert "in_features=36, out_features=72, bias=True, code=" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_answers_in_the_dtype_of_the_model(rng, dtype) -> None:
    weight = rng.standard_normal((50, 48)).astype(np.float32)
    quantized = quantize_int8(weight, "x")
    embedding = SeptetEmbedding.from_quantized(quantized).to(dtype)
    assert next(p.dtype for p in embedding.parameters() if p.is_floating_point()) == dtype
    indices = torch.tensor([[1, 49], [0, 1]])
    rows, exact = embedding(indices), torch.from_numpy(dequantize(quantized))[indices]
    assert rows.dtype == dtype
    assert (rows.float() - exact).abs().max() <= torch.finfo(dtype).eps * 4 * exact.abs().max()


def test_tied_head_and_embedding_hold_one_matrix(rng, x) -> None:
    quantized = quantize_int8(rng.standard_normal((50, 36)).astype(np.float32), "x")
    embedding = SeptetEmbedding.from_quantized(quantized)
    head = SeptetLinear(quantized.config(), device="meta")
    head.share(embedding)
    both = torch.nn.ModuleDict({"embedding": embedding, "head": head})
    alone = SeptetLinear.from_quantized(quantized)(x)
    for changed in (both, copy.deepcopy(both), both.to(torch.bfloat16)):
        assert changed["head"].weight is changed["embedding"].weight
        assert changed["head"].weight_input_scale is changed["embedding"].weight_input_scale
        assert torch.equal(changed["head"](x), alone)


def test_embedding_must_be_int8(rng) -> None:
    with pytest.raises(UnsupportedModelError, match="must have the code int8, got trellis"):
        SeptetEmbedding.from_quantized(quantize_trellis([rng.standard_normal((64, 16)).astype(np.float32)], ["x"])[0])


@pytest.mark.parametrize(
    "change",
    [
        {"code": "gzip"},
        {"bits_per_pair": 9},
        {"bits_per_pair": "7"},
        {"in_features": -4},
        {"out_features": 1 << 40},
        {"input_block": 3},
        {"input_block": 1 << 20},
        {"output_block": "4"},
    ],
)
def test_impossible_descriptions_are_errors(change, rng) -> None:
    entry = quantize_trellis([rng.standard_normal((64, 16)).astype(np.float32)], ["x"])[0].config()
    with pytest.raises(CheckpointError):
        SeptetLinear(entry | change, "layer")
