"""Quantizing with the trellis code: rotate, scale, encode, a few blocks of rows at a time.

The tensors of a fused group (q/k/v, gate/up) are taken together, because they share s_in and the blocks. Scales are rounded to fp16
before the rotation, so the codes make up for the rounding. Memory is bounded by a few million weights plus the result, however large
the matrix; with statistics by a few float64 [K, K], and 1024 rows more. Padding to whole tiles is encoded as weight 0.

With statistics of the inputs the tiles are encoded with error feedback, and the output scales are fitted again afterwards. With
sensitivities of the outputs s_out follows them, and feedback goes along the outputs as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from septet.codes import trellis as trellis_code
from septet.codes.tile import TILE_OUTPUTS, check_bits, tile_bytes, tile_grid
from septet.quantize import rotation, scales
from septet.quantize.factorization import Factor
from septet.quantize.feedback import Sheet, encode_sheets
from septet.quantize.refit import refit_output_scale
from septet.quantize.statistics import GroupStatistics, InputMetric, corrected, input_metric, output_factor, output_importance, output_rows
from septet.quantize.tensor import QuantizedTensor, RowSource, common_inputs
from septet.quantize.threads import one_blas_thread, parallel_map

__all__ = ["quantize_trellis", "row_scales"]

#: With feedback a piece takes part in K/4 calls of the encoder; larger pieces keep all threads busy in each.
_FEEDBACK_PIECE_WEIGHTS = 1 << 23


def quantize_trellis(
    weights: Sequence[RowSource],
    names: list[str],
    bits_per_pair: int = 7,
    rotation_block: int = 256,
    seed: int = 0,
    threads: int = 0,
    statistics: GroupStatistics | None = None,
) -> list[QuantizedTensor]:
    """Quantize the tensors of one fused group.

    Args:
        weights: [N_i, K], finite; slices of rows must be float32 arrays. Only a few rows are asked for at a time, several times.
        names: a module name for each; they and the seed choose the random signs. The first one names the group.
        bits_per_pair: 6, 7 or 8.
        rotation_block: the largest Hadamard block, a power of two.
        seed: of the random signs.
        threads: 0 is the default number; the result does not depend on it.
        statistics: of the group's inputs and outputs; None: plain rounding. Values that are not finite are left out.

    Returns:
        One QuantizedTensor per weight, with the same input_scale and input_block.

    Raises:
        CodeRangeError: a weight is not finite, or too large for fp16 scales.
        OptionError: an unknown width or block.
        ShapeError: the weights do not have the same number of inputs, or the statistics have others.
    """
    check_bits(bits_per_pair)
    inputs = common_inputs(weights)
    known = statistics.outputs if statistics is not None else None
    if statistics is not None:
        statistics.check(inputs, [weight.shape[0] for weight in weights], names[0])
    input_block = rotation.choose_block([inputs], rotation_block)
    output_block = rotation.choose_block([weight.shape[0] for weight in weights], rotation_block)
    columns = _column_scale(weights, names)

    def row_norms(columns: np.ndarray | None) -> list[np.ndarray]:
        return [scales.row_norms(weight, columns) for weight in weights]

    magnitudes, columns, exponent = row_scales(row_norms, columns, known or [None] * len(names), output_block, bits_per_pair)
    input_scale = columns * rotation.random_signs(seed, f"{names[0]}/in", inputs)
    metric = input_metric(statistics, input_scale, input_block)
    basis = _Basis(input_scale, input_block, output_block, bits_per_pair, metric)
    makers = []
    for position, (weight, name, magnitude) in enumerate(zip(weights, names, magnitudes)):
        wanted = rotation.random_signs(seed, f"{name}/out", weight.shape[0]) * magnitude / 2.0**exponent
        makers.append(_Maker(weight, name, wanted, basis, None if known is None else known[position]))
    for bunch in _bunches([piece for maker in makers for piece in maker.pieces()], basis.piece_weights()):
        prepared = parallel_map(lambda piece: piece[0].prepare(*piece[1:]), bunch, threads)
        with one_blas_thread():
            encoded = encode_sheets([sheet for sheet, _ in prepared], metric.factor, bits_per_pair, threads)
        found = [(maker.name, sheet.rotated, scale, levels) for (maker, _, _), (sheet, scale), (_, levels) in zip(bunch, prepared, encoded)]
        fitted = parallel_map(lambda piece: basis.refit(*piece), found, threads)
        for (maker, start, stop), scale, (coded, levels) in zip(bunch, fitted, encoded):
            maker.accept(slice(start, stop), scale, coded, levels)
    return [maker.result() for maker in makers]


def _column_scale(weights: Sequence[RowSource], names: list[str]) -> np.ndarray:
    """|s_in| as fp16 holds it, float32 [K]."""
    for weight, name in zip(weights, names):
        scales.check_finite(scales.row_norms(weight), name)
    return scales.round_to_float16(scales.trellis_input_scale(weights), names[0]).astype(np.float32)


def row_scales(
    row_norms: Callable[[np.ndarray | None], list[np.ndarray]],
    columns: np.ndarray,
    sensitivities: Sequence[np.ndarray | None],
    output_block: int,
    bits: int,
) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Magnitudes of scales for unit variance.

    Weights so small or large that fp16 cannot hold s_out move a power of two to s_in; there is no room for column scales then.

    Args:
        row_norms: the root mean square of each tensor's rows, float64 [N_i], after dividing by column scales or by nothing.
        columns: |s_in|, float32 [K].
        sensitivities: of each tensor's outputs, float [blocks, B, B], or None.
        output_block: Hadamard block along the outputs.
        bits: bits per pair.

    Returns:
        |s_out|, float64 [N_i] each; |s_in|; and the exponent moved from s_out to s_in.
    """
    importances = [None if matrix is None else output_importance(matrix) for matrix in sensitivities]

    def magnitudes(columns: np.ndarray | None) -> list[np.ndarray]:
        return [scales.trellis_output_scale(norms, output_block, importance) for norms, importance in zip(row_norms(columns), importances)]

    found, per_sigma = magnitudes(columns), trellis_code.WIDTHS[bits].levels_per_sigma
    exponent = scales.scale_exponent([magnitude / per_sigma for magnitude in found])
    if exponent:
        columns = np.full(len(columns), 2.0**exponent, np.float32)
        found = magnitudes(None)
    return found, columns, exponent


