"""Error feedback on a GPU: the sums and the order of `quantize.feedback`, for all rows of tiles of a group at once.

One step encodes one tile of every row of tiles. Where outputs know each other a row is one column behind the next row of its sheet, its
`delay`; so at one step rows work on different columns, and whatever belongs to a column is gathered. Columns outside the matrix, which
rows meet before they begin and after they have ended, are encoded too, as zeros without errors: that costs a few tiles and no branches.

Feedback along the inputs comes in two parts: of columns encoded before the last `BATCH_STEPS` steps began, one product for all rows, with
every column that any of them meets; and of those since, a small product per step. All sums are exact, as on the processor, so the same
encoder gives the same bytes.

The steps of a batch are the same operations every time, so a GPU gets them as one CUDA graph: sending them one by one takes longer than
computing them, and threads that send to several GPUs would wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from septet.codes import trellis
from septet.codes.tile import TILE_INPUTS, TILE_OUTPUTS, WEIGHTS_PER_TILE
from septet.quantize.factorization import ERROR_BITS
from septet.quantize.feedback import ERROR_SHIFT
from septet.quantize_gpu import clusters
from septet.quantize_gpu.factorization import Factor
from septet.quantize_gpu.graphs import Repeated
from septet.quantize_gpu.rotation import pack, window_levels
from septet.quantize_gpu.steps import Steps

__all__ = ["BATCH_STEPS", "Encoder", "Sheet", "encode_plainly", "encode_sheets"]

#: Steps between two large products; a matter of speed alone.
BATCH_STEPS = 32
#: Bytes are put together for about so many tiles at a time.
_TILES_TO_PACK = 1 << 18
#: Errors are widened, to be multiplied, about so many at a time.
_ERRORS_TO_WIDEN = 1 << 25
#: int16 [tiles, 256] quarter levels and the bits per pair -> int32 [tiles, 128] windows; `kernels.encode`, or another in tests.
Encoder = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Sheet:
    """Rows to encode: float32 [N, K], finite, in standard deviations; and the factor of their outputs, in tiles of 64."""

    rotated: torch.Tensor
    outputs: Factor | None = None


def encode_plainly(rotated: torch.Tensor, bits: int, encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """All tiles at once.

    Args:
        rotated: float32 [N, K], in standard deviations.
        bits: bits per pair.
        encoder: of tiles.

    Returns:
        (packed uint8 [ceil(N/64), ceil(K/4) * 16*bits], levels int8 [N, K]).
    """
    tiles = _tiles(_in_quarter_levels(rotated, bits)).round_().clamp_(-trellis.FIXED_LIMIT, trellis.FIXED_LIMIT).to(torch.int16)
    rows, columns = tiles.shape[:2]
    windows = encoder(tiles.reshape(-1, WEIGHTS_PER_TILE), bits)
    levels = window_levels(bits, str(rotated.device))[windows].reshape(rows, columns, TILE_OUTPUTS, TILE_INPUTS)
    return _packed((windows & (1 << bits) - 1).to(torch.uint8).reshape(rows, columns, -1), bits), _matrix(levels, rotated.shape)


def encode_sheets(sheets: Sequence[Sheet], factor: Factor, bits: int, encoder: Encoder) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Encode rotated weights with error feedback.

    Args:
        sheets: at least one, with the same K.
        factor: of the Hessian of the inputs in the same basis.
        bits: bits per pair.
        encoder: of tiles.

    Returns:
        For each sheet what `encode_plainly` returns.
    """
    work = _Work(sheets, factor, bits, encoder)
    run_batch = Repeated(work.run_batch, sheets[0].rotated.device, warm=work.fused is not None)
    for start in range(0, work.steps, BATCH_STEPS):
        work.begin_batch(start)
        run_batch()
    return work.results()


