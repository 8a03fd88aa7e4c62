"""Compile the Triton kernels for the architectures named on the command line, without a GPU. Prints one line per kernel."""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from septet.codes.trellis import WIDTHS
from septet.gpu import triton_kernels as kernels
from septet.quantize_gpu import kernels as quantizing

_PACKED = {
    "packed": "*u8", "table": "*i8", "x": "*i8", "x_scale": "*fp32", "weight_scale": "*fp32", "weight_offset": "*fp32",
    "x_sums": "*fp32", "y": "*fp32", "inputs": "i32", "outputs": "i32", "tiles": "i32", "segment": "i32", "segments": "i32",
    "tokens": "i32", "scale_stride": "i32",
}  # fmt: skip
_DENSE = {
    "weights": "*i8", "x": "*i8", "x_scale": "*fp32", "row_scale": "*fp32", "y": "*fp32", "inputs": "i32", "outputs": "i32",
    "tokens": "i32", "segments": "i32", "x_stride": "i32", "weight_stride": "i32", "y_stride": "i32",
}  # fmt: skip
_HADAMARD = {"matrix": "*fp32", "out": "*fp32", "others": "i32", "other_step": "i32", "step": "i32"}


def variants() -> list[tuple[str, object, dict, dict]]:
    """Name, kernel, argument types and constants."""
    sizes = {"OUTPUTS": 64, "TOKENS": 16, "PAIRS": 32}
    trellis = {"BITS": 7, "MULTIPLIER": WIDTHS[7].multiplier, "SPLIT": False, "OFFSET": False, "FLOAT": False} | sizes
    dense = {"ROW_SCALE": True, "FLOAT": False, "SEGMENTED": False, "OUTPUTS": 64, "TOKENS": 16, "INPUTS": 128, "GROUP": 8}
    many = {"OUTPUTS": 128, "TOKENS": 128}
    hadamard = {"BLOCK": 256, "STAGES": 8, "TOGETHER": 32, "SCALE": 1 / 16}
    wide = {"matrix": "*fp64", "out": "*fp64"}
    return [
        ("trellis", kernels.packed_product, _PACKED, trellis),
        ("trellis, float", kernels.packed_product, _PACKED | {"x": "*fp32"}, trellis | {"FLOAT": True}),
        ("split", kernels.packed_product, _PACKED, trellis | {"SPLIT": True, "OFFSET": True}),
        ("rotation along inputs", quantizing._hadamard_blocks, _HADAMARD, hadamard | {"step": 1}),
        ("rotation along outputs, wide", quantizing._hadamard_blocks, _HADAMARD | wide, hadamard | {"other_step": 1, "TOGETHER": 16}),
        ("dense", kernels.dense_product, _DENSE, dense),
        ("dense, many tokens", kernels.dense_product, _DENSE, dense | {"ROW_SCALE": False, "SEGMENTED": True} | many),
    ]


def main() -> None:
    """Compile everything for the first architecture named, two kernels for the others."""
    for number, architecture in enumerate(map(int, sys.argv[1:])):
        # everything for the first, the kernels that use tensor cores differently for the others
        for name, kernel, types, constants in variants() if number == 0 else variants()[:1] + variants()[-1:]:
            signature = types | dict.fromkeys(constants, "constexpr")
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"enable_fp_fusion": False})
            fused = compiled.asm["ptx"].count("fma.rn.f32")
            assert "float" in name or fused == 0, f"{name}: {fused} fused multiply-adds would change the CPU's rounding"
            print(f"sm_{architecture} {name}: {len(compiled.asm['cubin'])} bytes")


if __name__ == "__main__":
    main()
