"""Text on a GPU: models of the Llama family, loaded by transformers, one kernel launch per token for all their layers.

`GpuEngine(model)` refuses what it does not know with UnsupportedModelError, and callers then go on with transformers.
"""

from septet.gpu_engine.engine import GpuEngine

__all__ = ["GpuEngine"]
