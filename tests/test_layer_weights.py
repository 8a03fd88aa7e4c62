"""LayerWeights refuses everything a kernel could trip over."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from septet.errors import OptionError, ShapeError
from septet.kernels import LayerWeights
from septet.kernels.weights import MAX_IN_FEATURES


def trellis_layer() -> LayerWeights:
    packed = np.zeros((2, 3 * 112), np.uint8)
    return LayerWeights("trellis", 7, 12, 70, packed, np.ones(70, np.float16), None, np.ones(12, np.float16), 4, 2)


def split_layer() -> LayerWeights:
    packed, scale = np.zeros((2, 3 * 112), np.uint8), np.ones((70, 4), np.float16)
    return LayerWeights("split", 7, 12, 70, packed, scale, scale.copy(), group_size=8)


def int8_layer() -> LayerWeights:
    packed = np.zeros((70, 12), np.int8)
    return LayerWeights("int8", 16, 12, 70, packed, np.ones(70, np.float16), None, np.ones(12, np.float16), 4)


def test_segments_and_padding() -> None:
    layer = replace(trellis_layer(), in_features=10, input_scale=np.ones(10, np.float16), input_block=2)
    assert (layer.padded_in_features, layer.segment, layer.groups) == (12, 12, 1)
    assert replace(layer, activation_segment="block").segment == 2
    assert (split_layer().segment, split_layer().groups) == (8, 2)
    whole = replace(split_layer(), group_size=None, scale=np.ones((1, 2), np.float16), offset=None)
    assert (whole.segment, whole.groups) == (12, 1)
    shared = replace(split_layer(), scale=np.ones((1, 4), np.float16), offset=np.ones((1, 4), np.float16))
    assert shared.groups == 2
    odd = replace(int8_layer(), in_features=9, input_block=1, packed=np.zeros((70, 9), np.int8), input_scale=np.ones(9, np.float16))
    assert (odd.padded_in_features, odd.segment) == (9, 9)


def test_most_inputs_still_fit_32_bits() -> None:
    assert MAX_IN_FEATURES * 255 * 127 < 2**31 <= (MAX_IN_FEATURES + 1) * 255 * 127
    with pytest.raises(ShapeError, match="at most 66311 inputs"):
        replace(trellis_layer(), in_features=MAX_IN_FEATURES + 1, input_block=1)


@pytest.mark.parametrize(
    "change",
    [
        {"code": "vq"},
        {"bits_per_pair": 5},
        {"bits_per_pair": 16},
        {"activation_segment": "tensor"},
    ],
)
def test_unknown_options(change: dict) -> None:
    with pytest.raises(OptionError):
        replace(trellis_layer(), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"in_features": 13},
        {"in_features": 16},
        {"in_features": 0},
        {"out_features": 64},
        {"out_features": 0},
        {"bits_per_pair": 8},
        {"packed": np.zeros((2, 3 * 112), np.int8)},
        {"packed": np.zeros((2, 3 * 112 + 1), np.uint8)},
        {"packed": np.zeros((3 * 112, 2), np.uint8).T},
        {"scale": np.ones(70, np.float32)},
        {"scale": np.ones(128, np.float16)},
        {"scale": np.ones((70, 1), np.float16)},
        {"offset": np.ones(70, np.float16)},
        {"input_scale": None},
        {"input_scale": np.ones(24, np.float16)[::2]},
        {"input_block": 3},
        {"input_block": 8},
        {"input_block": 0},
        {"output_block": 4},
        {"group_size": 4},
    ],
)
def test_wrong_shapes_of_trellis(change: dict) -> None:
    with pytest.raises(ShapeError):
        replace(trellis_layer(), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 6},
        {"group_size": 0},
        {"group_size": -4},
        {"group_size": 12},
        {"group_size": None},
        {"scale": np.ones((70, 2), np.float16)},
        {"scale": np.ones((1, 4), np.float16)},
        {"offset": np.ones((70, 4), np.float32)},
        {"input_scale": np.ones(12, np.float16)},
        {"output_block": 2},
    ],
)
def test_wrong_shapes_of_split(change: dict) -> None:
    with pytest.raises(ShapeError):
        replace(split_layer(), **change)


@pytest.mark.parametrize(
    "change", [{"packed": np.zeros((128, 12), np.int8)}, {"packed": np.zeros((70, 12), np.uint8)}, {"output_block": 2}]
)
def test_wrong_shapes_of_int8(change: dict) -> None:
    with pytest.raises(ShapeError):
        replace(int8_layer(), **change)


def test_messages_say_what_came() -> None:
    with pytest.raises(ShapeError, match=r"packed must be contiguous uint8 \[2, 336\], got uint8 \[1, 336\]; check in_features"):
        replace(trellis_layer(), packed=np.zeros((1, 336), np.uint8))
