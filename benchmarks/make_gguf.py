"""Make llama.cpp files of a model, with an importance matrix from the same calibration text as everything else.

    python benchmarks/make_gguf.py MODEL TEMPLATE.gguf OUT --type Q4_K_M --type IQ4_XS
    python benchmarks/quality.py MODEL --judge OUT/Q4_K_M.gguf --name gguf-q4_k_m --family llama.cpp

llama.cpp's own library chooses and rounds, so the files are what its users get: some tensors have other types than the file is named
after, above all where rows are no multiple of 256. `septet eval` and `quality.py` print the bits that are really stored.

Only for the Llama architecture. TEMPLATE is any GGUF file of the same model: it gives the tokenizer and all other metadata.
Needs llama-cpp-python 0.3.x and gguf.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from quality_judge import calibration_windows
from quality_results import Slice

from septet import loading, model
from septet.calibration import Calibrator
from septet.checkpoint import QuantizeOptions
from septet.cli.output import quiet_libraries

__all__ = ["importance_of", "quantize_file", "write_bfloat16"]

SAMPLE = Path(__file__).resolve().parent.parent / "src" / "septet" / "data" / "sample.txt"
_KEEP_OUT = {"general.architecture", "general.file_type", "general.quantization_version"}


def main() -> int:
    """Write the files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("template", type=Path, help="a .gguf file of the same model")
    parser.add_argument("out", type=Path, help="folder of the files")
    parser.add_argument("--type", action="append", required=True, help="as llama.cpp calls it; several times for several files")
    parser.add_argument("--calibration-text", type=Path, default=SAMPLE)
    parser.add_argument("--calibration-bytes", type=Slice.parse_range, default=(0, 200_000), metavar="FROM:TO")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    arguments = parser.parse_args()
    quiet_libraries()
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = arguments.out / "BF16.gguf"
    if not base.exists():
        write_bfloat16(arguments.model, arguments.template, base)
    text = Slice.read(arguments.calibration_text, arguments.calibration_bytes).content
    importance = importance_of(arguments.model, calibration_windows(arguments.model, text, 512, arguments.calibration_tokens))
    for name in arguments.type:
        status = quantize_file(base, arguments.out / f"{name}.gguf", name, importance)
        print(f"{name}: {'written' if status == 0 else f'llama.cpp refused, status {status}'}")
    return 0


def write_bfloat16(directory: Path, template: Path, out: Path) -> None:
    """Write a dense model as GGUF: matrices in bfloat16, vectors in float32.

    Args:
        directory: a Hugging Face directory of a Llama model.
        template: whose metadata to copy.
        out: the file.
    """
    source = loading.load_model(directory)
    reader, writer = gguf.GGUFReader(template), gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in _KEEP_OUT:
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.config.num_hidden_layers)
    wanted = {tensor.name for tensor in reader.tensors}
    for key, parameter in source.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        if name not in wanted:
            continue
        values = _file_order(key, parameter.detach().float().numpy(), source.config)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _file_order(key: str, values: np.ndarray, config: object) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a query or key head, transformers rows half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if heads is None:
        return values
    rows, columns = values.shape
    return np.ascontiguousarray(values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns))


def importance_of(directory: Path, windows: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean squares of the inputs of every linear layer: tensor name in the file -> float32 [K]."""
    net = loading.load_model(directory)
    layers = model.plan(net, QuantizeOptions(head="keep"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, net.config.num_hidden_layers)
    calibrator, importance = Calibrator(net, layers, windows), {}
    for layer in layers:
        known = calibrator.statistics([layer])
        importance[names.get_name(f"{layer.name}.weight", try_suffixes=(".weight",))] = known.inputs.diagonal().astype(np.float32)
    return importance


def quantize_file(source: Path, out: Path, name: str, importance: dict[str, np.ndarray]) -> int:
    """Let llama.cpp quantize a file; returns its status, 0 is good.

    Args:
        source: a dense .gguf file.
        out: the new one.
        name: of the type, such as "Q4_K_M".
        importance: float32 [K] by tensor name; kept alive during the call.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    parameters.nthread = torch.get_num_threads()
    # The list ends with an entry without a name.
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (tensor, values) in zip(entries, importance.items()):
        entry.name, entry.size = tensor.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    parameters.imatrix = entries
    return llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))


if __name__ == "__main__":
    sys.exit(main())
