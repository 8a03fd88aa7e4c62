"""What a model's layers see: Hessians of their inputs, block by block behind the already quantized prefix, and text to collect them on.

`Calibrator` goes through the blocks of a loaded model while somebody else quantizes its layers; `sample_windows` lets a model write its
own calibration text. Only torch is needed; the model may be anything whose blocks form a plain chain.
"""

from septet.calibration.calibrator import Calibrator
from septet.calibration.sampling import sample_windows

__all__ = ["Calibrator", "sample_windows"]
