"""Quantizing with the trellis code: rotate, scale, encode, a few blocks of rows at a time.

The tensors of a fused group (q/k/v, gate/up) are taken together, because they share s_in and the blocks. Scales are rounded to fp16
before the rotation, so the codes make up for the rounding. Memory is bounded by a few million weights plus the result, however large
the matrix. Padding to whole tiles is encoded as weight 0.

With a Hessian of the inputs the tiles are encoded with error feedback, and the output scales are fitted again afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from septet.codes import trellis as trellis_code
from septet.codes.tile import TILE_OUTPUTS, check_bits, tile_bytes, tile_grid
from septet.errors import ShapeError
from septet.quantize import rotation, scales
from septet.quantize.factorization import Factor, drop_damaged, factorize
from septet.quantize.feedback import encode_with_feedback
from septet.quantize.hessian import rotate_hessian
from septet.quantize.refit import refit_output_scale
from septet.quantize.tensor import QuantizedTensor, RowSource, common_inputs

__all__ = ["quantize_trellis"]

#: With feedback a piece takes part in K/4 calls of the encoder; larger pieces keep all threads busy in each.
_FEEDBACK_PIECE_WEIGHTS = 1 << 23


def quantize_trellis(
    weights: Sequence[RowSource],
    names: list[str],
    bits_per_pair: int = 7,
    rotation_block: int = 256,
    seed: int = 0,
    threads: int = 0,
    hessian: np.ndarray | None = None,
) -> list[QuantizedTensor]:
    """Quantize the tensors of one fused group.

    Args:
        weights: [N_i, K], finite; slices of rows must be float32 arrays. Only a few rows are asked for at a time, several times.
        names: a module name for each; they and the seed choose the random signs. The first one names the group.
        bits_per_pair: 6, 7 or 8.
        rotation_block: the largest Hadamard block, a power of two.
        seed: of the random signs.
        threads: 0 is the default number; the result does not depend on it.
        hessian: float64 [K, K], mean of x transpose(x) over the inputs of the group, in the original basis; None: plain rounding.
            Values that are not finite are left out.

    Returns:
        One QuantizedTensor per weight, with the same input_scale and input_block.

    Raises:
        CodeRangeError: a weight is not finite, or too large for fp16 scales.
        OptionError: an unknown width or block.
        ShapeError: the weights do not have the same number of inputs, or the Hessian has another.
    """
    check_bits(bits_per_pair)
    inputs = common_inputs(weights)
    if hessian is not None and hessian.shape != (inputs, inputs):
        hint = "take the Hessian of this group's own inputs"
        raise ShapeError(f"the Hessian of {names[0]} must be [{inputs}, {inputs}]", list(hessian.shape), hint)
    input_block = rotation.choose_block([inputs], rotation_block)
    output_block = rotation.choose_block([weight.shape[0] for weight in weights], rotation_block)
    input_scale, magnitudes, exponent = _group_scales(weights, names, output_block, bits_per_pair)
    input_scale *= rotation.random_signs(seed, f"{names[0]}/in", inputs)
    metric, factor = _metric(hessian, input_scale, input_block)
    basis = _Basis(input_scale, input_block, output_block, bits_per_pair, factor, metric)
    results = []
    for weight, name, magnitude in zip(weights, names, magnitudes):
        wanted = rotation.random_signs(seed, f"{name}/out", weight.shape[0]) * magnitude / 2.0**exponent
        results.append(_encode_trellis(weight, name, wanted, basis, threads))
    return results


def _group_scales(weights: Sequence[RowSource], names: list[str], output_block: int, bits: int) -> tuple[np.ndarray, list[np.ndarray], int]:
    """|s_in| as fp16 holds it, float32 [K]; |s_out| for unit variance, float64 [N_i] each; and the exponent moved from s_out to s_in.

    Weights so small or large that fp16 cannot hold s_out move a power of two to s_in; there is no room for column scales then.
    """
    for weight, name in zip(weights, names):
        scales.check_finite(scales.row_norms(weight), name)
    columns = scales.round_to_float16(scales.trellis_input_scale(weights), names[0]).astype(np.float32)
    magnitudes = [scales.trellis_output_scale(scales.row_norms(weight, columns), output_block) for weight in weights]
    per_sigma = trellis_code.WIDTHS[bits].levels_per_sigma
    exponent = scales.scale_exponent([magnitude / per_sigma for magnitude in magnitudes])
    if exponent:
        columns = np.full(weights[0].shape[1], 2.0**exponent, np.float32)
        magnitudes = [scales.trellis_output_scale(scales.row_norms(weight), output_block) for weight in weights]
    return columns, magnitudes, exponent


def _metric(hessian: np.ndarray | None, input_scale: np.ndarray, input_block: int) -> tuple[np.ndarray | None, Factor]:
    """The damped Hessian in the coded basis, float64 [K, K], and its factor; None when there is none to use."""
    if hessian is None:
        return None, Factor(None)
    # Damage is cut out before the rotation spreads it over a block.
    rotated = rotate_hessian(drop_damaged(hessian), input_scale, input_block)
    factor = factorize(rotated)
    if factor.damping is None:
        return None, factor
    diagonal = np.ascontiguousarray(rotated.diagonal())
    rotated[np.diag_indices(len(rotated))] += factor.damping * float(scales.sum_all(diagonal)) / len(rotated)
    return rotated, factor


@dataclass(frozen=True, eq=False)
class _Basis:
    """What all rows of a group share: s_in float32 [K], the rotation blocks, the width, and what is known of the inputs."""

    input_scale: np.ndarray
    input_block: int
    output_block: int
    bits: int
    factor: Factor
    metric: np.ndarray | None

    def rotate(self, rows: np.ndarray, wanted: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Rotated rows in standard deviations, float32, and the rounded scale they belong to, float16."""
        per_sigma = trellis_code.WIDTHS[self.bits].levels_per_sigma
        scale = scales.round_to_float16(wanted / per_sigma, name)
        sigma = scale.astype(np.float32) * np.float32(per_sigma)
        return rotation.rotate(rows, sigma, self.input_scale, self.input_block, self.output_block), scale

    def refit(self, rows: np.ndarray, levels: np.ndarray, scale: np.ndarray, name: str) -> np.ndarray:
        """Better output scales for given levels, float16; the old ones where nothing is known of the inputs."""
        if self.metric is None:
            return scale
        targets = rotation.hadamard_inputs(rows / self.input_scale, self.input_block)
        return refit_output_scale(targets, levels, scale, self.metric, self.output_block, name)

    def piece_weights(self) -> int:
        """About how many weights to work on at a time."""
        return rotation.PIECE_WEIGHTS if self.metric is None else _FEEDBACK_PIECE_WEIGHTS


