"""How fast kernels and models are: interleaved rounds, medians and spread, so that a busy moment hits every contender alike."""

from septet.bench.kernels import KernelCase, measure_kernels
from septet.bench.models import Contender, measure_models

__all__ = ["Contender", "KernelCase", "measure_kernels", "measure_models"]
