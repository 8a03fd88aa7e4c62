"""The torch operators: equal to the backend, honest to torch.compile, and never fooled by a weight that changed."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from layers import int8_layer, split_layer, trellis_layer
from septet import operators
from septet.errors import CodeRangeError, OptionError, ShapeError
from septet.kernels import LayerWeights, reference, select_backend
from septet.operators import LayerDescription, prepared
from septet.operators.library import common_gpu

LAYERS = {
    "trellis": lambda rng: trellis_layer(rng, 7, 100, 36, (4, 4)),
    "trellis-6-block": lambda rng: trellis_layer(rng, 6, 64, 96, (32, 64), activation_segment="block"),
    "split": lambda rng: split_layer(rng, 70, 50),
    "split-group": lambda rng: split_layer(rng, 70, 50, group_size=16, symmetric=True),
    "split-tensor": lambda rng: split_layer(rng, 70, 50, "tensor"),
    "int8": lambda rng: int8_layer(rng, 33, 48, 16),
}
ACTIVATIONS = ("int8", "float")


def described(layer: LayerWeights, activations: str = "int8") -> LayerDescription:
    """The description of kernel test weights."""
    sizes = layer.in_features, layer.out_features, layer.input_block, layer.output_block, layer.group_size
    return LayerDescription(layer.code, layer.bits_per_pair, *sizes, layer.activation_segment, activations)


def tensors_of(layer: LayerWeights) -> tuple:
    """weight, scale, input scale, offset as tensors with memory of their own."""
    arrays = layer.packed, layer.scale, layer.input_scale, layer.offset
    return tuple(None if array is None else torch.from_numpy(array.copy()) for array in arrays)


def product(layer: LayerWeights, x: np.ndarray, activations: str) -> np.ndarray:
    """What the backend in use says."""
    backend = select_backend()
    return getattr(backend, f"linear_{layer.code}")(x, backend.prepare(layer), activations)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest, rng: np.random.Generator) -> LayerWeights:
    """A layer of every kind."""
    return LAYERS[request.param](rng)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_the_kernel_rounded_once(layer, activations, dtype, rng) -> None:
    x = torch.from_numpy(rng.standard_normal((2, 3, layer.in_features), np.float32)).to(dtype)
    y = operators.linear(x, tensors_of(layer), described(layer, activations))
    exact = product(layer, x.float().numpy().reshape(6, -1), activations).reshape(2, 3, -1)
    assert y.dtype == dtype
    assert torch.equal(y, torch.from_numpy(exact).to(dtype))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_opcheck_linear(layer, activations, rng) -> None:
    x = torch.from_numpy(rng.standard_normal((2, 3, layer.in_features), np.float32))
    torch.library.opcheck(torch.ops.septet.linear.default, (x, *tensors_of(layer), *described(layer, activations)))


def test_opcheck_dequantize_and_embedding(layer, rng) -> None:
    torch.library.opcheck(torch.ops.septet.dequantize.default, (*tensors_of(layer), *described(layer)))
    if layer.code == "int8":
        weight, scale, signs, _ = tensors_of(layer)
        indices = torch.from_numpy(rng.integers(0, layer.out_features, (2, 5)))
        torch.library.opcheck(torch.ops.septet.embedding.default, (indices, weight, scale, signs, layer.input_block))


def test_linear_of_the_unit_vectors_is_dequantize(layer) -> None:
    tensors, description = tensors_of(layer), described(layer, "float")
    weight, columns = operators.dequantize(tensors, description), operators.linear(torch.eye(layer.in_features), tensors, description)
    assert (weight - columns.T).abs().max() <= 1e-5 * weight.abs().max()


def test_embedding_is_a_row_of_dequantize(rng) -> None:
    layer = LAYERS["int8"](rng)
    weight, scale, signs, _ = tensors_of(layer)
    rows = operators.dequantize((weight, scale, signs, None), described(layer))
    indices = torch.tensor([[0, 32], [5, 5]])
    found = operators.embedding(indices, weight, scale, signs.float(), layer.input_block)
    assert (found - rows[indices]).abs().max() <= 1e-6 * rows.abs().max()
    assert torch.equal(operators.embedding(indices, weight, scale, signs.bfloat16(), layer.input_block), found.bfloat16())


@pytest.mark.parametrize("index", [-1, 33])
def test_embedding_refuses_indices_outside(index, rng) -> None:
    layer = LAYERS["int8"](rng)
    with pytest.raises(CodeRangeError, match=f"0..32, got {index}"):
        operators.embedding(torch.tensor([0, index]), *tensors_of(layer)[:3], layer.input_block)


def test_no_tokens(layer) -> None:
    y = operators.linear(torch.empty(0, 2, layer.in_features), tensors_of(layer), described(layer))
    assert y.shape == (0, 2, layer.out_features)


def test_wrong_input_is_an_error(layer) -> None:
    tensors, description = tensors_of(layer), described(layer)
    for x in (torch.zeros(2, layer.in_features + 1), torch.zeros(2, layer.in_features, dtype=torch.float64)):
        with pytest.raises(ShapeError, match="inputs must be"):
            operators.linear(x, tensors, description)


def test_compile_without_graph_break(layer, rng) -> None:
    torch.compiler.reset()
    tensors, description = tensors_of(layer), described(layer)

    def function(x: torch.Tensor) -> torch.Tensor:
        return operators.linear(x * 2, tensors, description) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (1, 4, 7):
        x = torch.from_numpy(rng.standard_normal((tokens, layer.in_features), np.float32))
        assert torch.equal(compiled(x), function(x))


def test_prepared_once_and_dropped_with_the_weight(layer, monkeypatch) -> None:
    operators.forget_prepared()
    backend, calls = select_backend(), []
    original = backend.prepare
    monkeypatch.setattr(backend, "prepare", lambda weights: calls.append(weights) or original(weights))
    tensors, x = tensors_of(layer), torch.ones(1, layer.in_features)
    for activations in ("int8", "float", "int8"):
        operators.linear(x, tensors, described(layer, activations))
    operators.linear(x, (tensors[0].view(tensors[0].shape), *tensors[1:]), described(layer))
    assert len(calls) == 1
    assert calls[0].packed.ctypes.data == tensors[0].data_ptr(), "the packed bytes must not be copied"
    storage = weakref.ref(tensors[0].untyped_storage())
    calls.clear()
    del tensors
    gc.collect()
    assert storage() is None
    assert len(prepared._entries) == 0


def test_tensors_on_several_devices_are_refused() -> None:
    with pytest.raises(OptionError, match="device of the weights, got cpu and meta"):
        common_gpu(torch.zeros(2), None, torch.zeros(2), torch.zeros(2, device="meta"))


@pytest.mark.parametrize("index", range(4))
def test_changed_tensors_are_seen(layer, index, rng) -> None:
    tensors, description = list(tensors_of(layer)), described(layer)
    if tensors[index] is None:
        return
    field = ("packed", "scale", "input_scale", "offset")[index]
    array = getattr(layer, field)
    changed = array[::-1].copy() if field == "packed" else (array * np.float16(-2)).astype(np.float16)
    other = replace(layer, **{field: changed})
    x = torch.from_numpy(rng.standard_normal((2, layer.in_features), np.float32))
    before = operators.linear(x, tuple(tensors), description)
    expected = product(other, x.numpy(), "int8")
    replaced = [*tensors[:index], torch.from_numpy(changed), *tensors[index + 1 :]]
    assert np.array_equal(operators.linear(x, tuple(replaced), description).numpy(), expected)
    assert torch.equal(operators.linear(x, tuple(tensors), description), before)
    tensors[index].copy_(torch.from_numpy(changed))
    assert np.array_equal(operators.linear(x, tuple(tensors), description).numpy(), expected)


def test_weights_that_share_one_storage(rng) -> None:
    layers = [trellis_layer(rng, 7, 64, 16, (16, 64)) for _ in range(3)]
    together = torch.from_numpy(np.stack([layer.packed for layer in layers]))
    x = torch.from_numpy(rng.standard_normal((2, 16), np.float32))
    for _ in range(2):
        for weight, layer in zip(together, layers):
            y = operators.linear(x, (weight, *tensors_of(layer)[1:]), described(layer))
            assert np.array_equal(y.numpy(), product(layer, x.numpy(), "int8"))


def test_weight_that_is_not_contiguous(rng) -> None:
    layer = trellis_layer(rng, 7, 128, 16, (16, 64))
    weight, *rest = tensors_of(layer)
    wide = torch.cat([weight, weight], dim=1)[:, : weight.shape[1]]
    x = torch.from_numpy(rng.standard_normal((2, 16), np.float32))
    assert not wide.is_contiguous()
    assert np.array_equal(operators.linear(x, (wide, *rest), described(layer)).numpy(), product(layer, x.numpy(), "int8"))


def test_inference_tensors_and_deepcopies(layer, rng) -> None:
    x = torch.from_numpy(rng.standard_normal((2, layer.in_features), np.float32))
    description, expected = described(layer), product(layer, x.numpy(), "int8")
    with torch.inference_mode():
        tensors = tensors_of(layer)
        assert np.array_equal(operators.linear(x, tensors, description).numpy(), expected)
    for copied in (copy.deepcopy(tensors_of(layer)), tensors_of(layer)):
        assert np.array_equal(operators.linear(x, copied, description).numpy(), expected)


def test_every_backend_gives_the_same_bits(layer, rng, monkeypatch) -> None:
    x = torch.from_numpy(rng.standard_normal((3, layer.in_features), np.float32))
    tensors, description = tensors_of(layer), described(layer)
    chosen = operators.linear(x, tensors, description)
    monkeypatch.setattr(prepared, "select_backend", lambda: reference)
    assert torch.equal(operators.linear(x, tensors, description), chosen)