def _encode_trellis(weight: RowSource, name: str, wanted: np.ndarray, basis: _Basis, threads: int) -> QuantizedTensor:
    """Encode a matrix, a few blocks of rows at a time.

    Args:
        weight: [N, K].
        name: for messages.
        wanted: float64 [N], signed scale of the rows for unit variance.
        basis: of the group.
        threads: 0 is the default number.
    """
    bits = basis.bits
    (outputs, _), (tile_rows, columns) = weight.shape, tile_grid(*weight.shape)
    packed, scale = np.empty((tile_rows, columns * tile_bytes(bits)), np.uint8), np.empty(outputs, np.float16)
    difference = energy = 0.0
    for start, stop in rotation.row_pieces(weight.shape, max(TILE_OUTPUTS, basis.output_block), basis.piece_weights()):
        rows = weight[start:stop]
        rotated, scale[start:stop] = basis.rotate(rows, wanted[start:stop], name)
        factors = scales.headroom(rotated, bits, basis.output_block)
        if (factors != 1).any():
            rotated, scale[start:stop] = basis.rotate(rows, wanted[start:stop] * factors, name)
        coded, levels = encode_with_feedback(rotated, basis.factor, bits, threads)
        packed[start // TILE_OUTPUTS : start // TILE_OUTPUTS + len(coded)] = coded
        scale[start:stop] = basis.refit(rows, levels, scale[start:stop], name)
        stored_scale = scale[start:stop].astype(np.float32)
        decoded = rotation.unrotate(levels, stored_scale, basis.input_scale, basis.input_block, basis.output_block)
        sums = scales.squared_sums(rows, decoded)
        difference, energy = difference + sums[0], energy + sums[1]
    return QuantizedTensor(
        code="trellis",
        bits_per_pair=bits,
        shape=weight.shape,
        packed=packed,
        scale=scale,
        input_scale=basis.input_scale.astype(np.float16),
        input_block=basis.input_block,
        output_block=basis.output_block,
        relative_error=scales.ratio_of_norms(difference, energy),
    )
