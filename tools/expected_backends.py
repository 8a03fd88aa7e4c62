"""Print the backends and instruction sets that must work on this machine, for SEPTET_EXPECT_BACKENDS.

The answer comes from the machine, not from septet: a build that lost a backend would otherwise test less and look green.
"""

from __future__ import annotations

from pathlib import Path

# What the native library needs for each instruction set, in the words of /proc/cpuinfo.
AVX2 = {"avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
REQUIRED_FLAGS = {"avx2": AVX2, "avx512": AVX512, "avx512vbmi": AVX512 | {"avx512vbmi", "avx512_vnni"}}


def cpu_flags() -> set[str]:
    """The flags of the first processor; nothing on a processor that is not x86."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


if __name__ == "__main__":
    flags = cpu_flags()
    print(",".join(["reference", "native", "scalar", *(name for name, needed in REQUIRED_FLAGS.items() if needed <= flags)]))
