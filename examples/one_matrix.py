"""One matrix, both codes, NumPy only: quantize, look at the cost, multiply with the packed weights."""

from __future__ import annotations

import numpy as np

from septet.kernels import LayerWeights, select_backend
from septet.quantize import QuantizedTensor, dequantize, quantize_split, quantize_trellis


def product(quantized: QuantizedTensor, x: np.ndarray) -> np.ndarray:
    """x @ weight.T from the packed bytes, with int8 activations, on the fastest backend of this machine."""
    backend = select_backend()
    out_features, in_features = quantized.shape
    layer = LayerWeights(
        code=quantized.code,
        bits_per_pair=quantized.bits_per_pair,
        in_features=in_features,
        out_features=out_features,
        packed=quantized.packed,
        scale=quantized.scale,
        offset=quantized.offset,
        input_scale=quantized.input_scale,
        input_block=quantized.input_block,
        output_block=quantized.output_block,
    )
    linear = {"trellis": backend.linear_trellis, "split": backend.linear_split}[quantized.code]
    return linear(x, backend.prepare(layer), "int8")


def main() -> None:
    """Quantize a Gaussian matrix with both codes and print what each costs."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((256, 512), dtype=np.float32)
    x = rng.standard_normal((4, 512), dtype=np.float32)
    exact = x @ weight.T
    print(f"backend {select_backend().NAME}; float32 takes {weight.nbytes:,} bytes")
    for quantized in (quantize_split(weight), quantize_trellis([weight], ["example"])[0]):
        error = np.linalg.norm(weight - dequantize(quantized)) / np.linalg.norm(weight)
        output_error = np.linalg.norm(product(quantized, x) - exact) / np.linalg.norm(exact)
        print(
            f"{quantized.code:8} {quantized.size_bytes:,} bytes, {quantized.effective_bits:.3f} bits a weight; "
            f"relative error of the weights {error:.3f}, of the product {output_error:.3f}"
        )


if __name__ == "__main__":
    main()
