"""The operators on a real GPU, beside the reference. Outputs are poisoned first: memory that a kernel forgets to write is NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from needs import needs, skip_module_without

skip_module_without("cuda", "test_gpu.py tests what can be tested without")

import tolerances  # noqa: E402
from layers import int8_layer, split_layer, trellis_layer  # noqa: E402
from septet import operators  # noqa: E402
from septet.errors import OptionError  # noqa: E402
from septet.gpu import launches  # noqa: E402
from septet.gpu import layers as gpu  # noqa: E402
from septet.kernels import LayerWeights, reference  # noqa: E402
from septet.operators import LayerDescription  # noqa: E402

TRELLIS = {
    "7, odd sizes": lambda rng: trellis_layer(rng, 7, 70, 37),
    "7": lambda rng: trellis_layer(rng, 7, 512, 1024, (256, 256)),
    "7, padded units": lambda rng: trellis_layer(rng, 7, 192, 576, (64, 64)),
    "7, one unit": lambda rng: trellis_layer(rng, 7, 64, 64, (64, 64)),
    "7, large blocks": lambda rng: trellis_layer(rng, 7, 1024, 2048, (2048, 512)),
    "6": lambda rng: trellis_layer(rng, 6, 320, 640, (128, 64)),
    "8": lambda rng: trellis_layer(rng, 8, 256, 768, (256, 256)),
    "7, many rows": lambda rng: trellis_layer(rng, 7, 4096, 64, (64, 256)),
    "7, several groups in a block": lambda rng: trellis_layer(rng, 7, 40960, 64, (64, 256)),
    "6, groups in several blocks": lambda rng: trellis_layer(rng, 6, 1600, 2048, (256, 64)),
    "8, long": lambda rng: trellis_layer(rng, 8, 64, 28672, (256, 64)),
}
SEGMENTED = {
    "7, blocks": lambda rng: trellis_layer(rng, 7, 512, 1024, (256, 256), activation_segment="block"),
    "7, groups in several blocks": lambda rng: trellis_layer(rng, 7, 1600, 2048, (256, 64), activation_segment="block"),
    "6, small blocks": lambda rng: trellis_layer(rng, 6, 192, 576, (64, 64), activation_segment="block"),
    "8, large blocks": lambda rng: trellis_layer(rng, 8, 1024, 2048, (1024, 512), activation_segment="block"),
    "7, blocks of half a chunk": lambda rng: trellis_layer(rng, 7, 1024, 2048, (128, 256), activation_segment="block"),
    "8, most columns of the smallest layers": lambda rng: trellis_layer(rng, 8, 3840, 4096, (256, 256), activation_segment="block"),
    "6, two or three units of a warp": lambda rng: trellis_layer(rng, 6, 3072, 3072, (256, 256), activation_segment="block"),
    "7, blocks below a unit": lambda rng: trellis_layer(rng, 7, 64, 96, (32, 64), activation_segment="block"),
}
OTHERS = {
    "split": lambda rng: split_layer(rng, 70, 50),
    "split, groups": lambda rng: split_layer(rng, 192, 576, group_size=64),
    "split, symmetric": lambda rng: split_layer(rng, 70, 50, group_size=16, symmetric=True),
    "int8": lambda rng: int8_layer(rng, 1000, 576, 64),
}
EVERY = TRELLIS | SEGMENTED | OTHERS
TOKENS = (1, 2, 5, 9, 16, 17, 32, 40, 64, 100)


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Fill what the allocator will hand out next with NaN."""
    torch.cuda.empty_cache()
    blocks = [torch.full((size,), torch.nan, device="cuda") for size in (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24)]
    del blocks


def described(layer: LayerWeights, activations: str) -> LayerDescription:
    """The description of kernel test weights."""
    sizes = layer.in_features, layer.out_features, layer.input_block, layer.output_block, layer.group_size
    return LayerDescription(layer.code, layer.bits_per_pair, *sizes, layer.activation_segment, activations)


def on_gpu(layer: LayerWeights) -> tuple:
    """weight, scale, input scale, offset as tensors on the GPU."""
    arrays = layer.packed, layer.scale, layer.input_scale, layer.offset
    return tuple(None if array is None else torch.from_numpy(array.copy()).cuda() for array in arrays)


