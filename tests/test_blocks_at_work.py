"""Blocks of a model come to where they work and leave again, each in time; a processor stands in for a GPU."""

from __future__ import annotations

import gc
import weakref
from contextlib import closing
from pathlib import Path

import pytest
import torch

import test_calibration
from septet.calibration import Machine, calibrator
from septet.calibration.workers import each_at_work
from septet.quantize_gpu.uploads import copying
from test_calibration import AS_ON_A_GPU


def test_a_block_that_is_done_leaves_at_once(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copies on GPUs would take the place of the next one's until somebody looked for cycles."""
    made, passes = [], calibrator.Passes

    def noting(*arguments: object) -> object:
        made.append(weakref.ref(one := passes(*arguments)))
        return one

    monkeypatch.setattr(calibrator, "Passes", noting)
    gc.disable()
    try:
        test_calibration.run_through(lambda: test_calibration.load(tiny_model_dir), AS_ON_A_GPU)
        assert len(made) > 1 and all(one() is None for one in made)
    finally:
        gc.enable()


@pytest.mark.parametrize("machine", [Machine(), AS_ON_A_GPU, Machine(device="cpu:0", helpers=("cpu:1",))])
@pytest.mark.parametrize("seen", [1, 3])
def test_blocks_work_one_after_the_other_and_are_as_before(machine: Machine, seen: int) -> None:
    blocks = [torch.nn.Linear(4, 4, dtype=torch.bfloat16) for _ in range(3)]
    before = [block.weight.data for block in blocks]
    with closing(each_at_work(blocks, machine)) as each:
        for number, copies in zip(range(seen), each):
            assert list(copies) == list(machine.devices) and copies[machine.device] is blocks[number]
            for copied in copies.values():
                assert copied.weight.dtype == torch.float32 and torch.equal(copied.weight, before[number].float())
            assert [block.weight.dtype == torch.float32 for block in blocks] == [other == number for other in range(3)]
    assert all(block.weight.data_ptr() == data.data_ptr() for block, data in zip(blocks, before))


def test_what_blocks_share_comes_with_each_of_them() -> None:
    blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4, dtype=torch.bfloat16)) for _ in range(3)]
    for block in blocks:
        block.append(blocks[0][0])
    data = blocks[0][0].weight.data
    for copies in each_at_work(blocks, AS_ON_A_GPU):
        assert torch.equal(copies["cpu:0"][1].weight, data.float())
    assert all(block[1].weight.data_ptr() == data.data_ptr() and block[1].weight.dtype == torch.bfloat16 for block in blocks)


def test_what_is_on_a_gpu_already_is_not_read_from_the_host() -> None:
    """The device "meta" stands in for one, since its memory cannot be read here either."""
    there, here = torch.empty(3, device="meta"), torch.ones(2, 2, dtype=torch.bfloat16)
    with copying([there, here], "meta") as copied:
        first, second = copied()
    assert first.data_ptr() == there.data_ptr() and (second.device.type, second.shape, second.dtype) == ("meta", here.shape, here.dtype)
