"""Every bound the tests use, with its reason, so that a loosened one shows in a diff.

Integers, codes and bytes are compared exactly and have no entry here.
"""

from __future__ import annotations

import numpy as np

FLOAT32_UNIT = 2.0**-24
FLOAT16_UNIT = 2.0**-11
BFLOAT16_UNIT = 2.0**-8


def float_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """How far a float32 product in any order may be from the exact one: 2 K units of the sum of absolute terms.

    K float32 multiplications and K - 1 additions round once each; the factor 2 covers the float32 steps before and after.

    Args:
        x: [M, K], the activations as the product sees them.
        weight: [N, K], the dequantized weight.

    Returns:
        [M, N] float64, the absolute bound.
    """
    magnitude = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    return 2 * x.shape[1] * FLOAT32_UNIT * magnitude


def activation_rounding(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """How far int8 activations may move a product: half a step per input, the step being absmax / 127 of the token.

    Args:
        x: [M, K], the activations before they are quantized.
        weight: [N, K], the weight in the same basis.

    Returns:
        [M, N] float64, the absolute bound (without the float rounding of `float_product`).
    """
    step = np.abs(x).max(axis=1, keepdims=True).astype(np.float64) / 127
    return step / 2 * np.abs(weight).sum(axis=1, dtype=np.float64)[None, :]


def half_step(scale: np.ndarray) -> np.ndarray:
    """Largest error of rounding to a grid of step `scale` inside its range; two float32 roundings are on top.

    Args:
        scale: any shape, the step.

    Returns:
        The same shape, float64.
    """
    return np.asarray(scale, np.float64) * (0.5 + 4 * FLOAT16_UNIT)


#: A mean of float32 log-probabilities of a small model against float64: some tens of roundings, relative to exp() of the mean.
FLOAT32_MEAN = 1e-5
#: The same for a difference of two close log-probabilities (a divergence, a standard error), which loses two to three digits.
FLOAT32_DIFFERENCE = 1e-3
#: Logits of a float32 LLaMA from two programs that add in different orders, relative to the largest logit: some hundred roundings of
#: sums of a few hundred terms. SmolLM2 has 6e-6.
FLOAT32_LOGITS = 5e-5
#: How far two such programs are apart with int8 activations, in units of what int8 activations cost: a rounding decides which way an
#: activation goes, and one step of it changes everything after. Measured 1 to 2 on SmolLM2.
INT8_LOGITS = 3
#: A standard deviation estimated from 400 repeats is itself known to 1 / sqrt(800) = 3.5 %; three of these.
SPREAD_OF_400 = 0.106

#: Logits of a small model in float32, native engine against transformers, relative to their standard deviation: every sum rounds K times in
#: another order, and a few layers of norms and softmax pass that on. Measured up to 7e-6 with two layers; five times that.
ENGINE_FLOAT = 3.5e-5
#: The same with keys and values in float16: each is off by up to FLOAT16_UNIT, 5e-4, and large scores multiply that. Up to 3.2e-3.
ENGINE_FLOAT16_CACHE = 1e-2
#: Root mean square of what int8 activations do to the logits of a small random model, relative to their standard deviation. Measured up to
#: 2.7e-2; transformers on the same weights has the same to 3 %.
ENGINE_INT8 = 4e-2
#: The same for an int8 cache and float activations. Measured 6.4e-3 to 9.1e-3.
ENGINE_INT8_CACHE = 1.5e-2
