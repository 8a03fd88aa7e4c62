"""One token through all layers of a decoder in one launch: the steps of token.cu, made once from layers and norms.

The kernel reads the packed weights of the layers where they lie. Keys and values are in a cache of its own. All its work memory belongs
to it, so it must not run on two streams at the same time.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

from septet.errors import UnsupportedModelError
from septet.gpu import compiled
from septet.gpu.layers import Layer
from septet.gpu.layout import UNIT_INPUTS, units_of
from septet.gpu.position import Position
from septet.gpu.shares import CHUNK, GROUP_ROWS

__all__ = ["Block", "Sizes", "TokenKernel", "check_blocks", "shared_bytes"]

_P, _I, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_ATTENTION, _PLAIN, _RESIDUAL, _GATED = range(4)
_HEADS = (32, 64, 128)
#: Query heads that share a block of threads.
_QUERIES = 4
#: Inputs of a product that fit into shared memory beside sums, where there are many blocks of threads.
_MOST_INPUTS = 49152
_HINT = "run this model through transformers"


class _Step(ctypes.Structure):
    """Step of steps.cu."""

    _fields_ = [
        *((name, _P * 3) for name in ("weights", "output_scale", "bias")),
        *(("norm", _P), ("input_scale", _P), ("head_norms", _P * 2), ("keys", _P), ("values", _P)),
        *((name, _I) for name in ("kind", "units", "rows", "parts", "segment_shift", "input_block", "groups")),
        *((name, _I * 3) for name in ("part_rows", "part_outputs", "output_block")),
        *(("output_normal", _F * 3), ("input_normal", _F)),
    ]


class _Token(ctypes.Structure):
    """Token of steps.cu."""

    _fields_ = [
        *((name, _P) for name in ("steps", "hidden", "projected", "square_sums")),
        *(("inputs", _P * 2), ("scales", _P * 2)),
        *((name, _P) for name in ("slots", "partial", "weights_of_partial", "tag", "position", "cosines", "sines")),
        *((name, _I) for name in ("first", "last", "hidden_size", "heads", "kv_heads", "length", "one")),
        *(("epsilon", _F), ("scaling", _F)),
    ]


@dataclass(frozen=True, eq=False)
class Block:
    """A layer of a decoder: linear layers with their biases, and norms, on one GPU.

    Args:
        projections: of queries, keys and values; they share their inputs.
        output: of attention.
        gated: gate and up; they share their inputs.
        down: back to the residual stream.
        biases: of these seven in this order, in the model's dtype, or None.
        norms: before attention and before gate, in the model's dtype.
        head_norms: of queries and keys, or None.
    """

    projections: tuple[Layer, Layer, Layer]
    output: Layer
    gated: tuple[Layer, Layer]
    down: Layer
    biases: tuple[torch.Tensor | None, ...]
    norms: tuple[torch.Tensor, torch.Tensor]
    head_norms: tuple[torch.Tensor | None, torch.Tensor | None]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The seven linear layers."""
        return (*self.projections, self.output, *self.gated, self.down)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder.

    Args:
        hidden: of the residual stream.
        heads, kv_heads, head: query heads, key-value heads, numbers of a head.
        length: most tokens of a text.
        epsilon: of the norms.
        scaling: of attention scores.
        dtype: of the model.
    """

    hidden: int
    heads: int
    kv_heads: int
    head: int
    length: int
    epsilon: float
    scaling: float
    dtype: torch.dtype


def check_blocks(blocks: list[Block], sizes: Sizes) -> None:
    """Raise unless the kernel knows layers of this kind.

    Raises:
        UnsupportedModelError: another code, mixed widths, other Hadamard blocks or heads.
    """
    layers = [layer for block in blocks for layer in block.layers]
    known = all(layer.arranged is not None for layer in layers)
    checks = (
        (known, "its layers must be of code trellis and run in CUDA", "others"),
        (len({layer.bits for layer in layers}) == 1, "its layers must have one width", "several"),
        (all(layer.input_block in (64, 128, 256) for layer in layers), "its input blocks must be 64, 128 or 256", "others"),
        (all(layer.segment == layer.input_block for layer in layers), "it must have an activation scale per block", "one per token"),
        (all(layer.output_block <= CHUNK for layer in layers), "its output blocks must be at most 256", "larger ones"),
        (all(layer.inputs <= _MOST_INPUTS for layer in layers), f"its layers must have at most {_MOST_INPUTS} inputs", "more"),
        (all(layer.outputs % 8 == 0 for layer in layers), "its outputs must come in multiples of 8", "others"),
        (sizes.head in _HEADS, f"its heads must have {_HEADS} numbers", sizes.head),
        (sizes.heads % sizes.kv_heads == 0, "each key-value head must have as many query heads", f"{sizes.heads} and {sizes.kv_heads}"),
    )
    for holds, requirement, got in checks:
        if not holds:
            raise UnsupportedModelError(f"for the GPU's decode kernel, {requirement}", got, _HINT)


def shared_bytes(units: int, rows: int, grid: int) -> int:
    """Shared memory that a product takes below the tables, as `Memory` of steps.cu lays it out.

    Args:
        units: along the inputs.
        rows: of 64 outputs, of all parts.
        grid: blocks of threads that divide the units.
    """
    all_units = units * rows
    most = -(-all_units // min(grid, all_units))
    touched = (most + units - 2) // units + 1
    steps, row_bytes = -(-3 * ctypes.sizeof(_Step) // 16) * 16, 64 * 4
    return steps + units * UNIT_INPUTS + -(-units // 4) * 16 + (compiled.TOKEN_WARPS + touched - 1) * row_bytes


class TokenKernel:
    """Decodes one token per call.

    Args:
        blocks: all layers of the decoder, as `check_blocks` accepts them.
        sizes: of the decoder.
        norm: the final one.
        rotary: cosines and sines, float32 [length, head / 2].

    Attributes:
        cache: keys and values, [layers, 2, kv_heads, length, head].
        position: where the next token stands.

    Raises:
        UnsupportedModelError: layers that `check_blocks` refuses, or too many outputs for a small GPU.
    """

    def __init__(self, blocks: list[Block], sizes: Sizes, norm: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
        check_blocks(blocks, sizes)
        self._device = norm.device.index
        self._grid = compiled.processors_of(self._device)
        self._blocks, self._sizes, self._norm = blocks, sizes, norm
        self._rotary = tuple(table.to(torch.float32).contiguous() for table in rotary)
        self.cache = self._zeros(len(blocks), 2, sizes.kv_heads, sizes.length, sizes.head, dtype=sizes.dtype)
        self.position = Position(sizes.length, norm.device)
        steps = self._make_steps()
        self._count = len(steps)
        self._steps = torch.frombuffer(bytearray((_Step * len(steps))(*steps)), dtype=torch.uint8).to(norm.device)
        self._work = self._make_work(steps)
        variant = blocks[0].down.bits, sizes.dtype, sizes.head, sizes.heads // sizes.kv_heads
        self._begin = compiled.token_kernel(self._device, "begin_token", (_Token, _P, _P, _P, _I, _F), variant)
        self._decode = compiled.token_kernel(self._device, "decode_token", (_Token,), variant)
        self._end = compiled.token_kernel(self._device, "end_token", (_Token, _P, _P, _I), variant)
        self._next = compiled.token_kernel(self._device, "next_token", (_P, _P, _I), variant)

    def run(self, embedded: torch.Tensor, stepwise: bool = False) -> torch.Tensor:
        """Take a token through all layers and the final norm; its keys and values go into the cache. The position moves on.

        Args:
            embedded: [..., hidden], one token, contiguous, of the model's dtype.
            stepwise: one launch for each step, for tests; the same bits.

        Returns:
            The same shape.

        Raises:
            OptionError: the cache is full.
        """
        self.position.advance()
        stream, chunks = torch.cuda.current_stream(self._device).cuda_stream, (-(-self._sizes.hidden // (CHUNK * compiled.TOKEN_WARPS)), 1)
        norm, layer = self._blocks[0].norms[0], self._blocks[0].projections[0]
        inputs = norm.data_ptr(), layer.input_scale.data_ptr(), layer.input_block, 1 / math.sqrt(layer.input_block)
        self._begin.launch(chunks, stream, self._token(0, 0), embedded.data_ptr(), *inputs)
        at_once = 1 if stepwise else self._count
        for begin in range(0, self._count, at_once):
            self._decode.launch((self._grid, 1), stream, self._token(begin, begin + at_once))
        normalized = torch.empty_like(embedded)
        self._end.launch(chunks, stream, self._token(0, 0), self._norm.data_ptr(), normalized.data_ptr(), self._count)
        self._next.launch((1, 1), stream, self._work["tag"][0].data_ptr(), self.position.on_device.data_ptr(), self._count)
        return normalized

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=f"cuda:{self._device}")

    def _make_steps(self) -> list[_Step]:
        """Four products and attention for each layer; each knows what reads its result."""
        steps: list[_Step] = []
        for index, block in enumerate(self._blocks):
            query, key, value, output, gate, up, down = zip(block.layers, block.biases)
            behind = self._blocks[index + 1] if index + 1 < len(self._blocks) else None
            after = (behind.projections[0], behind.norms[0]) if behind else (None, None)
            attention = self._reader(_Step(kind=_ATTENTION), block.output, None)
            attention.head_norms[:] = [_address(norm) for norm in block.head_norms]
            attention.keys, attention.values = (part.data_ptr() for part in self.cache[index])
            steps += [
                self._product(_PLAIN, (query, key, value), None, None),
                attention,
                self._product(_RESIDUAL, (output,), block.gated[0], block.norms[1]),
                self._product(_GATED, (gate, up), block.down, None),
                self._product(_RESIDUAL, (down,), *after),
            ]
        for step in steps:
            step.groups = self._groups_of(step)
        return steps

    def _product(self, kind: int, parts: tuple, reader: Layer | None, norm: torch.Tensor | None) -> _Step:
        layer = parts[0][0]
        step = _Step(kind=kind, units=units_of(layer.inputs), parts=len(parts))
        step.segment_shift = (layer.input_block // UNIT_INPUTS).bit_length() - 1
        for index, (part, bias) in enumerate(parts):
            step.weights[index], step.output_scale[index], step.bias[index] = _address(part.arranged), _address(part.scale), _address(bias)
            step.part_rows[index], step.part_outputs[index] = part.rows, part.outputs
            step.output_block[index], step.output_normal[index] = part.output_block, 1 / math.sqrt(part.output_block)
        step.rows = sum(step.part_rows)
        needed = shared_bytes(step.units, step.rows, self._grid)
        if needed > compiled.INPUT_BYTES:
            requirement = f"for the GPU's decode kernel, a product must fit into {compiled.INPUT_BYTES} bytes of shared memory"
            raise UnsupportedModelError(requirement, f"{needed} for {step.rows} rows on {self._grid} multiprocessors", _HINT)
        return self._reader(step, reader, norm)

    @staticmethod
    def _reader(step: _Step, layer: Layer | None, norm: torch.Tensor | None) -> _Step:
        """Tell a step who reads its result, behind which norm."""
        if layer is not None:
            step.input_scale, step.norm, step.input_block = _address(layer.input_scale), _address(norm), layer.input_block
            step.input_normal = 1 / math.sqrt(layer.input_block)
        return step

    def _groups_of(self, step: _Step) -> int:
        if step.kind == _ATTENTION:
            return -(-self._sizes.heads * self._sizes.head // CHUNK)
        parts = step.part_rows[: 1 if step.kind == _GATED else step.parts]
        return sum(-(-rows // GROUP_ROWS) for rows in parts)

    def _make_work(self, steps: list[_Step]) -> dict[str, list[torch.Tensor]]:
        """Memory between the steps, by the names in _Token."""
        sizes, first = self._sizes, self._blocks[0]
        rows, words = max(step.rows for step in steps), torch.int64
        # what stands behind a norm, and the other inputs
        widths = sizes.hidden, max(sizes.heads * sizes.head, first.down.inputs)
        shares = -(-sizes.heads // sizes.kv_heads // _QUERIES) * sizes.kv_heads
        items = max(self._grid, shares) * min(_QUERIES, sizes.heads // sizes.kv_heads)
        return {
            "hidden": [self._zeros(sizes.hidden)],
            "projected": [self._zeros((sizes.heads + 2 * sizes.kv_heads) * sizes.head, dtype=words)],
            "square_sums": [self._zeros(-(-sizes.hidden // CHUNK), dtype=words)],
            "inputs": [self._zeros(width // 4, dtype=words) for width in widths],
            "scales": [self._zeros(-(-width // UNIT_INPUTS), dtype=words) for width in widths],
            "slots": [self._zeros((self._grid + rows) * UNIT_INPUTS, dtype=words)],
            "partial": [self._zeros(items * sizes.head, dtype=words)],
            "weights_of_partial": [self._zeros(items * 2, dtype=words)],
            # fresh words have the tag 0
            "tag": [self._zeros(1, dtype=torch.int32) + 1],
            "position": [self.position.on_device],
            "cosines": [self._rotary[0]],
            "sines": [self._rotary[1]],
        }

    def _token(self, first: int, last: int) -> _Token:
        sizes = self._sizes
        token = _Token(first=first, last=last, hidden_size=sizes.hidden, one=1)
        token.heads, token.kv_heads, token.length = sizes.heads, sizes.kv_heads, sizes.length
        token.steps, token.epsilon, token.scaling = self._steps.data_ptr(), sizes.epsilon, sizes.scaling
        for name, tensors in self._work.items():
            addresses = [tensor.data_ptr() for tensor in tensors]
            setattr(token, name, (_P * 2)(*addresses) if len(addresses) > 1 else addresses[0])
        return token


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