class _Family:
    """Sheets whose outputs know each other, with equally many rows of tiles: how errors of later rows reach earlier ones.

    Args:
        sheets: positions of the sheets in the call.
        first: their first row of tiles among all.
        factors: of their outputs.
        rows: of tiles in each sheet.
        dtype: what coefficients are kept as: float64, or int32, for which they are small enough (`Decomposition.factor`).
    """

    def __init__(self, sheets: list[int], first: int, factors: list[Factor], rows: int, dtype: torch.dtype) -> None:
        self.sheets, self.rows, self.tiles = sheets, rows, slice(first, first + len(sheets) * rows)
        size, device = rows * TILE_OUTPUTS, factors[0].coefficients.device
        across = torch.zeros((len(sheets), size, size), dtype=dtype, device=device)
        for matrix, factor in zip(across, factors):
            matrix[: len(factor.coefficients), : len(factor.coefficients)] = factor.coefficients.T
        #: [sheets, rows, 64, rows * 64]
        self.across = across.reshape(len(sheets), rows, TILE_OUTPUTS, size)
        per_output = torch.tensor([0.5 ** int(factor.shift) for factor in factors], dtype=torch.float64)
        self.per_output = per_output.to(device, non_blocking=True)[:, None, None, None]

    def from_rows(self, errors: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """What errors of later rows in the same column ask of each row, in the unit of errors.

        Args:
            errors: float32 [all rows of tiles, columns, 64, 4].
            columns: int64 [all rows of tiles], where each row is.

        Returns:
            float64 [rows of this family, 64, 4].
        """
        count = len(self.sheets)
        own = errors[self.tiles].reshape(count, self.rows, *errors.shape[1:])
        seen = own.index_select(2, columns[self.tiles][: self.rows]).transpose(1, 2)
        seen = seen.reshape(count, self.rows, self.rows * TILE_OUTPUTS, TILE_INPUTS).double()
        return ((self.across @ seen) * self.per_output).reshape(-1, TILE_OUTPUTS, TILE_INPUTS)


class _Work:
    """Everything about sheets while they are encoded. T rows of tiles; P columns of tiles, some of them beyond the matrix on both sides."""

    def __init__(self, sheets: Sequence[Sheet], factor: Factor, bits: int, encoder: Encoder) -> None:
        self._sheets, self._bits, self._encoder = sheets, bits, encoder
        device, inputs = sheets[0].rotated.device, sheets[0].rotated.shape[1]
        counts = [-(-len(sheet.rotated) // TILE_OUTPUTS) for sheet in sheets]
        order = sorted(range(len(sheets)), key=lambda position: (sheets[position].outputs is None, counts[position]))
        #: Where the rows of tiles of each sheet begin: those that know each other first, sheets of equal size side by side.
        self._firsts, families, delays, first = [0] * len(sheets), [], [], 0
        for position in order:
            self._firsts[position] = first
            known = sheets[position].outputs is not None
            if known and not (families and families[-1][0] == counts[position]):
                families.append((counts[position], first, []))
            if known:
                families[-1][2].append(position)
            delays += list(range(counts[position] - 1, -1, -1)) if known else [0] * counts[position]
            first += counts[position]
        # Kernels that do a step at once, where they can be had and nobody has brought another encoder, read coefficients as int32.
        fused = encoder is clusters.encode_from_both_ends
        dtype = torch.int32 if fused else torch.float64
        self._families = [
            _Family(members, start, [sheets[member].outputs for member in members], rows, dtype) for rows, start, members in families
        ]
        self._counts, tiles, most = counts, len(delays), max(delays)
        self._inputs, self._columns = inputs, -(-inputs // TILE_INPUTS)
        self.steps = self._columns + most
        #: Columns before the first one: rows run past it by their delays, batches by their length.
        self._left = BATCH_STEPS + most
        across = self._left + self._columns + most
        self._delays = torch.tensor(delays).to(device, non_blocking=True)
        #: Which of the columns that some row meets in a batch each row meets at its steps: int64 [T, steps].
        self._met = self._delays[:, None] + torch.arange(BATCH_STEPS - 1, -1, -1, device=device)
        self._number = torch.arange(tiles, device=device)
        # By its bits, for a shift that the GPU has yet to find.
        self._per_input = (1023 - ERROR_SHIFT - torch.as_tensor(factor.shift).to(device, non_blocking=True) << 52).view(torch.float64)
        self._coefficients, start, width = factor.coefficients, self._left * TILE_INPUTS, BATCH_STEPS * TILE_INPUTS
        reach = width + most * TILE_INPUTS
        self._square = torch.empty((reach, reach), dtype=torch.float64, device=device)
        self._sums = torch.empty((tiles * TILE_OUTPUTS, reach), dtype=torch.float64, device=device)
        #: Of the current batch: the column of rows without a delay, the feedback of earlier batches, coefficients inside, and errors.
        self._now = torch.zeros((), dtype=torch.int64, device=device)
        self._before = torch.zeros((tiles, TILE_OUTPUTS, width), dtype=torch.float64, device=device)
        self._local = torch.zeros((tiles, width, width), dtype=torch.float64, device=device)
        self._recent = torch.zeros_like(self._before)
        shape = (tiles, across, TILE_OUTPUTS, TILE_INPUTS)
        self._weights = torch.zeros(shape, device=device)
        self._levels = torch.zeros(shape, dtype=torch.int8, device=device)
        self._symbols = torch.zeros((tiles, across, WEIGHTS_PER_TILE // 2), dtype=torch.uint8, device=device)
        self._errors = torch.zeros(shape, device=device)
        self._mixed = torch.zeros(shape, device=device) if self._families else self._errors
        self._real_rows = torch.zeros((tiles, TILE_OUTPUTS, 1), dtype=torch.float64, device=device)
        self._real_columns = torch.zeros((across, 1, TILE_INPUTS), dtype=torch.float64, device=device)
        self._real_columns.view(-1)[start : start + inputs] = 1
        for sheet, first, count in zip(sheets, self._firsts, counts):
            part = slice(first, first + count)
            self._weights[part, self._left : self._left + self._columns] = _tiles(_in_quarter_levels(sheet.rotated, bits))
            self._real_rows[part].view(-1)[: len(sheet.rotated)] = 1
        self.fused = self._fused_steps() if fused else None

    def _fused_steps(self) -> Steps:
        tensors = {"weights": self._weights, "errors": self._errors, "mixed": self._mixed, "levels": self._levels}
        tensors |= {"symbols": self._symbols, "before": self._before, "local": self._local, "recent": self._recent, "now": self._now}
        tensors |= {"delays": self._delays, "real_rows": self._real_rows, "real_columns": self._real_columns}
        across = [(family.tiles.start, family.across, family.per_output.flatten()) for family in self._families]
        return Steps(tensors, across, self._per_input, self._bits)

    def begin_batch(self, start: int) -> None:
        """Make ready for the steps from `start` on: feedback of all columns encoded before them, and coefficients inside the batch.

        All is found for every column that some row meets in the batch, and each row takes those that it meets itself, in the order of
        steps.
        """
        self._now.fill_(self._left + self._columns - 1 - start)
        # In the true matrix: rows without a delay have been encoded from column `last` on; the batch may begin before column 0.
        last = self._columns - start
        offset, sums, square = (last - BATCH_STEPS) * TILE_INPUTS, self._sums.zero_(), self._square.zero_()
        first, stop = max(offset, 0), min(offset + len(square), self._inputs)
        inside = slice(first - offset, stop - offset)
        # What the factor does not say, above the diagonal, meets errors that are still 0.
        square[inside, inside] = self._coefficients[first:stop, first:stop]
        if 0 < start:
            self._add_earlier(max(last, 0), slice(first, stop), sums[:, inside])
        tiles, reach = len(self._delays), len(square) // TILE_INPUTS
        met = self._met[:, None, :, None].expand(-1, TILE_OUTPUTS, -1, TILE_INPUTS)
        torch.gather(sums.view(tiles, TILE_OUTPUTS, reach, TILE_INPUTS), 2, met, out=self._before.view(met.shape))
        turned = square.view(reach, TILE_INPUTS, reach, TILE_INPUTS)[self._met[:, :, None], :, self._met[:, None]]
        self._local.view(tiles, BATCH_STEPS, TILE_INPUTS, BATCH_STEPS, TILE_INPUTS).copy_(turned.transpose(2, 3))

    def _add_earlier(self, first: int, columns: slice, out: torch.Tensor) -> None:
        """What errors from column of tiles `first` on ask of columns of weights: float64 [T * 64, columns], in pieces of rows."""
        width = self._inputs - first * TILE_INPUTS
        rows = max(1, _ERRORS_TO_WIDEN // (max(width, 1) * TILE_OUTPUTS))
        for start in range(0, len(self._delays), rows):
            errors = self._mixed[start : start + rows, self._left + first : self._left + self._columns].transpose(1, 2)
            wide = torch.empty(errors.shape, dtype=torch.float64, device=errors.device).copy_(errors)
            piece = out[start * TILE_OUTPUTS : (start + rows) * TILE_OUTPUTS]
            torch.mm(wide.view(len(piece), -1)[:, :width], self._coefficients[first * TILE_INPUTS :, columns], out=piece)

    def run_batch(self) -> None:
        """Encode at the steps of a batch; those after the last step meet padding only."""
        self._recent.zero_()
        for number in range(BATCH_STEPS):
            if self.fused is not None:
                self.fused.step(number)
                continue
            inside = slice(number * TILE_INPUTS, (number + 1) * TILE_INPUTS)
            sums = torch.bmm(self._recent, self._local[:, :, inside])
            sums += self._before[:, :, inside]
            sums *= self._per_input
            self._recent[:, :, inside] = self._step(self._now + self._delays - number, sums)

    def _step(self, columns: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Encode one tile per row; returns its errors as inputs see them, float64 [T, 64, 4]."""
        place = self._number, columns
        weights, real = self._weights[place].double(), self._real_rows * self._real_columns[columns]
        reached = [(family.tiles, family.from_rows(self._errors, columns)) for family in self._families]
        for tiles, asked in reached:
            sums[tiles] += asked * 0.5**ERROR_SHIFT
        wanted = ((weights - sums) * real).round_().clamp_(-trellis.FIXED_LIMIT, trellis.FIXED_LIMIT)
        windows = self._encoder(wanted.to(torch.int16).reshape(-1, WEIGHTS_PER_TILE), self._bits)
        levels = window_levels(self._bits, str(windows.device))[windows].reshape(wanted.shape)
        self._symbols[place] = (windows & (1 << self._bits) - 1).to(torch.uint8)
        self._levels[place] = levels
        errors = _whole((levels.double() * trellis.FIXED_PER_LEVEL - weights) * 2.0**ERROR_SHIFT) * real
        self._errors[place] = errors.float()
        if not reached:
            return errors
        for tiles, asked in reached:
            errors[tiles] = _whole(errors[tiles] + asked)
        self._mixed[place] = errors.float()
        return errors

    def results(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Packed and levels of each sheet."""
        true = slice(self._left, self._left + self._columns)
        packed = _packed(self._symbols[:, true], self._bits)
        levels = _matrix(self._levels[:, true], (len(packed) * TILE_OUTPUTS, self._inputs))
        made = []
        for sheet, first, count in zip(self._sheets, self._firsts, self._counts):
            made.append((packed[first : first + count], levels[first * TILE_OUTPUTS :][: len(sheet.rotated)]))
        return made


def _in_quarter_levels(rotated: torch.Tensor, bits: int) -> torch.Tensor:
    """The same float32 product as in `codes.trellis.to_fixed`."""
    return rotated * (trellis.FIXED_PER_LEVEL * trellis.WIDTHS[bits].levels_per_sigma)


def _tiles(matrix: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [ceil(N/64), ceil(K/4), 64, 4], padded with 0."""
    outputs, inputs = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -inputs % TILE_INPUTS, 0, -outputs % TILE_OUTPUTS))
    return padded.reshape(len(padded) // TILE_OUTPUTS, TILE_OUTPUTS, -1, TILE_INPUTS).transpose(1, 2)


def _matrix(tiles: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `_tiles`."""
    rows, columns = tiles.shape[:2]
    return tiles.transpose(1, 2).reshape(rows * TILE_OUTPUTS, columns * TILE_INPUTS)[: shape[0], : shape[1]].contiguous()


def _packed(symbols: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, columns, 128] -> uint8 [rows, columns * 16*bits]."""
    step = max(1, _TILES_TO_PACK // symbols.shape[1])
    return torch.cat([pack(symbols[row : row + step], bits).flatten(1) for row in range(0, len(symbols), step)])


def _whole(errors: torch.Tensor) -> torch.Tensor:
    """Whole numbers that exact sums have room for, in place."""
    return errors.round_().clamp_(-(2.0**ERROR_BITS), 2.0**ERROR_BITS)
