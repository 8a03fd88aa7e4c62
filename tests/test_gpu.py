"""What can be tested of the GPU kernels without a GPU: the layout, the Triton kernels in its interpreter, and that everything compiles.

test_cuda.py runs them on a card.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fused
from cuda_layout import same_layout
from needs import needs
from septet.codes.tile import tile_bytes
from septet.gpu import compiled, driver, many
from septet.gpu.layout import arrange, units_of
from septet.gpu.shares import shares

HERE = Path(__file__).parent
ARCHITECTURES = ("80", "90", "120")
needs_triton = needs("triton", "other tests here know the kernels' order and shares")
needs_nvrtc = needs("nvrtc", "other tests here know the kernels' order and shares")


@pytest.mark.parametrize(("rows", "tiles"), [(1, 16), (2, 37)])
@pytest.mark.parametrize("bits", [6, 7, 8])
def test_layout_gives_every_lane_its_tiles(bits, rows, tiles, rng) -> None:
    size = tile_bytes(bits)
    stored = rng.integers(0, 256, (rows, tiles * size)).astype(np.uint8)
    units, lane_bytes = units_of(4 * tiles), 8 * bits
    arranged = arrange(torch.from_numpy(stored), bits).numpy().reshape(rows, units, 32 * lane_bytes)
    whole = bits // 2 * 4
    for row, unit, lane in [(rows - 1, units - 1, 0), (0, 0, 31), (rows - 1, 0, 13)]:
        block = arranged[row, unit]
        vectors = [block[512 * v + 16 * lane :][:16] for v in range(lane_bytes // 16)]
        rest = block[512 * len(vectors) + lane_bytes % 16 * lane :][: lane_bytes % 16]
        mine = np.concatenate([*vectors, rest])
        for pair in range(2):
            joined = mine[pair * 4 * bits :][: 4 * bits]
            first = np.concatenate([joined[:whole], joined[whole : 2 * bits]])
            second = np.concatenate([joined[4 * bits - whole :], joined[2 * bits : 4 * bits - whole]])
            for which, chunk in enumerate((first, second)):
                tile = 16 * unit + 4 * (lane % 4) + 2 * pair + which
                begin = tile * size + 2 * bits * (lane // 4)
                wanted = stored[row, begin : begin + 2 * bits] if tile < tiles else np.zeros(2 * bits, np.uint8)
                assert np.array_equal(chunk, wanted)


def run(script: str, *arguments: str, **variables: str) -> str:
    """Run a file beside this one and return what it printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))} | variables
    result = subprocess.run([sys.executable, HERE / script, *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_triton
def test_triton_kernels_equal_the_reference_in_the_interpreter() -> None:
    assert run("triton_cases.py", TRITON_INTERPRET="1").strip() == ""


@needs_triton
def test_triton_kernels_compile(tmp_path) -> None:
    lines = run("triton_compile.py", *ARCHITECTURES, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert all(any(line.startswith(f"sm_{architecture} ") for line in lines) for architecture in ARCHITECTURES)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_kernels_compile(architecture) -> None:
    options = (f"--gpu-architecture=sm_{architecture}", "--std=c++17")
    sources = [
        compiled.layer_source(7, torch.bfloat16, compiled.LARGE, segmented=True) + same_layout("LayerArguments", compiled.LayerArguments),
        compiled.layer_source(6, torch.float32, compiled.SMALL, segmented=False),
        compiled.layer_source(8, torch.float16, compiled.SMALLEST, segmented=True),
        compiled.layer_source(7, torch.float32, compiled.SMALLEST, segmented=False),
        compiled.trellis_source("product.cu", bits=6, tokens=16),
        compiled.trellis_source("product.cu", bits=7, tokens=32),
        compiled.trellis_source("product.cu", bits=8, is_float=True, places=2),
        compiled.source_of("values.cu", "launch.cu", "activations.cu", E=2, DTYPE=1),
        compiled.trellis_source("levels.cu", bits=7, FOR_DENSE=1),
        compiled.trellis_source("levels.cu", bits=8, places=2, FOR_DENSE=0),
    ]
    for source in sources:
        assert driver.compile_source(source, options)[:4] == b"\x7fELF"


@pytest.mark.parametrize("blocks", [84, 108, 132])
@pytest.mark.parametrize("units", [1, 4, 9, 64, 448])
def test_shares_of_a_layer_are_all_of_it_and_even(units, blocks) -> None:
    for groups in (1, 3, 16, 43, 66, 112, 501):
        columns, used = units * groups, min(blocks, units * groups)
        for limit in (-(-columns // used), columns):
            share = shares(columns, groups, used, limit)
            first = [b * share.each + min(b, share.more) - max(0, b - share.late) * share.less for b in range(used + 1)]
            sizes = np.diff(first)
            assert first[0] == 0 and first[-1] == columns and sizes.min() >= 1
            assert sizes.max() == share.most <= min(limit, -(-columns // used) + 4)
            # the kernel finds the block of a column by the same numbers
            longer, shorter = share.more * (share.each + 1), share.late * share.each + share.more
            for block in range(used):
                for column in (first[block], first[block + 1] - 1):
                    if column >= shorter:
                        found = share.late + (column - shorter) // (share.each - share.less)
                    else:
                        ones = column < longer
                        found = column // (share.each + 1) if ones else share.more + (column - longer) // share.each
                    assert found == block


def test_the_smallest_layers_fit_twice_on_a_multiprocessor() -> None:
    """Of an H100: 228 KiB, of which each block loses one."""
    assert 2 * (compiled.SMALLEST.shared + 1024) <= 228 << 10 and 2 * (compiled.SMALL.shared + 1024) <= 228 << 10


@needs_nvrtc
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_hopper_kernels_compile(mode) -> None:
    dense = many.dense_source(mode, torch.bfloat16) + same_layout("DenseArguments", many._Arguments)
    inputs = [many.inputs_source(mode, torch.float16, whole) for whole in (False, True)]
    for architecture, source in [("90a", dense), *(("90", source) for source in inputs)]:
        assert driver.compile_source(source, (f"--gpu-architecture=sm_{architecture}", "--std=c++17"))[:4] == b"\x7fELF"


@pytest.mark.parametrize("tokens", [65, 512, 2048])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 8), (4096, 11008), (8192, 28672), (28672, 8192)])
def test_slabs_cover_a_matrix_and_are_bounded(inputs, outputs, tokens) -> None:
    for quantum in (128, 256):
        slab = many.plan(inputs, outputs, tokens, quantum, 132)
        assert slab.outputs % 256 == 0 and (slab.inputs % quantum == 0 or slab.inputs == inputs)
        one_wave = -(-slab.outputs // 256) * -(-tokens // 128) <= 132 // 2
        larger = one_wave and (tokens > 384 or inputs * outputs >= 64 << 20)
        assert slab.outputs * slab.inputs <= (128 if larger else 32) << 20


def test_fused_multiply_adds_of_the_tests_round_once() -> None:
    """Also where rounding to float64 first would lose what decides: (2^46 + 1) 2^-70 on top of 1 is a little more than half a unit."""
    scale, factor = np.float32([8384513 * 2.0**-70, 3.0]), np.float32([8392705, 5])
    assert fused.multiply_add(scale, factor, np.float32([1, 1])).tolist() == [1 + 2.0**-23, 16]
    assert fused.multiply_add(scale, -factor, np.float32([-1, 1])).tolist() == [-1 - 2.0**-23, -14]
    assert (scale * factor + np.float32([1, 1])).tolist() == [1, 16]


@needs_triton
def test_a_launch_gets_no_more_tokens_than_it_can_have(monkeypatch) -> None:
    """A grid has at most 65535 blocks along y."""
    from septet.gpu import layers

    def echo(x: torch.Tensor, *rest: object) -> torch.Tensor:
        assert len(x) <= 65535
        return x.clone()

    monkeypatch.setattr(layers, "_uses_cuda", lambda device: True)
    monkeypatch.setattr(layers.launches, "embed", echo)
    monkeypatch.setattr(layers.many, "takes", lambda *arguments: True)
    monkeypatch.setattr(layers.many, "linear", echo)
    indices, scale = torch.arange(100_000), torch.ones(3, dtype=torch.float16)
    assert torch.equal(layers.embedding(indices, indices[:, None], scale, scale, 1), indices)
    prepared = layers.Layer("trellis", 7, 1, 1, 1, 1, 1, scale, scale, scale, None, None, None)
    assert torch.equal(layers.linear(indices[:, None], scale, prepared, "int8"), indices[:, None])


@needs_triton
def test_gpus_without_the_instructions_get_triton_kernels(monkeypatch) -> None:
    from septet.gpu import layers

    monkeypatch.delenv(layers.GPU_VARIABLE, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(layers, "obstacle", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {70: (7, 5), 71: (8, 0)}[device])
    assert not layers._uses_cuda(torch.device("cuda:70"))
    assert layers._uses_cuda(torch.device("cuda:71"))


@needs_nvrtc
def test_a_mistake_in_a_kernel_is_shown() -> None:
    with pytest.raises(driver.BackendUnavailableError, match="septet.cu"):
        driver.compile_source("int f() { return x; }", ("--gpu-architecture=sm_90",))


def test_tables_in_the_document_are_the_result_files() -> None:
    outcome = subprocess.run([sys.executable, HERE.parent / "tools" / "draw_gpu.py", "--check"], check=False)
    assert outcome.returncode == 0, "run: python tools/draw_gpu.py"
