"""What a model's layers see and how much their errors matter, and text to find that out on.

`Calibrator` goes through the blocks of a loaded model while somebody else quantizes its layers; `measure` finds the sensitivity of its
predictions to them; `sample_windows` lets a model write its own calibration text. Only torch is needed; the model may be anything whose
blocks form a plain chain.
"""

from septet.calibration.calibrator import Calibrator
from septet.calibration.kept import Sensitivity
from septet.calibration.sampling import sample_windows
from septet.calibration.sensitivity import measure
from septet.calibration.workers import Machine

__all__ = ["Calibrator", "Machine", "Sensitivity", "measure", "sample_windows"]
