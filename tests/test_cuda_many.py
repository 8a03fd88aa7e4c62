"""Products of many tokens on Hopper beside the reference, whole and in slabs. Outputs are poisoned first, as in test_cuda.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from needs import skip_module_without

skip_module_without("hopper", "test_gpu.py compiles these kernels without")

import fused  # noqa: E402
import tolerances  # noqa: E402
from layers import trellis_layer  # noqa: E402
from septet.gpu import many  # noqa: E402
from septet.kernels import LayerWeights, reference  # noqa: E402
from test_cuda import (  # noqa: E402
    activations_of,
    assert_graph_repeats,
    described,
    linear,
    magnitude,
    on_gpu,
    poisoned_memory,  # noqa: F401
    wanted,
)

#: name -> width, outputs, inputs, blocks of inputs and outputs
SIZES = {
    "one tile": (7, 64, 256, (256, 64)),
    "several": (7, 1024, 1024, (256, 256)),
    "odd outputs": (6, 776, 512, (128, 8)),
    "half a step": (8, 200, 576, (64, 8)),
    "odd inputs": (7, 24, 100, (4, 8)),
    "large blocks": (7, 2048, 2048, (1024, 1024)),
    "large outputs": (8, 512, 640, (128, 512)),
}
SLABS = {"whole": 32 << 20, "cut": 128 << 10}


def layer_of(name: str, scales: str, rng: np.random.Generator) -> LayerWeights:
    """Random weights of one of SIZES."""
    bits, outputs, inputs, blocks = SIZES[name]
    return trellis_layer(rng, bits, outputs, inputs, blocks, activation_segment=scales)


@pytest.fixture(params=SLABS)
def slabs(request, monkeypatch) -> None:
    """Sizes of slabs."""
    monkeypatch.setattr(many, "_SLAB_BYTES", SLABS[request.param])
    many.plan.cache_clear()
    yield
    many.plan.cache_clear()


def exact_of(layer: LayerWeights, x: np.ndarray) -> np.ndarray:
    """What the reference says, and where dense.cu adds blocks of inputs, which are then multiples of a step, with fused multiply-adds."""
    if layer.activation_segment == "token" or layer.input_block % many._STEP:
        return wanted(layer, x, "int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.products, "segmented_product", fused.segmented_product)
        return wanted(layer, x, "int8")


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [65, 128, 300])
@pytest.mark.parametrize("scales", ["token", "block"])
@pytest.mark.parametrize("name", SIZES)
def test_int8_activations_have_the_bits_of_the_reference(name, scales, tokens, dtype, rng) -> None:
    """Of the reference with fused multiply-adds where blocks have scales of their own."""
    layer = layer_of(name, scales, rng)
    x = torch.from_numpy(activations_of(rng, tokens, layer.in_features)).to(dtype).float().numpy()
    assert torch.equal(linear(layer, x, "int8", dtype), torch.from_numpy(exact_of(layer, x)).to(dtype))


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("name", SIZES)
def test_blocks_are_within_the_bound_of_fewer_tokens(name, rng) -> None:
    layer = layer_of(name, "block", rng)
    x = activations_of(rng, 100, layer.in_features)
    blocks = -(-layer.in_features // layer.input_block)
    bound = 4 * (blocks + 4) * tolerances.FLOAT32_UNIT * magnitude(layer, x)
    assert (np.abs(linear(layer, x, "int8").numpy() - wanted(layer, x, "int8")) <= bound).all()


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["one tile", "several", "odd outputs", "half a step", "large outputs"])
def test_float_activations_lose_less_than_the_result(name, dtype, rng) -> None:
    layer = layer_of(name, "token", rng)
    x = torch.from_numpy(rng.standard_normal((130, layer.in_features), np.float32)).to(dtype).float().numpy()
    exact = wanted(layer, x, "float")
    unit = tolerances.BFLOAT16_UNIT if dtype == torch.bfloat16 else tolerances.FLOAT16_UNIT
    assert np.linalg.norm(linear(layer, x, "float", dtype).float().numpy() - exact) <= unit * np.linalg.norm(exact)


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("scales", ["token", "block"])
def test_not_a_number_stays_in_its_token(scales, rng) -> None:
    layer = layer_of("several", scales, rng)
    x = rng.standard_normal((200, layer.in_features), np.float32)
    x[1, 3], x[150, 0] = np.nan, np.inf
    y = linear(layer, x, "int8").numpy()
    clean = np.delete(np.arange(200), [1, 150])
    assert np.isnan(y[1]).any() and np.isnan(y[150]).any() and np.array_equal(y[clean], exact_of(layer, x[clean]))


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_graphs_capture_it_and_repeat_its_bits(activations, rng) -> None:
    layer = layer_of("several", "block", rng)
    tensors, description = on_gpu(layer), described(layer, activations)
    x = torch.randn(300, layer.in_features, device="cuda", dtype=torch.bfloat16)
    assert_graph_repeats(x, tensors, description)
