"""Random layers for kernel tests: every code, any size; and the same layer as a dense matrix, from the definitions alone."""

from __future__ import annotations

from functools import partial

import numpy as np

from septet.codes import split, trellis
from septet.codes.tile import matrix_of_tiles, tile_grid
from septet.kernels import LayerWeights
from septet.packing import pack, unpack


def trellis_layer(
    rng: np.random.Generator, bits: int, outputs: int, inputs: int, blocks: tuple[int, int] = (1, 1), **fields
) -> LayerWeights:
    """A trellis layer of random symbols; blocks are (input_block, output_block)."""
    symbols = rng.integers(0, 1 << bits, (*tile_grid(outputs, inputs), 128)).astype(np.uint8)
    scales = partial(signed_scales, rng)
    return LayerWeights("trellis", bits, inputs, outputs, pack(symbols, bits), scales(outputs), None, scales(inputs), *blocks, **fields)


def split_layer(
    rng: np.random.Generator,
    outputs: int,
    inputs: int,
    granularity: str = "channel",
    symmetric: bool = False,
    group_size: int | None = None,
) -> LayerWeights:
    """A split layer of random symbols; granularity is tensor, channel or group."""
    symbols = rng.integers(0, 128, (*tile_grid(outputs, inputs), 128)).astype(np.uint8)
    groups = 1 if group_size is None else -(-inputs // group_size)
    shape = (1 if granularity == "tensor" else outputs, 2 * groups)
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float16)
    offset = None if symmetric else rng.uniform(-1, 0.1, shape).astype(np.float16)
    return LayerWeights("split", 7, inputs, outputs, pack(symbols, 7), scale, offset, group_size=group_size)


def int8_layer(rng: np.random.Generator, outputs: int, inputs: int, block: int = 1) -> LayerWeights:
    """An int8 layer of random weights."""
    weights = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    signs = rng.choice(np.array([-1, 1], np.float16), inputs)
    return LayerWeights("int8", 16, inputs, outputs, weights, np.abs(signed_scales(rng, outputs)), None, signs, block)


def signed_scales(rng: np.random.Generator, count: int) -> np.ndarray:
    """float16 [count], magnitudes 0.25 to 2, random signs."""
    return (rng.uniform(0.25, 2, count) * rng.choice([-1.0, 1.0], count)).astype(np.float16)


def sylvester(size: int, block: int) -> np.ndarray:
    """The normalized block Hadamard matrix, float64 [size, size]: entry (i, j) of a block is (-1)^popcount(i & j) / sqrt(block)."""
    index = np.arange(block)
    parity = np.array([[bin(i & j).count("1") % 2 for j in index] for i in index])
    return np.kron(np.eye(size // block), (1 - 2 * parity) / np.sqrt(block))


def rotated(layer: LayerWeights, x: np.ndarray) -> np.ndarray:
    """Activations in the basis of the stored weights, float64 [M, K]."""
    if layer.input_scale is None:
        return x.astype(np.float64)
    return x.astype(np.float64) * layer.input_scale.astype(np.float64) @ sylvester(layer.in_features, layer.input_block)


def inner_matrix(layer: LayerWeights) -> np.ndarray:
    """The stored weights before output rotation and input side, float64 [N, K]: levels for trellis and int8, weights for split."""
    size = slice(layer.out_features), slice(layer.in_features)
    if layer.code == "int8":
        return layer.packed.astype(np.float64)
    symbols = unpack(layer.packed, layer.bits_per_pair)
    if layer.code == "trellis":
        return matrix_of_tiles(trellis.decode(symbols, layer.bits_per_pair))[size].astype(np.float64)
    fields = matrix_of_tiles(split.fields_of_symbols(symbols))[size].astype(np.float64)
    columns = np.arange(layer.in_features)
    column = columns % 2 + (0 if layer.group_size is None else 2 * (columns // layer.group_size))
    scale = layer.scale.astype(np.float64)[:, column]
    if layer.offset is None:
        return scale * (fields - np.where(columns % 2, 4, 8))
    return scale * fields + layer.offset.astype(np.float64)[:, column]


def output_matrix(layer: LayerWeights) -> np.ndarray:
    """What turns the products of `inner_matrix` into outputs: float64 [N, N], y = products @ matrix."""
    if layer.code == "split":
        return np.eye(layer.out_features)
    return sylvester(layer.out_features, layer.output_block) * layer.scale.astype(np.float64)
