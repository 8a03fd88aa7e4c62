"""Search the constants of the trellis code: a hash multiplier per width, and the magnitudes of the level table.

    python tools/search_trellis.py compare                     # mean squared error of the constants in septet.codes.trellis
    python tools/search_trellis.py multipliers 7 --count 12000 # the best random multipliers by screening on more and more tiles
    python tools/search_trellis.py train 7 0x658981FC          # magnitudes as centroids of the encoder's own choices

Everything is measured on unit Gaussians from a fixed seed, with the exact encoder of the native backend; results go to stdout.
docs/log.md says which figures decided.
"""

from __future__ import annotations

import argparse
from statistics import NormalDist

import numpy as np

from septet import _native
from septet.codes.trellis import FIXED_LIMIT, FIXED_PER_LEVEL, LEVEL_TABLE, WIDTHS, windows_of_symbols

SEED = 21
#: Tiles of each screening round, and how many multipliers survive it.
ROUNDS = ((8, 100), (64, 30), (512, 10))
LARGEST = 127


def gaussian_tiles(count: int, seed: int = SEED) -> np.ndarray:
    """float64 [count, 256]."""
    return np.random.default_rng(seed).standard_normal((count, 256))


def hash_all(multiplier: int) -> np.ndarray:
    """The hash of all 65536 windows, int64."""
    return (np.arange(1 << 16, dtype=np.uint64) * np.uint64(multiplier) >> np.uint64(16) & np.uint64(0xFFFF)).astype(np.int64)


def levels_of(multiplier: int, table: np.ndarray) -> np.ndarray:
    """int8 [65536, 2]."""
    hashed = hash_all(multiplier)
    return np.stack([table[hashed & 127], table[hashed >> 8 & 127]], axis=1).astype(np.int8)


def choose(values: np.ndarray, levels: np.ndarray, bits: int, per_sigma: float) -> np.ndarray:
    """Windows int64 [tiles, 128] that the encoder chooses."""
    fixed = np.clip(np.rint(values * per_sigma * FIXED_PER_LEVEL), -FIXED_LIMIT, FIXED_LIMIT).astype(np.int16)
    return windows_of_symbols(_native.trellis_search(levels, fixed, bits), bits).astype(np.int64)


def error_of(values: np.ndarray, levels: np.ndarray, bits: int, per_sigma: float) -> float:
    """Mean squared error of encoding `values`."""
    decoded = levels[choose(values, levels, bits, per_sigma)].reshape(values.shape) / per_sigma
    return float(((decoded - values) ** 2).mean())


def quantile_magnitudes() -> np.ndarray:
    """Centroids of 128 equally likely bins of a Gaussian, the positive 64, the largest 127."""
    normal = NormalDist()
    edges = [normal.inv_cdf(0.5 + i / 128) for i in range(64)]
    density = np.array([normal.pdf(edge) for edge in edges] + [0.0])
    centroids = density[:-1] - density[1:]
    return centroids / centroids.max() * LARGEST


def table_of(magnitudes: np.ndarray) -> np.ndarray:
    """T, int64 [128], sign-magnitude."""
    rounded = np.clip(np.rint(magnitudes), 1, LARGEST).astype(np.int64)
    return np.concatenate([rounded, -rounded])


def compare() -> None:
    """Print the error of each width as it ships."""
    values = gaussian_tiles(2048)
    for bits, width in WIDTHS.items():
        levels = levels_of(width.multiplier, np.array(LEVEL_TABLE))
        print(f"{bits} bits, 0x{width.multiplier:08X}: {error_of(values, levels, bits, width.levels_per_sigma):.6f}")


def multipliers(bits: int, count: int) -> None:
    """Print the best of `count` random multipliers."""
    candidates = [int(c) for c in np.random.default_rng(bits).integers(1, 1 << 32, count, dtype=np.uint64)]
    table, per_sigma = np.array(LEVEL_TABLE), WIDTHS[bits].levels_per_sigma
    for tiles, kept in ROUNDS:
        values = gaussian_tiles(tiles)
        ranked = sorted((error_of(values, levels_of(c, table), bits, per_sigma), c) for c in candidates)
        candidates = [c for _, c in ranked[:kept]]
        print(f"{tiles} tiles: " + ", ".join(f"0x{c:08X} {error:.6f}" for error, c in ranked[:5]), flush=True)


def train(bits: int, multiplier: int, rounds: int = 4) -> None:
    """Print magnitudes after each round of: encode, then move each magnitude to the mean of what it stands for."""
    hashed, magnitudes, per_sigma = hash_all(multiplier), quantile_magnitudes(), WIDTHS[bits].levels_per_sigma
    training, held_out = gaussian_tiles(1024, SEED + 1), gaussian_tiles(1024, SEED + 2)
    for number in range(rounds):
        levels = levels_of(multiplier, table_of(magnitudes))
        error = error_of(held_out, levels, bits, per_sigma)
        print(f"round {number}: held-out error {error:.6f}, {per_sigma:.2f} levels a sigma", table_of(magnitudes)[:64].tolist(), flush=True)
        chosen = hashed[choose(training, levels, bits, per_sigma)]
        index = np.stack([chosen & 127, chosen >> 8 & 127], axis=-1).reshape(training.shape)
        signed = np.where(index >= 64, -training, training)
        sums = np.bincount((index & 63).ravel(), signed.ravel(), 64) / np.bincount((index & 63).ravel(), minlength=64)
        moved = np.maximum.accumulate(sums * per_sigma)
        per_sigma *= LARGEST / moved.max()
        magnitudes = moved * LARGEST / moved.max()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("compare")
    search = commands.add_parser("multipliers")
    search.add_argument("bits", type=int, choices=sorted(WIDTHS))
    search.add_argument("--count", type=int, default=4000)
    training = commands.add_parser("train")
    training.add_argument("bits", type=int, choices=sorted(WIDTHS))
    training.add_argument("multiplier", type=lambda text: int(text, 0))
    chosen = parser.parse_args()
    if chosen.command == "compare":
        compare()
    elif chosen.command == "multipliers":
        multipliers(chosen.bits, chosen.count)
    else:
        train(chosen.bits, chosen.multiplier)


if __name__ == "__main__":
    main()
