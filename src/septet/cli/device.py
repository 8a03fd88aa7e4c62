"""What `--device` means: who runs the model and who quantizes its layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from septet.errors import OptionError

if TYPE_CHECKING:
    from septet.checkpoint import QuantizeOptions
    from septet.checkpoint.jobs import Quantizer
    from septet.model import LayerPlan
    from septet.quantize import GroupStatistics, QuantizedTensor
    from septet.quantize.tensor import RowSource

__all__ = ["check_device", "in_host_memory", "quantizer_on"]


def check_device(device: str) -> None:
    """Raise unless there is such a device.

    Args:
        device: "cpu", "cuda", "cuda:0", "cuda:1", ...

    Raises:
        OptionError: another name, torch cannot use that GPU, or Triton is missing.
    """
    if device == "cpu":
        return
    named = re.fullmatch(r"cuda(?::(\d+))?", device)
    if named is None:
        raise OptionError("device must be cpu, cuda or cuda:N", device, "correct the option")
    try:
        import torch
    except ImportError as error:
        raise OptionError(f"device {device} must have torch", "no torch here", "pip install 'septet[hf]', or use --device cpu") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(named[1] or 0) >= count:
        hint = "install a torch that is built for CUDA beside a working driver, or use --device cpu"
        wanted = f"device {device} must be a GPU that torch can use"
        raise OptionError(wanted, f"{count} of them with torch {torch.__version__}", hint)
    if find_spec("triton") is None:
        raise OptionError(f"device {device} must have Triton", "no such package", "pip install triton, or use --device cpu")


def quantizer_on(device: str) -> Quantizer | None:
    """Who quantizes groups of layers; None: the usual one.

    Args:
        device: as `check_device` accepts it.
    """
    if device == "cpu":
        return None
    from septet import quantize_gpu
    from septet.checkpoint.jobs import quantize_group

    def quantize(
        layers: Sequence[LayerPlan],
        matrices: Sequence[RowSource],
        options: QuantizeOptions,
        threads: int = 0,
        statistics: GroupStatistics | None = None,
    ) -> list[QuantizedTensor]:
        if layers[0].code != "trellis":
            return quantize_group(layers, matrices, options, threads, None if statistics is None else in_host_memory(statistics))
        settings = quantize_gpu.Settings(layers[0].bits_per_pair, options.rotation_block, options.seed, device)
        return quantize_gpu.quantize_trellis(list(matrices), [layer.name for layer in layers], settings, statistics)

    return quantize


def in_host_memory(statistics: GroupStatistics) -> GroupStatistics:
    """Statistics as NumPy arrays."""

    def array(matrix: Any) -> Any:
        return matrix if matrix is None or not hasattr(matrix, "cpu") else matrix.cpu().numpy()

    return replace(statistics, inputs=array(statistics.inputs), drift=array(statistics.drift))
