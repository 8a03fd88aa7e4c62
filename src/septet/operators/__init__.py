"""torch operators on packed weights: septet::linear, septet::embedding, septet::dequantize.

They take tensors and plain numbers and strings, so torch.compile and export see them as opaque calls. The kernels are those of
`kernels.select_backend()`; what a backend prepares is kept per weight storage in `operators.prepared`.
Inference only: no gradient flows through them.
"""

from septet.operators.description import LayerDescription
from septet.operators.embedding import embedding
from septet.operators.linear import dequantize, linear
from septet.operators.prepared import forget_prepared, gpu_layer

__all__ = ["LayerDescription", "dequantize", "embedding", "forget_prepared", "gpu_layer", "linear"]
