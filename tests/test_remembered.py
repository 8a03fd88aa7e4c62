"""Finished parts of a block are computed once per window, and again as soon as anything else comes in."""

from __future__ import annotations

import torch
from torch import nn

from septet.calibration.remembered import Remembered

LAYERS = frozenset({"first.a", "first.b", "second"})


class Counting(nn.Linear):
    """A layer that counts its calls."""

    calls = 0

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(rows)


class Part(nn.Module):
    """Two layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Counting(4, 4), Counting(4, 4)

    def forward(self, rows: torch.Tensor, *, factor: float = 1.0) -> tuple[torch.Tensor, None]:
        return self.a(rows) + factor * self.b(rows), None


class Block(nn.Module):
    """A part, and a layer behind it that reads what the part gave and changes it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Part(), Counting(4, 4)

    def forward(self, rows: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        state, _ = self.first(rows, factor=factor)
        state += 1
        return self.second(state)


def run(block: Block, memory: Remembered, done: set[str], rows: torch.Tensor, number: int = 0, factor: float = 1.0) -> torch.Tensor:
    with torch.no_grad(), memory.reusing(LAYERS, frozenset(done)):
        memory.window(number)
        return block(rows, factor)


def test_only_finished_parts_are_remembered() -> None:
    block, rows = Block(), torch.randn(3, 4)
    memory, calls = Remembered(block), lambda: (block.first.a.calls, block.second.calls)
    with torch.no_grad():
        expected = block(rows)
    counted = []
    for done in ({"first.a"}, {"first.a"}, {"first.a", "first.b"}, {"first.a", "first.b"}, set(LAYERS), set(LAYERS)):
        assert torch.equal(run(block, memory, done, rows), expected)
        counted.append(calls())
    # Half a part is asked every time, a whole one once, like the last layer.
    assert counted == [(2, 2), (3, 3), (4, 4), (4, 5), (4, 6), (4, 6)]
    assert "forward" not in block.first.__dict__, "outside of the context the block is as it was"


def test_the_last_pass_remembers_nothing() -> None:
    block, rows = Block(), torch.randn(3, 4)
    memory = Remembered(block)
    for _ in range(2):
        with torch.no_grad(), memory.reusing(LAYERS, LAYERS, last=True):
            memory.window(0)
            block(rows)
    assert block.second.calls == 2


def test_another_window_or_argument_is_computed_anew() -> None:
    block, rows = Block(), torch.randn(3, 4)
    memory, done = Remembered(block), set(LAYERS)
    first = run(block, memory, done, rows)
    assert not torch.equal(run(block, memory, done, rows, factor=2.0), first)
    assert not torch.equal(run(block, memory, done, rows + 1, number=1), first)
    assert torch.equal(run(block, memory, done, rows), first)


def test_on_a_gpu_the_first_window_says_for_all_whether_a_part_gets_the_same() -> None:
    """A processor stands in for it."""
    block, rows = Block(), [torch.randn(3, 4) for _ in range(3)]
    memory = Remembered(block, "cpu:0", torch.clone)

    def run_pass(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        made = []
        with torch.no_grad(), memory.reusing(LAYERS, {"first.a", "first.b"}):
            for number, one in enumerate(inputs):
                memory.window(number)
                made.append(block(one))
        return made

    first = run_pass(rows)
    assert block.first.a.calls == 3
    for again in (run_pass(rows), run_pass(rows)):
        assert block.first.a.calls == 3 and all(map(torch.equal, again, first))
    others = [one + 1 for one in rows]
    changed = run_pass(others)
    assert block.first.a.calls == 6 and not any(map(torch.equal, changed, first))
    assert all(map(torch.equal, run_pass(others), changed)) and block.first.a.calls == 6