def linear(layer: LayerWeights, x: np.ndarray, activations: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The operator on the GPU, its result on the CPU."""
    return operators.linear(torch.from_numpy(x).to(dtype).cuda(), on_gpu(layer), described(layer, activations)).cpu()


def wanted(layer: LayerWeights, x: np.ndarray, activations: str) -> np.ndarray:
    """What the reference says."""
    return getattr(reference, f"linear_{layer.code}")(x, reference.prepare(layer), activations)


def magnitude(layer: LayerWeights, x: np.ndarray) -> np.ndarray:
    """Per token, a bound of what sums of products can reach: float32 steps err in units of it."""
    rotated = np.abs(x).astype(np.float64)
    if layer.input_scale is not None:
        rotated = np.abs(reference.hadamard(x * layer.input_scale.astype(np.float32), layer.input_block)).astype(np.float64)
    largest = np.abs(layer.scale.astype(np.float64)).max() * 127
    return (rotated.sum(axis=1) * largest * np.sqrt(layer.output_block))[:, None]


def activations_of(rng: np.random.Generator, tokens: int, inputs: int) -> np.ndarray:
    """Tokens of very different size, one of them zero."""
    x = rng.standard_normal((tokens, inputs), np.float32) * np.exp(rng.uniform(-8, 4, (tokens, 1))).astype(np.float32)
    x[tokens // 2 : tokens // 2 + tokens // 4] = 0
    return x


@pytest.mark.parametrize("name", TRELLIS | OTHERS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_int8_activations_have_the_bits_of_the_reference(name, tokens, rng) -> None:
    layer = EVERY[name](rng)
    x = activations_of(rng, tokens, layer.in_features)
    assert np.array_equal(linear(layer, x, "int8").numpy(), wanted(layer, x, "int8"))


@pytest.mark.parametrize("name", ["7", "7, padded units", "7, one unit", "6, groups in several blocks", "8, long"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_separate_launches_give_the_same_bits(name, tokens, rng, monkeypatch) -> None:
    layer = EVERY[name](rng)
    x = activations_of(rng, tokens, layer.in_features)
    monkeypatch.setattr(launches, "_LAYER_TOKENS", 0)
    assert np.array_equal(linear(layer, x, "int8").numpy(), wanted(layer, x, "int8"))


@pytest.mark.parametrize("name", SEGMENTED)
@pytest.mark.parametrize("tokens", TOKENS)
def test_int8_activations_in_segments(name, tokens, rng) -> None:
    layer = EVERY[name](rng)
    x = activations_of(rng, tokens, layer.in_features)
    segments = layer.in_features // layer.input_block
    # the sums of segments are exact; adding them in another order errs by a rounding each
    bound = 4 * (segments + 4) * tolerances.FLOAT32_UNIT * magnitude(layer, x)
    assert (np.abs(linear(layer, x, "int8").numpy() - wanted(layer, x, "int8")) <= bound).all()


@pytest.mark.parametrize("name", SEGMENTED)
@pytest.mark.parametrize("size", [1e-43, 1e-36, 1e-30, 1e30])
def test_one_token_of_any_size(name, size, rng) -> None:
    """Down to blocks whose largest magnitude has no reciprocal."""
    layer = EVERY[name](rng)
    x = (rng.standard_normal((1, layer.in_features)) * size).astype(np.float32)
    x[0, ::3] = 0
    segments = layer.in_features // layer.input_block
    bound = 4 * (segments + 4) * tolerances.FLOAT32_UNIT * magnitude(layer, x) + layer.in_features * np.finfo(np.float32).smallest_subnormal
    assert (np.abs(linear(layer, x, "int8").numpy() - wanted(layer, x, "int8")) <= bound).all()


@pytest.mark.parametrize("name", TRELLIS | SEGMENTED)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_token_that_is_no_number(name, value, rng) -> None:
    layer = EVERY[name](rng)
    x = rng.standard_normal((1, layer.in_features), np.float32)
    x[0, 3] = value
    assert not np.isfinite(linear(layer, x, "int8").numpy()).any()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("tokens", TOKENS)
def test_float_activations(name, tokens, rng) -> None:
    layer = EVERY[name](rng)
    x = activations_of(rng, tokens, layer.in_features)
    difference = np.abs(linear(layer, x, "float").numpy() - wanted(layer, x, "float"))
    assert (difference <= 2 * layer.in_features * tolerances.FLOAT32_UNIT * magnitude(layer, x)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [3, 60])
@pytest.mark.parametrize("name", ["7", "7, blocks", "int8", "split"])
def test_other_dtypes_round_once(name, tokens, dtype, rng) -> None:
    layer = EVERY[name](rng)
    x = torch.from_numpy(rng.standard_normal((tokens, layer.in_features), np.float32)).to(dtype).float().numpy()
    assert torch.equal(linear(layer, x, "int8", dtype), linear(layer, x, "int8").to(dtype))
    # a product of 16-bit numbers rounds its inputs, too
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10
    difference = np.abs(linear(layer, x, "float", dtype).float().numpy() - wanted(layer, x, "float"))
    assert (
        difference <= unit * np.abs(wanted(layer, x, "float")).max() + 2 * unit * np.abs(x).max()
    ).all() or tokens > gpu.FEW_FLOAT_TOKENS


@pytest.mark.parametrize("name", EVERY)
def test_not_a_number_fills_its_token(name, rng) -> None:
    layer = EVERY[name](rng)
    for tokens in (3, 70):
        x = rng.standard_normal((tokens, layer.in_features), np.float32)
        x[1, 3], x[2, 0] = np.nan, np.inf
        y = linear(layer, x, "int8").numpy()
        assert np.isnan(y[1]).any() and not np.isfinite(y[2]).any() and np.isfinite(y[0]).all()


@pytest.mark.parametrize("name", EVERY)
def test_triton_and_dequantize(name, rng, monkeypatch) -> None:
    layer = EVERY[name](rng)
    x = activations_of(rng, 5, layer.in_features)
    tensors = on_gpu(layer)
    weight = operators.dequantize(tensors, described(layer, "int8")).cpu().numpy()
    stored = tuple(None if tensor is None else tensor.cpu() for tensor in tensors)
    exact = operators.dequantize(stored, described(layer, "int8")).numpy()
    assert np.abs(weight - exact).max() <= 1e-5 * np.abs(exact).max()
    monkeypatch.setenv(gpu.GPU_VARIABLE, "triton")
    assert np.array_equal(linear(layer, x, "int8").numpy(), wanted(layer, x, "int8"))


def assert_graph_repeats(x: torch.Tensor, tensors: tuple, description: object) -> None:
    """A captured layer gives the bits of the layer itself for other inputs; x: float [M, K] on the GPU."""
    operators.linear(x, tensors, description)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = operators.linear(x, tensors, description)
    for _ in range(5):
        x.normal_()
        graph.replay()
        assert torch.equal(y, operators.linear(x, tensors, description))


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("name", ["7", "7, blocks", "int8"])
def test_graphs_capture_it_and_repeat_its_bits(name, activations, rng) -> None:
    layer = EVERY[name](rng)
    tensors, description = on_gpu(layer), described(layer, activations)
    x = torch.randn(4, layer.in_features, device="cuda")
    assert_graph_repeats(x, tensors, description)


def test_compile_without_graph_break(rng) -> None:
    layer = EVERY["7, blocks"](rng)
    tensors, description = on_gpu(layer), described(layer, "int8")

    def function(x: torch.Tensor) -> torch.Tensor:
        return operators.linear(x * 2, tensors, description) + 1

    compiled = torch.compile(function, fullgraph=True)
    for tokens in (1, 4, 60):
        x = torch.randn(tokens, layer.in_features, device="cuda")
        assert torch.allclose(compiled(x), function(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(dtype, rng) -> None:
    layer = int8_layer(rng, 300, 576, 64)
    weight, scale, signs, _ = on_gpu(layer)
    indices = torch.tensor([[0, 299], [7, 7]])
    stored = [tensor.cpu() for tensor in (weight, scale)]
    exact = operators.embedding(indices, *stored, signs.cpu().to(dtype), 64)
    assert torch.equal(operators.embedding(indices.cuda(), weight, scale, signs.to(dtype), 64).cpu(), exact)
    outside = operators.embedding(torch.tensor([-1, 300, 5], dtype=torch.int32).cuda(), weight, scale, signs.to(dtype), 64).cpu()
    assert outside[:2].isnan().all() and not outside[2].isnan().any()


@needs("two-gpus", "all others run on one")
@pytest.mark.parametrize("name", ["7", "7, blocks", "int8", "split"])
def test_a_layer_runs_on_the_gpu_that_it_is_on(name, rng) -> None:
    """Though another one is current."""
    layer = EVERY[name](rng)
    for tokens in (1, 60):
        x = torch.from_numpy(rng.standard_normal((tokens, layer.in_features), np.float32))
        results = []
        for device in ("cuda:0", "cuda:1"):
            tensors = tuple(None if tensor is None else tensor.to(device) for tensor in on_gpu(layer))
            results.append(operators.linear(x.to(device), tensors, described(layer, "int8")).cpu())
        assert torch.equal(*results)
    with pytest.raises(OptionError, match="device of the weights"):
        operators.linear(x.to("cuda:0"), tensors, described(layer, "int8"))
