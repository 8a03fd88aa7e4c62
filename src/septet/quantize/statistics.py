"""What is known of the inputs and outputs of a fused group when it is quantized, and how it looks in the coded basis.

Three things, each in the original basis: the Hessian of the inputs; how far the inputs have moved since earlier layers were quantized;
and how much errors of the outputs matter for the model's predictions. The last two are optional.

Reference: two-sided Hessians after Tseng et al. 2025 (YAQA, arXiv 2505.22988); targets corrected for moved inputs after Li et al. 2025
(GPTAQ, arXiv 2504.02692).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from septet.codes.tile import TILE_OUTPUTS
from septet.errors import ShapeError
from septet.quantize import exact
from septet.quantize.factorization import Factor, divide, drop_damaged, factorize
from septet.quantize.hessian import rotate_hessian
from septet.quantize.rotation import choose_block
from septet.quantize.scales import sum_all

__all__ = ["GroupStatistics", "InputMetric", "corrected", "input_metric", "output_factor", "output_importance", "output_rows"]

#: How much of the drift is made up for. All of it would fit the weights to the calibration text (docs/log.md).
DRIFT_SHARE = 0.25
#: Sensitivities of outputs come from few tokens; half of each is taken to be the same for all outputs.
OUTPUT_DAMPINGS = (1.0, 3.0)
#: Outputs whose sensitivities are known together, at most.
_MOST_OUTPUT_ROWS = 1024


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """What is known of a fused group.

    Args:
        inputs: float64 [K, K], mean of x transpose(x).
        drift: float64 [K, K], mean of (x_original - x) transpose(x), x_original from the unquantized model; None: not known.
        outputs: for each tensor float [blocks, B, B], mean of d transpose(d) of the loss's gradient d at B neighbouring outputs, with
            B as `output_rows` says; None: not known.
    """

    inputs: np.ndarray
    drift: np.ndarray | None = None
    outputs: tuple[np.ndarray, ...] | None = None

    def check(self, inputs: int, outputs: list[int], name: str) -> None:
        """Raise unless everything has the shape that a group needs.

        Args:
            inputs: in_features of the group.
            outputs: out_features of each tensor.
            name: of the group, for the message.

        Raises:
            ShapeError: something belongs to another group.
        """
        hint = "take the statistics of this group's own inputs and outputs"
        for what, matrix in (("Hessian", self.inputs), ("drift", self.drift)):
            if matrix is not None and matrix.shape != (inputs, inputs):
                raise ShapeError(f"the {what} of {name} must be [{inputs}, {inputs}]", list(matrix.shape), hint)
        if self.outputs is not None:
            rows = [output_rows(size) for size in outputs]
            wanted = [(size // row, row, row) for size, row in zip(outputs, rows)]
            if [matrix.shape for matrix in self.outputs] != wanted:
                got = [list(matrix.shape) for matrix in self.outputs]
                raise ShapeError(f"output statistics of {name} must be {[list(shape) for shape in wanted]}", got, hint)


def output_rows(outputs: int) -> int:
    """How many neighbouring outputs are looked at together: all of up to 1024, else the largest power of two that divides them."""
    return outputs if outputs <= _MOST_OUTPUT_ROWS else choose_block([outputs], _MOST_OUTPUT_ROWS)


def output_importance(sensitivity: np.ndarray) -> np.ndarray:
    """How much each output matters, float64 [N], from float [blocks, B, B]; 0 where that is not known."""
    values = np.einsum("bii->bi", sensitivity).reshape(-1).astype(np.float64)
    return np.where(np.isfinite(values) & (values > 0), values, 0.0)


@dataclass(frozen=True, eq=False)
class InputMetric:
    """The inputs of a group in the coded basis.

    Args:
        factor: for error feedback; without coefficients when nothing is known.
        hessian: float64 [K, K], damped; None when nothing is known.
        correction: float64 [K, K], what to multiply rotated weights by so that they make up for moved inputs; None: nothing.
    """

    factor: Factor
    hessian: np.ndarray | None = None
    correction: np.ndarray | None = None


def input_metric(statistics: GroupStatistics | None, input_scale: np.ndarray, block: int) -> InputMetric:
    """Look at a group's inputs in the coded basis.

    Args:
        statistics: None: nothing is known.
        input_scale: float32 [K], s_in.
        block: Hadamard block that divides K.
    """
    if statistics is None:
        return InputMetric(Factor(None))
    # Damage is cut out before the rotation spreads it over a block.
    hessian = rotate_hessian(drop_damaged(statistics.inputs), input_scale, block)
    drift = statistics.drift
    if drift is not None and not np.isfinite(drift).all():
        drift = None
    factor = factorize(hessian, keep_lower=drift is not None)
    if factor.damping is None:
        return InputMetric(factor)
    diagonal = np.ascontiguousarray(hessian.diagonal())
    mean = float(sum_all(diagonal)) / len(hessian)
    hessian[np.diag_indices(len(hessian))] += factor.damping * mean
    if drift is None:
        return InputMetric(factor, hessian)
    correction = divide(rotate_hessian(drift, input_scale, block), factor)
    correction *= DRIFT_SHARE
    correction[np.diag_indices(len(correction))] += 1
    return InputMetric(Factor(factor.coefficients, factor.shift, factor.damping, factor.diagonal), hessian, correction)


def corrected(rotated: np.ndarray, metric: InputMetric) -> np.ndarray:
    """Rotated weights, float32 [N, K], that make up for moved inputs."""
    if metric.correction is None:
        return rotated
    return exact.product(rotated.astype(np.float64), metric.correction).astype(np.float32)


def output_factor(sensitivity: np.ndarray, output_scale: np.ndarray, block: int) -> Factor:
    """The factor of one block of outputs, for feedback between its tiles.

    Args:
        sensitivity: float [B, B], of B neighbouring outputs.
        output_scale: float [B], signed s_out.
        block: Hadamard block that divides B.

    Returns:
        Without coefficients when all outputs are in one tile, or the sensitivity is of no use.
    """
    if len(sensitivity) <= TILE_OUTPUTS:
        return Factor(None)
    usable = drop_damaged(sensitivity.astype(np.float64))
    return factorize(rotate_hessian(usable, output_scale, block), OUTPUT_DAMPINGS, TILE_OUTPUTS)
