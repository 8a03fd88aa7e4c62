"""Layers on a GPU: CUDA C++ kernels compiled where they run, and Triton for everything else; see `layers`.

Nothing here is imported before a tensor on a GPU is met. Results with int8 activations and one scale per token have the bits of the CPU's;
with one scale per block, the few-token kernels add the segments in another, fixed order.
"""
