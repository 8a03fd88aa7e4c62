"""Laws of what is known of both sides of a layer: feedback along the outputs, targets for moved inputs, scales, and widths by layer."""

from __future__ import annotations

import numpy as np
import pytest

from septet.codes import trellis
from septet.errors import ShapeError
from septet.quantize import GroupStatistics, dequantize, quantize_trellis, rotation, scales
from septet.quantize.allocation import DISTORTIONS, allocate, expected_loss
from septet.quantize.factorization import Factor, divide, factorize
from septet.quantize.feedback import Sheet, encode_sheets
from septet.quantize.statistics import DRIFT_SHARE, corrected, input_metric, output_factor, output_rows

BITS = 7


def correlated(rng: np.random.Generator, size: int, tokens: int = 400) -> np.ndarray:
    """Second moments of rows that share a few directions, float64 [size, size]."""
    rows = rng.standard_normal((tokens, 4)) @ rng.standard_normal((4, size)) + 0.3 * rng.standard_normal((tokens, size))
    return rows.T @ rows / tokens


def gaussian(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def loss(errors: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> float:
    """tr(H_out E H_in transpose(E))."""
    return float(np.sum((errors @ inputs) * (outputs @ errors)))


# feedback along the outputs


def test_outputs_that_do_not_know_each_other_change_nothing(rng: np.random.Generator) -> None:
    rotated, factor = gaussian(rng, 150, 22), factorize(correlated(rng, 22))
    alone = encode_sheets([Sheet(rotated)], factor, BITS)[0]
    for outputs in (np.eye(150), np.diag(np.arange(1.0, 151))):
        known = factorize(outputs, (1.0,), 64)
        packed, levels = encode_sheets([Sheet(rotated, known)], factor, BITS)[0]
        assert packed.tobytes() == alone[0].tobytes() and np.array_equal(levels, alone[1])


def test_two_sided_feedback_does_not_depend_on_batches_threads_or_company(rng: np.random.Generator) -> None:
    factor = factorize(correlated(rng, 30))
    sheets = [Sheet(gaussian(rng, size, 30), factorize(correlated(rng, size), (1.0,), 64)) for size in (200, 70)]
    sheets.append(Sheet(gaussian(rng, 64, 30)))
    whole = encode_sheets(sheets, factor, BITS)
    for options in ({"batch_inputs": 4}, {"batch_inputs": 12}, {"threads": 3}):
        again = encode_sheets(sheets, factor, BITS, **options)
        assert all(one[0].tobytes() == other[0].tobytes() for one, other in zip(whole, again))
    for sheet, together in zip(sheets, whole):
        assert encode_sheets([sheet], factor, BITS)[0][0].tobytes() == together[0].tobytes()


def test_every_tile_makes_up_for_all_that_came_before(rng: np.random.Generator) -> None:
    """Against the definition: transpose(M) E L is what the code itself got wrong, tile by tile."""
    rotated, inputs, outputs = gaussian(rng, 192, 16), correlated(rng, 16), correlated(rng, 192)
    factor, across = factorize(inputs), factorize(outputs, (0.1,), 64)
    levels = encode_sheets([Sheet(rotated, across)], factor, BITS)[0][1]
    errors = levels / trellis.WIDTHS[BITS].levels_per_sigma - rotated.astype(np.float64)
    lower, upper = (np.ldexp(known.coefficients, -known.shift) + np.eye(len(known.coefficients)) for known in (factor, across))
    own = upper.T @ errors @ lower
    targets = levels / trellis.WIDTHS[BITS].levels_per_sigma - own
    for row in range(0, 192, 64):
        for column in range(0, 16, 4):
            tile = np.ascontiguousarray(targets[row : row + 64, column : column + 4], np.float32)
            again = encode_sheets([Sheet(tile)], Factor(None), BITS)[0][1] / trellis.WIDTHS[BITS].levels_per_sigma - tile
            # Targets are rounded to quarter levels and errors to sixteenths of those: the search is as close all the same.
            mine = own[row : row + 64, column : column + 4]
            assert np.sqrt((mine**2).mean()) == pytest.approx(np.sqrt((again**2).mean()), rel=0.02)


def test_feedback_along_the_outputs_lowers_the_loss(rng: np.random.Generator) -> None:
    weight, inputs, outputs = 0.02 * gaussian(rng, 256, 64), correlated(rng, 64), correlated(rng, 256)
    one, two = GroupStatistics(inputs), GroupStatistics(inputs, None, (outputs[None],))
    lost = [loss(dequantize(quantize_trellis([weight], ["w"], statistics=known)[0]) - weight, inputs, outputs) for known in (one, two)]
    assert lost[1] < 0.85 * lost[0]


def test_statistics_of_another_layer_are_refused(rng: np.random.Generator) -> None:
    weight = gaussian(rng, 64, 12)
    for known in (
        GroupStatistics(np.eye(8)),
        GroupStatistics(np.eye(12), np.eye(8)),
        GroupStatistics(np.eye(12), None, (np.eye(60)[None],)),
        GroupStatistics(np.eye(12), None, ()),
    ):
        with pytest.raises(ShapeError, match="of layer must be"):
            quantize_trellis([weight], ["layer"], statistics=known)
    with pytest.raises(ShapeError, match="64 outputs"):
        encode_sheets([Sheet(weight, factorize(np.eye(100), (1.0,), 64))], factorize(np.eye(12)), BITS)


def test_damaged_sensitivities_are_left_out(rng: np.random.Generator) -> None:
    weight, inputs, outputs = 0.02 * gaussian(rng, 130, 24), correlated(rng, 24), correlated(rng, 130)
    outputs[3] = np.nan
    drift = np.full((24, 24), np.inf)
    made = quantize_trellis([weight], ["w"], statistics=GroupStatistics(inputs, drift, (outputs[None],)))[0]
    assert np.isfinite(dequantize(made)).all() and made.relative_error < 0.3
    nothing = GroupStatistics(inputs, None, (np.zeros((1, 130, 130)),))
    assert quantize_trellis([weight], ["w"], statistics=nothing)[0].relative_error < 0.3


def test_large_layers_are_cut_into_blocks_of_outputs(rng: np.random.Generator) -> None:
    assert [output_rows(size) for size in (1, 576, 1024, 1536, 4096, 11008, 2050)] == [1, 576, 1024, 512, 1024, 256, 2]
    weight, inputs = 0.02 * gaussian(rng, 1536, 16), correlated(rng, 16)
    outputs = np.stack([correlated(rng, 512) for _ in range(3)])
    known = GroupStatistics(inputs, None, (outputs,))
    whole = quantize_trellis([weight], ["w"], statistics=known)[0]
    assert whole.packed.shape == (24, 4 * 112) and whole.relative_error < 0.3
    odd = 0.02 * gaussian(rng, 2050, 8)
    blocks = np.stack([np.eye(2)] * 1025)
    assert quantize_trellis([odd], ["w"], statistics=GroupStatistics(np.eye(8), None, (blocks,)))[0].relative_error < 0.3


def test_one_tile_of_outputs_has_nobody_to_tell() -> None:
    assert output_factor(np.eye(64), np.ones(64), 64).coefficients is None
    assert output_factor(np.eye(65), np.ones(65), 1).coefficients is not None


# targets for moved inputs


def test_division_by_a_hessian(rng: np.random.Generator) -> None:
    for size in (1, 5, 64, 150):
        hessian, matrix = correlated(rng, size), rng.standard_normal((7, size))
        factor = factorize(hessian, keep_lower=True)
        damped = hessian + factor.damping * hessian.trace() / size * np.eye(size)
        assert divide(matrix, factor) == pytest.approx(np.linalg.solve(damped, matrix.T).T, rel=1e-6, abs=1e-6 * np.abs(matrix).max())
        assert factorize(hessian).lower is None


def test_targets_make_up_for_moved_inputs(rng: np.random.Generator) -> None:
    """Against least squares on the inputs themselves, in the original basis."""
    original = rng.standard_normal((500, 32)) @ rng.standard_normal((32, 32))
    moved = original + 0.1 * rng.standard_normal((500, 32)) @ rng.standard_normal((32, 32))
    inputs, drift = moved.T @ moved / 500, (original - moved).T @ moved / 500
    scale = np.where(rng.random(32) < 0.5, 1.0, -1.0).astype(np.float32)
    metric = input_metric(GroupStatistics(inputs, drift), scale, 32)
    weight = gaussian(rng, 40, 32)
    rotated = rotation.hadamard_inputs(weight / scale, 32)
    back = rotation.hadamard_inputs(corrected(rotated, metric), 32) * scale
    damped = inputs + metric.factor.damping * inputs.trace() / 32 * np.eye(32)
    wanted = weight + DRIFT_SHARE * np.linalg.solve(damped, drift.T @ weight.T).T
    assert back == pytest.approx(wanted, abs=1e-4 * np.abs(wanted).max())
    before, after = (np.linalg.norm(original @ weight.T - moved @ matrix.T) for matrix in (weight, back))
    assert after < before
    assert corrected(rotated, input_metric(GroupStatistics(inputs), scale, 32)) is rotated


# scales


def test_output_scales_follow_what_matters(rng: np.random.Generator) -> None:
    norms, matters = rng.random(128) + 0.1, rng.random(128) ** 4
    for block in (1, 32, 128):
        same = scales.trellis_output_scale(norms, block, np.ones(128))
        assert same == pytest.approx(scales.trellis_output_scale(norms, block))
        scale = scales.trellis_output_scale(norms, block, matters)
        assert ((norms / scale).reshape(-1, block) ** 2).mean(axis=1) == pytest.approx(np.ones(128 // block))
        # The error of a block is white before s_out: scaled so, it does less damage than any other way around does.
        damage, other = (np.sum(matters * size**2) for size in (scale, same))
        assert damage <= other * (1 + 1e-9)
    assert np.array_equal(scales.trellis_output_scale(norms, 32, np.zeros(128)), scales.trellis_output_scale(norms, 32))


# widths by layer


def test_widths_meet_the_average_and_lower_the_loss(rng: np.random.Generator) -> None:
    sizes = [int(size) for size in rng.integers(1000, 5000, 60)]
    losses = [float(value) for value in np.exp(2 * rng.standard_normal(60))]
    total, earlier = sum(sizes), np.inf
    for average in (3.0, 3.1, 3.25, 3.5, 3.75, 4.0):
        widths = allocate(sizes, losses, average)
        stored = sum(bits * size for bits, size in zip(widths, sizes)) / 2 / total
        assert average - max(sizes) / total <= stored <= average and set(widths) <= {6, 7, 8}
        lost = sum(loss * DISTORTIONS[bits] for loss, bits in zip(losses, widths))
        assert lost < earlier
        earlier = lost
        if 2 * average in DISTORTIONS:
            assert lost <= DISTORTIONS[int(2 * average)] * sum(losses) * (1 + 1e-9)
        spread = allocate(sizes, None, average)
        assert average - max(sizes) / total <= sum(bits * size for bits, size in zip(spread, sizes)) / 2 / total <= average
    assert allocate(sizes, [0.0] * 60, 3.5).count(7) + allocate(sizes, [0.0] * 60, 3.5).count(8) > 0
    assert allocate([], None, 3.5) == [] and allocate([10], [1.0], 3.5) == [7]


def test_expected_loss_ranks_layers_like_the_real_one(rng: np.random.Generator) -> None:
    expected, real = [], []
    for size in (0.1, 1.0, 3.0):
        weight, inputs, outputs = 0.02 * gaussian(rng, 128, 64), size * correlated(rng, 64), np.diag(rng.random(128) + 0.1)
        known = GroupStatistics(inputs, None, (outputs[None],))
        expected.append(DISTORTIONS[BITS] * expected_loss([weight], known, 256))
        real.append(loss(dequantize(quantize_trellis([weight], ["w"], statistics=known)[0]) - weight, inputs, outputs))
    # Damping and the refit are not in it: it is for comparing layers, a factor common to all does not matter.
    assert np.array(expected) == pytest.approx(np.array(real), rel=0.7)
    assert expected == sorted(expected) and real == sorted(real)
    assert expected_loss([weight], GroupStatistics(inputs), 256) == 0.0
