"""Floats -> codes and scales, and back.

`quantize_trellis`, `quantize_split`, `quantize_split_with_feedback` and `quantize_int8` make a `QuantizedTensor`, which knows the
arrays to store and their description; `dequantize` turns it into weights again. The same weights and options give the same bytes on
every machine and with any number of threads.
"""

from septet.quantize.head import quantize_int8
from septet.quantize.split import quantize_split, quantize_split_with_feedback
from septet.quantize.statistics import GroupStatistics
from septet.quantize.tensor import QuantizedTensor, dequantize
from septet.quantize.trellis import quantize_trellis

__all__ = [
    "GroupStatistics",
    "QuantizedTensor",
    "dequantize",
    "quantize_int8",
    "quantize_split",
    "quantize_split_with_feedback",
    "quantize_trellis",
]