@dataclass(frozen=True, eq=False)
class _Basis:
    """What all rows of a group share: s_in float32 [K], the rotation blocks, the width, and what is known of the inputs."""

    input_scale: np.ndarray
    input_block: int
    output_block: int
    bits: int
    metric: InputMetric

    def rotate(self, rows: np.ndarray, wanted: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Rotated rows in standard deviations, float32, and the rounded scale they belong to, float16."""
        per_sigma = trellis_code.WIDTHS[self.bits].levels_per_sigma
        scale = scales.round_to_float16(wanted / per_sigma, name)
        sigma = scale.astype(np.float32) * np.float32(per_sigma)
        rotated = rotation.rotate(rows, sigma, self.input_scale, self.input_block, self.output_block)
        return corrected(rotated, self.metric), scale

    def refit(self, name: str, rotated: np.ndarray, scale: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """Better output scales for the levels of rotated rows, float16; the old ones where nothing is known of the inputs."""
        if self.metric.hessian is None:
            return scale
        sigma = scale.astype(np.float32) * np.float32(trellis_code.WIDTHS[self.bits].levels_per_sigma)
        targets = rotation.hadamard_outputs(rotated, self.output_block) * sigma[:, None]
        return refit_output_scale(targets, levels, scale, self.metric.hessian, self.output_block, name)

    def piece_weights(self) -> int:
        """About how many weights to work on at a time."""
        return rotation.PIECE_WEIGHTS if self.metric.hessian is None else _FEEDBACK_PIECE_WEIGHTS


class _Maker:
    """Makes one tensor of a group, a few blocks of rows at a time.

    Args:
        weight: [N, K].
        name: for messages.
        wanted: float64 [N], signed scale of the rows for unit variance.
        basis: of the group.
        sensitivity: float [blocks, B, B] of the outputs, or None.
    """

    def __init__(self, weight: RowSource, name: str, wanted: np.ndarray, basis: _Basis, sensitivity: np.ndarray | None) -> None:
        rows, columns = tile_grid(*weight.shape)
        self._weight, self.name, self._wanted, self._basis = weight, name, wanted, basis
        # Blocks that do not end with a tile, or with a block of the rotation, cannot be encoded one after the other.
        step = output_rows(weight.shape[0])
        aligned = step % max(TILE_OUTPUTS, basis.output_block) == 0 or step == weight.shape[0]
        self._sensitivity = sensitivity if aligned and basis.metric.hessian is not None else None
        self._packed = np.empty((rows, columns * tile_bytes(basis.bits)), np.uint8)
        self._scale = np.empty(weight.shape[0], np.float16)
        self._difference = self._energy = 0.0
        self.inputs = weight.shape[1]

    def pieces(self) -> list[tuple[_Maker, int, int]]:
        """Rows to encode together: (self, start, stop) each."""
        outputs = self._weight.shape[0]
        if self._sensitivity is not None:
            step = self._sensitivity.shape[1]
            return [(self, start, start + step) for start in range(0, outputs, step)]
        block = max(TILE_OUTPUTS, self._basis.output_block)
        return [(self, *cut) for cut in rotation.row_pieces(self._weight.shape, block, self._basis.piece_weights())]

    def prepare(self, start: int, stop: int) -> tuple[Sheet, np.ndarray]:
        """Rotated rows, and their scale, float16."""
        rows, wanted, basis = self._weight[start:stop], self._wanted[start:stop], self._basis
        rotated, scale = basis.rotate(rows, wanted, self.name)
        factors = scales.headroom(rotated, basis.bits, basis.output_block)
        if (factors != 1).any():
            rotated, scale = basis.rotate(rows, wanted * factors, self.name)
        outputs = Factor(None)
        if self._sensitivity is not None:
            outputs = output_factor(self._sensitivity[start // (stop - start)], scale.astype(np.float64), basis.output_block)
        return Sheet(rotated, outputs), scale

    def accept(self, cut: slice, scale: np.ndarray, coded: np.ndarray, levels: np.ndarray) -> None:
        """Take over encoded rows and their final scale."""
        rows, basis = self._weight[cut], self._basis
        self._packed[cut.start // TILE_OUTPUTS : cut.start // TILE_OUTPUTS + len(coded)] = coded
        self._scale[cut] = scale
        stored = scale.astype(np.float32)
        decoded = rotation.unrotate(levels, stored, basis.input_scale, basis.input_block, basis.output_block)
        sums = scales.squared_sums(rows, decoded)
        self._difference, self._energy = self._difference + sums[0], self._energy + sums[1]

    def result(self) -> QuantizedTensor:
        """The finished tensor."""
        basis = self._basis
        return QuantizedTensor(
            code="trellis",
            bits_per_pair=basis.bits,
            shape=self._weight.shape,
            packed=self._packed,
            scale=self._scale,
            input_scale=basis.input_scale.astype(np.float16),
            input_block=basis.input_block,
            output_block=basis.output_block,
            relative_error=scales.ratio_of_norms(self._difference, self._energy),
        )


def _bunches(pieces: list[tuple[_Maker, int, int]], weights: int) -> Iterator[list[tuple[_Maker, int, int]]]:
    """Neighbouring pieces, as many at a time as have about so many weights."""
    bunch, held = [], 0
    for maker, start, stop in pieces:
        size = (stop - start) * maker.inputs
        if bunch and held + size > weights:
            yield bunch
            bunch, held = [], 0
        bunch.append((maker, start, stop))
        held += size
    yield bunch
