"""Laws of error feedback: no correlation means plain rounding, batches change nothing, and the proxy loss falls."""

from __future__ import annotations

import numpy as np
import pytest

from septet.codes import trellis
from septet.codes.tile import WEIGHTS_PER_TILE, tiles_of_matrix
from septet.errors import OptionError, ShapeError
from septet.kernels import BACKEND_VARIABLE, select_backend
from septet.quantize import GroupStatistics, dequantize, quantize_trellis
from septet.quantize.factorization import Factor, factorize
from septet.quantize.feedback import Sheet, encode_sheets
from septet.quantize.refit import refit_output_scale

BITS = 7


def correlated_hessian(rng: np.random.Generator, inputs: int, tokens: int = 400) -> np.ndarray:
    """The Hessian of inputs that share a few directions, float64 [K, K]."""
    shared = rng.standard_normal((tokens, 4)) @ rng.standard_normal((4, inputs))
    rows = shared + 0.3 * rng.standard_normal((tokens, inputs))
    return rows.T @ rows / tokens


def gaussian(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def proxy_loss(errors: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """E H transpose(E) of each row, float64 [N]."""
    return np.einsum("nk,kj,nj->n", errors, hessian, errors)


def errors_of(rotated: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels / trellis.WIDTHS[BITS].levels_per_sigma - rotated.astype(np.float64)


def encode_with_feedback(rotated: np.ndarray, factor: Factor, bits: int, **options: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed and levels of one matrix whose outputs do not know each other."""
    return encode_sheets([Sheet(rotated)], factor, bits, **options)[0]


# the factor


@pytest.mark.parametrize("inputs", [1, 3, 4, 30, 150])
def test_factor_gives_the_damped_hessian_back(rng: np.random.Generator, inputs: int) -> None:
    hessian = correlated_hessian(rng, inputs)
    factor = factorize(hessian)
    damped = hessian + factor.damping * hessian.trace() / inputs * np.eye(inputs)
    lower = np.ldexp(factor.coefficients, -factor.shift) + np.eye(inputs)
    inner = np.linalg.solve(lower, np.linalg.solve(lower, damped).T)
    tile = np.arange(inputs) // 4
    outside = np.abs(np.where(tile[:, None] == tile, 0, inner)).max()
    assert outside <= 1e-6 * np.abs(damped).max()
    assert not np.triu(factor.coefficients[tile[:, None] <= tile]).any()
    assert factor.damping == 0.03 and np.prod(np.sign(factor.diagonal)) > 0
    assert np.log(factor.diagonal).sum() == pytest.approx(np.linalg.slogdet(damped)[1], abs=1e-6 * inputs)


def test_factor_keeps_feedback_sums_exact(rng: np.random.Generator) -> None:
    for inputs in (5, 64, 200):
        factor = factorize(correlated_hessian(rng, inputs, tokens=inputs // 2))
        assert np.array_equal(factor.coefficients, np.rint(factor.coefficients))
        assert np.abs(factor.coefficients).sum(axis=0).max() * 2.0**20 < 2.0**52


def test_singular_hessians_have_a_factor(rng: np.random.Generator) -> None:
    assert factorize(correlated_hessian(rng, 48, tokens=3)).damping == 0.03
    assert factorize(np.ones((16, 16))).damping == 0.03


def test_damping_rises_until_it_helps(rng: np.random.Generator) -> None:
    basis = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    values = np.ones(32)
    for smallest, damping in ((0, 0.03), (-0.06, 0.1), (-0.12, 0.3), (-3, None)):
        values[0] = smallest
        assert factorize((basis * values) @ basis.T).damping == damping
    assert factorize(np.zeros((8, 8))).coefficients is None
    assert factorize(None).coefficients is None


def test_damaged_inputs_are_dropped(rng: np.random.Generator) -> None:
    hessian = correlated_hessian(rng, 24)
    clean = hessian.copy()
    clean[[3, 10, 17]] = clean[:, [3, 10, 17]] = 0
    hessian[3] = hessian[:, 3] = np.nan
    hessian[10, 10] = np.inf
    hessian[17, 17] = -1
    assert np.array_equal(factorize(hessian).coefficients, factorize(clean).coefficients)
    assert factorize(np.full((8, 8), np.nan)).coefficients is None


def test_hessian_must_be_square() -> None:
    with pytest.raises(ShapeError, match="in_features"):
        factorize(np.ones((3, 4)))


# the encoder


def test_identity_hessian_is_plain_rounding(rng: np.random.Generator, backend: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, backend.NAME)
    rotated = gaussian(rng, 70, 10)
    plain = encode_with_feedback(rotated, Factor(None), BITS)
    for hessian in (np.eye(10), 1e-9 * np.eye(10), np.diag(np.arange(1.0, 11))):
        fed = encode_with_feedback(rotated, factorize(hessian), BITS)
        assert fed[0].tobytes() == plain[0].tobytes() and np.array_equal(fed[1], plain[1])
    fixed = tiles_of_matrix(trellis.to_fixed(rotated, BITS)).reshape(-1, WEIGHTS_PER_TILE)
    assert plain[0].reshape(2, 3, -1).shape[2] == 112
    assert np.array_equal(select_backend().unpack(plain[0], BITS).reshape(-1, 128), select_backend().trellis_encode(fixed, BITS))


@pytest.mark.parametrize("outputs, inputs", [(64, 64), (3, 37), (65, 20)])
def test_feedback_does_not_depend_on_its_batches(rng: np.random.Generator, outputs: int, inputs: int) -> None:
    rotated, factor = gaussian(rng, outputs, inputs), factorize(correlated_hessian(rng, inputs))
    whole = encode_with_feedback(rotated, factor, BITS, batch_inputs=64)
    for batch in (4, 12, 32):
        assert encode_with_feedback(rotated, factor, BITS, batch_inputs=batch)[0].tobytes() == whole[0].tobytes()
    assert encode_with_feedback(rotated, factor, BITS, threads=3)[0].tobytes() == whole[0].tobytes()


def test_outputs_do_not_know_each_other(rng: np.random.Generator) -> None:
    rotated, factor = gaussian(rng, 128, 24), factorize(correlated_hessian(rng, 24))
    whole = encode_with_feedback(rotated, factor, BITS)[0]
    assert np.array_equal(whole[1:], encode_with_feedback(rotated[64:], factor, BITS)[0])


def test_every_tile_is_encoded_at_its_target(rng: np.random.Generator) -> None:
    """Against the definition, with NumPy's own Cholesky factor."""
    rotated, hessian = gaussian(rng, 64, 16), correlated_hessian(rng, 16)
    _, levels = encode_with_feedback(rotated, factorize(hessian), BITS)
    cholesky = np.linalg.cholesky(hessian + 0.03 * hessian.trace() / 16 * np.eye(16))
    blocks = np.zeros((16, 16))
    for start in range(0, 16, 4):
        blocks[start : start + 4, start : start + 4] = cholesky[start : start + 4, start : start + 4]
    lower = cholesky @ np.linalg.inv(blocks)
    errors = errors_of(rotated, levels)
    for start in range(0, 16, 4):
        target = rotated[:, start : start + 4] - errors[:, start + 4 :] @ lower[start + 4 :, start : start + 4]
        again = encode_with_feedback(target.astype(np.float32), Factor(None), BITS)[1]
        # Rounding errors to 1/16 of a quarter level moves a few targets over an edge; the search is as close to them all the same.
        found, expected = (np.sqrt((errors_of(target, tile) ** 2).mean()) for tile in (levels[:, start : start + 4], again))
        assert found == pytest.approx(expected, rel=0.01)


def test_padding_is_encoded_as_zero(rng: np.random.Generator) -> None:
    rotated, factor = gaussian(rng, 5, 6), factorize(correlated_hessian(rng, 6))
    padded = np.zeros((64, 8), np.float32)
    padded[:5, :6] = rotated
    wide = Factor(np.pad(factor.coefficients, (0, 2)), factor.shift, factor.damping)
    # The last tile has no feedback, so its padding rows are those of plain rounding.
    last = encode_with_feedback(padded[:, 4:], Factor(None), BITS)[0]
    assert np.array_equal(encode_with_feedback(rotated, factor, BITS)[0][:, 112:], last)
    assert np.array_equal(encode_with_feedback(padded[:5], wide, BITS)[1][:, :4], encode_with_feedback(rotated, factor, BITS)[1][:, :4])


def test_feedback_lowers_the_loss(rng: np.random.Generator) -> None:
    rotated, hessian = gaussian(rng, 64, 64), correlated_hessian(rng, 64)
    factor = factorize(hessian)
    plain, fed = (errors_of(rotated, encode_with_feedback(rotated, chosen, BITS)[1]) for chosen in (Factor(None), factor))
    assert proxy_loss(fed, hessian).sum() < 0.25 * proxy_loss(plain, hessian).sum()
    assert (fed**2).mean() < 4 * (plain**2).mean()


def test_wrong_sizes_are_refused(rng: np.random.Generator) -> None:
    rotated, factor = gaussian(rng, 4, 8), factorize(correlated_hessian(rng, 12))
    with pytest.raises(ShapeError, match="8 inputs"):
        encode_with_feedback(rotated, factor, BITS)
    with pytest.raises(OptionError, match="multiple of 4"):
        encode_with_feedback(rotated, factor, BITS, batch_inputs=6)
    with pytest.raises(ShapeError, match="Hessian of layer"):
        quantize_trellis([rotated], ["layer"], statistics=GroupStatistics(np.eye(12)))


# the refit


def test_refit_never_raises_the_loss(rng: np.random.Generator) -> None:
    for block in (1, 8, 64):
        targets, hessian = gaussian(rng, 64, 24), correlated_hessian(rng, 24)
        levels = rng.integers(-127, 128, (64, 24)).astype(np.int8)
        scale = (rng.standard_normal(64) * 0.02).astype(np.float16)
        scale[5] = 0
        new = refit_output_scale(targets, levels, scale, hessian, block, "layer")
        mixing = np.kron(np.eye(64 // block), np.ones((1, 1))) if block == 1 else hadamard(64, block)
        rows = mixing @ levels
        before, after = (proxy_loss(targets - s.astype(np.float64)[:, None] * rows, hessian) for s in (scale, new))
        assert (after <= before * (1 + 1e-9)).all() and new[5] == 0
        assert (after < before).sum() > 20  # rows whose sign fits
        assert (np.sign(new) == np.sign(scale)).all()


def test_refit_finds_a_wrong_scale(rng: np.random.Generator) -> None:
    levels = rng.integers(-127, 128, (16, 12)).astype(np.int8)
    true = np.full(16, 0.25, np.float16)
    targets = (0.25 * (hadamard(16, 16) @ levels)).astype(np.float32)
    found = refit_output_scale(targets, levels, np.full(16, 0.3, np.float16), correlated_hessian(rng, 12), 16, "layer")
    assert np.array_equal(found, true)


def hadamard(size: int, block: int) -> np.ndarray:
    """The block Hadamard matrix, float64 [size, size]."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(size // block), matrix / np.sqrt(block))


# the quantizer


def test_quantizing_with_a_hessian_lowers_the_loss_of_outputs(rng: np.random.Generator) -> None:
    weights, hessian = [gaussian(rng, 64, 48) * 0.02, gaussian(rng, 32, 48) * 0.1], correlated_hessian(rng, 48)
    plain, fed = quantize_trellis(weights, ["q", "k"]), quantize_trellis(weights, ["q", "k"], statistics=GroupStatistics(hessian))
    for weight, before, after in zip(weights, plain, fed):
        losses = [proxy_loss((dequantize(made) - weight).astype(np.float64), hessian).sum() for made in (before, after)]
        assert losses[1] < 0.3 * losses[0]
        assert after.config().keys() == before.config().keys()
        assert after.relative_error < 3 * before.relative_error
    assert fed[0].input_scale.tobytes() == fed[1].input_scale.tobytes() == plain[0].input_scale.tobytes()


def test_a_useless_hessian_is_plain_rounding(rng: np.random.Generator) -> None:
    weight = gaussian(rng, 64, 8)
    plain = quantize_trellis([weight], ["layer"])[0]
    for hessian in (np.zeros((8, 8)), np.full((8, 8), np.nan)):
        fed = quantize_trellis([weight], ["layer"], statistics=GroupStatistics(hessian))[0]
        assert all(fed.tensors()[name].tobytes() == array.tobytes() for name, array in plain.tensors().items())


def test_feedback_does_not_depend_on_pieces_or_threads(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = gaussian(rng, 192, 32), correlated_hessian(rng, 32)
    whole = quantize_trellis([weight], ["layer"], statistics=GroupStatistics(hessian), threads=1)[0]
    monkeypatch.setattr("septet.quantize.trellis._FEEDBACK_PIECE_WEIGHTS", 1)
    pieces = quantize_trellis([weight], ["layer"], statistics=GroupStatistics(hessian), threads=2)[0]
    assert all(pieces.tensors()[name].tobytes() == array.tobytes() for name, array in whole.tensors().items())
