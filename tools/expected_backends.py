"""Print the backends and instruction sets that must work on this machine, for SEPTET_EXPECT_BACKENDS.

The answer comes from the machine, not from septet: a build that lost a backend would otherwise test less and look green. What `make test`
always installs is always expected; cuda, two-gpus and hopper where torch is built for CUDA and the machine has such GPUs, and the packages
of OPTIONAL where they are installed.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

# What the native library needs for each instruction set, in the words of /proc/cpuinfo.
AVX2 = {"avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
VBMI = AVX512 | {"avx512vbmi", "avx512_vbmi2", "avx512_vnni"}
DOTPROD = {"asimd", "asimddp"}
REQUIRED_FLAGS = {
    "avx2": AVX2,
    "avxvnni": AVX2 | {"avx_vnni", "gfni"},
    "avx512": AVX512,
    "avx512vbmi": VBMI,
    "amx": VBMI | {"amx_tile", "amx_int8"},
    "neon": {"asimd"},
    "neon-dotprod": DOTPROD,
    "neon-i8mm": DOTPROD | {"i8mm"},
}

#: What the build takes for each Fortran compiler, in the order in which it looks.
FORTRAN = {"gfortran": ("gfortran",), "flang": ("flang-22", "flang", "flang-new")}


def fortran_backends() -> list[str]:
    """`fortran` and the compilers that are installed; nothing without any."""
    found = [name for name, programs in FORTRAN.items() if any(map(shutil.which, programs))]
    return ["fortran", *found] if found else []


def cpu_flags() -> set[str]:
    """What the first processor can do; nothing on one that is neither x86 nor ARM."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


#: What `make test` builds and installs everywhere, or ends with an error: tests import it, none is skipped for want of it.
ALWAYS = ("reference", "native", "scalar", "torch", "transformers", "gguf")
#: Packages without which tests are skipped: name of the backend -> how their names begin (NVRTC's may end in CUDA's version).
OPTIONAL = {"triton": "triton", "nvrtc": "nvidia-cuda-nvrtc", "llama-cpp": "llama-cpp-python"}
#: Programs that tests run, each by any of its names: they are installed by make test where it may.
PROGRAMS = {
    "emulated-neon": [("aarch64-linux-gnu-g++",), ("qemu-aarch64-static", "qemu-aarch64")],
    "mlir": [(name,) for name in ("flang-22", "fir-opt-22", "tco-22", "mlir-opt-22", "mlir-translate-22", "clang-22")],
}


def toolchains() -> list[str]:
    """Those of PROGRAMS of which all are installed."""
    return [name for name, programs in PROGRAMS.items() if all(any(map(shutil.which, names)) for names in programs)]


def gpu_backends() -> list[str]:
    """`cuda`, `two-gpus` and `hopper`, as far as the machine has such GPUs of NVIDIA's and the installed torch is built for them."""
    import torch

    count = len(list(Path("/dev").glob("nvidia[0-9]*"))) if torch.version.cuda else 0
    found = ["cuda", "two-gpus"][: min(count, 2)]
    return [*found, "hopper"] if found and torch.cuda.get_device_capability() == (9, 0) else found


def optional_backends() -> list[str]:
    """Those of OPTIONAL that pip has installed to the end: what a broken download left has files, but no record of them."""
    installed = [(found.name or "").lower().replace("_", "-") for found in importlib.metadata.distributions()]
    return [name for name, package in OPTIONAL.items() if any(f"{found}-".startswith(f"{package}-") for found in installed)]


if __name__ == "__main__":
    flags = cpu_flags()
    sets = [name for name, needed in REQUIRED_FLAGS.items() if needed <= flags]
    print(",".join([*ALWAYS, *sets, *fortran_backends(), *toolchains(), *gpu_backends(), *optional_backends()]))
