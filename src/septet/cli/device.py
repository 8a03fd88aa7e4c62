"""What `--device` means: who runs the model and who quantizes its layers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from septet.errors import OptionError

if TYPE_CHECKING:
    from septet.calibration import Machine
    from septet.checkpoint import QuantizeOptions
    from septet.checkpoint.jobs import Quantizer, Statistics
    from septet.model import LayerPlan
    from septet.quantize import GroupStatistics, QuantizedTensor
    from septet.quantize.tensor import RowSource

__all__ = ["check_device", "devices_of", "in_host_memory", "let_segments_grow", "machine_of", "quantizer_on"]


def devices_of(device: str) -> tuple[str, ...]:
    """The devices that a list with commas names; the first one leads. GPUs have a number: what is current differs from thread to thread."""
    return tuple("cuda:0" if name == "cuda" else name for name in device.split(","))


def machine_of(threads: int, device: str) -> Machine:
    """Where a model runs.

    Args:
        threads: of the processor; 0 is the default number.
        device: as `check_device` accepts it.
    """
    from septet.calibration import Machine

    first, *helpers = devices_of(device)
    return Machine(threads, first, tuple(helpers))


def let_segments_grow() -> None:
    """Ask torch for GPU memory in segments that grow, unless the user asks for something else; before it first takes any.

    Groups of layers differ so much in size that what one frees would lie in pieces too small for the next.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def check_device(device: str) -> None:
    """Raise unless there is such a device, or are such GPUs.

    Args:
        device: "cpu", "cuda", "cuda:0", "cuda:1", ...; several GPUs with commas between them.

    Raises:
        OptionError: another name, a GPU twice, torch cannot use a GPU, or Triton is missing.
    """
    if device == "cpu":
        return
    names = devices_of(device)
    numbers = [re.fullmatch(r"cuda(?::(\d+))?", name) for name in names]
    if None in numbers:
        raise OptionError("device must be cpu, cuda or cuda:N", device, "correct the option; several GPUs: cuda:0,cuda:1")
    wanted = [int(number[1] or 0) for number in numbers]
    if len({*wanted}) < len(wanted):
        raise OptionError("every GPU of a list must come once", device, "correct the option")
    try:
        import torch
    except ImportError as error:
        raise OptionError(f"device {device} must have torch", "no torch here", "pip install 'septet[hf]', or use --device cpu") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if max(wanted) >= count:
        hint = "install a torch that is built for CUDA beside a working driver, or use --device cpu"
        requirement = f"device {device} must be a GPU that torch can use"
        raise OptionError(requirement, f"{count} of them with torch {torch.__version__}", hint)
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
        threads: int,
        statistics: Statistics,
    ) -> Sequence[QuantizedTensor]:
        if layers[0].code != "trellis":
            found = statistics()
            return quantize_group(layers, matrices, options, threads, None if found is None else in_host_memory(found))
        first, *helpers = devices_of(device)
        settings = quantize_gpu.Settings(layers[0].bits_per_pair, options.rotation_block, options.seed, first, helpers=tuple(helpers))
        return quantize_gpu.quantize_trellis(list(matrices), [layer.name for layer in layers], settings, statistics)

    return quantize


def in_host_memory(statistics: GroupStatistics) -> GroupStatistics:
    """Statistics as NumPy arrays."""

    def array(matrix: Any) -> Any:
        return matrix if matrix is None or not hasattr(matrix, "cpu") else matrix.cpu().numpy()

    return replace(statistics, inputs=array(statistics.inputs), drift=array(statistics.drift))
