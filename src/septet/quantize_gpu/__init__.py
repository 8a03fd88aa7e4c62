"""Quantizing with the trellis code on a GPU: what `septet.quantize` does in NumPy, in torch, with the encoder as a kernel.

The search and the feedback count in whole numbers, as on the processor, so the same inputs give the same bytes. Without statistics that
holds for whole tensors. Factorizations of Hessians are the GPU's own, in float64: with statistics bytes depend on the kind of GPU.
The encoder is CUDA C++ for GPUs with clusters (`clusters`), Triton elsewhere (`kernels`). Everything else runs on any device of torch,
which the tests use.
"""

from septet.quantize_gpu.trellis import dequantize, quantize_trellis
from septet.quantize_gpu.work import Settings

__all__ = ["Settings", "dequantize", "quantize_trellis"]
